"""Ways to run a model on arrays: ONNX Runtime, OpenVINO, an AOTInductor package, a torch module.

An engine takes one array per input and gives one array. Each library is imported where its engine is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from headrace.artifact import Subject
from headrace.errors import Unavailable
from headrace.runners.collate import Array
from headrace.runners.devices import require_torch
from headrace.runners.layouts import Layout, Shape, laid_out


class Engine(Protocol):
    """Runs a batch: named arrays of shape (items, …) to one array of shape (items, …), float32."""

    def __call__(self, batch: dict[str, Array]) -> Array: ...


ONNX_FILE = "model.onnx"
OPENVINO_FILE = "model.xml"
AOT_FILE = "model.pt2"
_CUDA = "CUDAExecutionProvider"


def open_exported(kind: str, directory: Path, device: str, threads: int, subject: Subject) -> Engine:
    """What a rung was exported to: onnx, openvino or aot.

    Raises:
        Unavailable: the library for it is not installed.
    """
    if kind == "onnx":
        return open_onnx(directory, device, threads)
    if kind == "openvino":
        return open_openvino(directory, device, threads)
    return module_engine(open_aot(directory, device, threads, subject), device)


def onnx_session(directory: Path, device: str, threads: int) -> Any:
    """A session of ONNX Runtime.

    Raises:
        Unavailable: without onnxruntime, or without its build for GPUs where it is to run on one.
    """
    try:
        import onnxruntime
    except ImportError:
        raise Unavailable("ONNX models need onnxruntime", hint="pip install 'headrace[onnx]'") from None

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu":
        if _CUDA not in onnxruntime.get_available_providers():  # it would run on the CPU without a word
            raise Unavailable("this onnxruntime runs on a CPU only", hint="pip install onnxruntime-gpu")
        providers.insert(0, (_CUDA, {"device_id": int(device.partition(":")[2] or 0)}))
    return onnxruntime.InferenceSession(str(directory / ONNX_FILE), options, providers=providers)


def open_onnx(directory: Path, device: str, threads: int) -> Engine:
    """Raises `Unavailable` as `onnx_session` does."""
    session = onnx_session(directory, device, threads)
    names = {each.name for each in session.get_inputs()}

    def run(batch: dict[str, Array]) -> Array:
        # The export leaves out what the model does not look at.
        output: Array = session.run(None, {name: value for name, value in batch.items() if name in names})[0]
        return output

    return run


def open_openvino(directory: Path, device: str, threads: int) -> Engine:
    """Raises `Unavailable` without openvino."""
    try:
        import openvino
    except ImportError:
        raise Unavailable("OpenVINO models need openvino", hint="pip install 'headrace[openvino]'") from None

    options = {
        "INFERENCE_NUM_THREADS": threads or os.cpu_count() or 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # on some processors it would be bfloat16, which is another rung
    }
    compiled = openvino.Core().compile_model(str(directory / OPENVINO_FILE), "CPU", options)
    names = {name for each in compiled.inputs for name in each.get_names()}
    request = compiled.create_infer_request()

    def run(batch: dict[str, Array]) -> Array:
        request.infer({name: value for name, value in batch.items() if name in names})
        output: Array = request.get_output_tensor(0).data.copy()
        return output

    return run


def open_aot(
    directory: Path, device: str, threads: int, subject: Subject, *, captured: bool = False
) -> Callable[..., Any]:
    """An AOTInductor package, called with tensors by name as the module it was made of.

    Args:
        subject: its inputs are in the order of the module's parameters.
        captured: its calls can be captured: it then keeps no events of its own, and is for one thread.

    Not by `torch._inductor.aoti_load_package`: that imports all of the compiler and tries the C++ compiler on every
    instruction set, seconds of work, only to warn. Whether this processor has what a package needs, its manifest says.
    """
    require_torch()
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    names = [each.name for each in subject.inputs]
    index = -1 if device == "cpu" else int(device.partition(":")[2] or 0)
    package = torch._C._aoti.AOTIModelPackageLoader(str(directory / AOT_FILE), "model", captured, 1, index)

    def run(**tensors: Any) -> Any:
        return package.boxed_run([tensors[name] for name in names])

    return run


def module_engine(module: Any, device: str, layout: Layout | None = None) -> Engine:
    """A torch module, on a device already.

    Args:
        layout: of a module that is compiled, or captured, by shape: batches are laid out in few of them.
    """
    import torch

    def run(batch: dict[str, Array]) -> Array:
        items, *length = next(iter(batch.values())).shape[:2]
        laid = batch if layout is None else laid_out(layout, batch)
        # A caller keeps an answer while the next one is made: graphs write all of theirs to the same place.
        with torch.inference_mode():
            output = as_array(module(**{name: torch.from_numpy(value).to(device) for name, value in laid.items()}))
        return output if layout is None else own_part(output, items, length, layout.shape(batch))

    return run


def own_part(output: Array, items: int, length: list[int], shape: Shape) -> Array:
    """Of what a filled-up batch gave, the rows of its own items; of one row per token those of their own tokens."""
    output = output[:items]
    return output[:, : length[0]] if length and output.ndim > 2 and output.shape[1] == shape[1] else output


def as_array(output: Any) -> Array:
    """The one tensor that a model gives, as float32."""
    if isinstance(output, (tuple, list)):
        output = output[0]
    array: Array = output.detach().float().cpu().numpy()
    return array
