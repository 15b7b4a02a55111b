"""From a torch module to files: ONNX, OpenVINO, an AOTInductor package. Runs in a process of its own.

`torch.export` traces the module once for any number of items and any length; what it cannot trace is the build's error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.artifact import Subject, processor_flags
from headrace.errors import Unavailable
from headrace.optimizing import export_aot, export_language
from headrace.optimizing.rungs import Rung, saves_a_bit
from headrace.optimizing.smoothing import smooth
from headrace.runners import collate
from headrace.runners.engines import AOT_FILE, ONNX_FILE, OPENVINO_FILE
from headrace.runners.way import GENERATE

_LONGEST = 4096
_MOST_ITEMS = 1024
_PRODUCTS = ("Gemm", "MatMul")


def export(
    rung: Rung,
    subject: Subject,
    module: Any,
    example: Sequence[collate.Item],
    calibration: Sequence[collate.Item],
    directory: Path,
) -> None:
    """Write the rung's files.

    Args:
        example: two items, so that no size is taken for a constant.
        calibration: for quantisation.
    """
    if subject.task == GENERATE:
        export_language.export(rung, module, directory)
        return
    tensors = _tensors(example, subject, module)
    batches = [_tensors([item], subject, module) for item in calibration if rung.calibrated]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' notes to their own developers
        if rung.calibrated and rung.engine != "openvino":  # its quantiser does that by itself
            smooth(module, batches)
        named = _Named(module, list(tensors))
        if rung.engine == "onnx":
            _onnx(rung, subject, named, tensors, calibration, directory)
        elif rung.engine == "openvino":
            _openvino(rung, subject, named, tensors, calibration, directory)
        else:
            _aot(rung, subject, named, tensors, batches, directory)


def _tensors(items: Sequence[collate.Item], subject: Subject, module: Any) -> dict[str, Any]:
    device = next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return {name: torch.from_numpy(array).to(device) for name, array in collate.collate(items, subject).items()}


def _dynamic(subject: Subject, names: Sequence[str]) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("items", min=1, max=_MOST_ITEMS)
    length = torch.export.Dim("length", min=1, max=subject.text.max_tokens if subject.text else _LONGEST)
    ragged = {spec.name: spec.ragged for spec in subject.inputs}
    return {name: {0: batch, 1: length} if ragged[name] else {0: batch} for name in names}


class _Named(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """A module under the names of its inputs: `torch.export` gives no shapes to what ``forward`` takes as keywords."""

    def __init__(self, module: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module

        def forward(*tensors: Any, **named: Any) -> Any:
            return self.module(**dict(zip(names, tensors, strict=False)), **named)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def _onnx(
    rung: Rung,
    subject: Subject,
    module: Any,
    tensors: dict[str, Any],
    calibration: Sequence[collate.Item],
    directory: Path,
) -> None:
    if rung.options.get("quantize") == "weights":
        raise Unavailable("weights alone are quantised of language models", hint="ort-int8-dynamic")
    plain = directory / ("float.onnx" if rung.options else ONNX_FILE)
    torch.onnx.export(
        module,
        (),
        str(plain),
        kwargs=tensors,
        dynamo=True,
        dynamic_shapes=_dynamic(subject, list(tensors)),
        external_data=False,
        verbose=False,
    )
    if not rung.options:
        return
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = directory / "prepared.onnx"
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    if rung.options["quantize"] == "dynamic":
        _quantize_dynamic(prepared, directory / ONNX_FILE)
    else:
        _quantize_static(prepared, directory / ONNX_FILE, _Calibration(subject, calibration, prepared))
    plain.unlink()
    prepared.unlink()


def _quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime import quantization as ort

    ort.quantize_dynamic(
        str(source),
        str(target),
        per_channel=True,
        reduce_range=saves_a_bit(processor_flags()),
        weight_type=ort.QuantType.QInt8,
    )


def _quantize_static(source: Path, target: Path, calibration: _Calibration) -> None:
    """Products with weights and tables of embeddings in 8 bits; what products give stays float.

    Rounding that too, and all between the products, as is the library's own choice, costs most of the accuracy: on
    all-MiniLM-L6-v2 the mean cosine is .81 then, .93 with products alone, .989 where their answers are float, and .997
    after smoothing. Calibrators that clip are of no use: they want all inputs to be of one length.
    """
    import onnx
    from onnxruntime import quantization as ort

    graph = onnx.load(str(source), load_external_data=False).graph
    weights = {each.name for each in graph.initializer}
    # Those of attention: exempt by name, as MatMulConstBOnly is not heeded here.
    of_two_inputs = [node.name for node in graph.node if node.op_type in _PRODUCTS and not weights & {*node.input[:2]}]
    ort.quantize_static(
        str(source),
        str(target),
        calibration,
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=saves_a_bit(processor_flags()),
        activation_type=ort.QuantType.QUInt8,  # what the processors' instructions take on that side
        weight_type=ort.QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gather", *_PRODUCTS],
        nodes_to_exclude=of_two_inputs,
        extra_options={"OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
    )


class _Calibration:
    """Samples as ONNX Runtime asks for them."""

    def __init__(self, subject: Subject, items: Sequence[collate.Item], model: Path) -> None:
        import onnx

        names = {each.name for each in onnx.load(str(model), load_external_data=False).graph.input}
        self._batches = iter(
            [
                {name: array for name, array in collate.collate([item], subject).items() if name in names}
                for item in items
            ]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Asked for by some calibrators that read in parts; ours reads all."""


def _openvino(
    rung: Rung,
    subject: Subject,
    module: Any,
    tensors: dict[str, Any],
    calibration: Sequence[collate.Item],
    directory: Path,
) -> None:
    import openvino

    shapes = _dynamic(subject, list(tensors))
    program = torch.export.export(module, (), tensors, dynamic_shapes=shapes)
    model = openvino.convert_model(program)
    for port, name in zip(model.inputs, tensors, strict=False):
        port.set_names({name})
    if rung.options:
        import nncf

        model = nncf.quantize(
            model,
            nncf.Dataset(calibration, lambda item: collate.collate([item], subject)),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )
    openvino.save_model(model, str(directory / OPENVINO_FILE), compress_to_fp16=False)


def _aot(
    rung: Rung,
    subject: Subject,
    module: Any,
    tensors: dict[str, Any],
    batches: Sequence[dict[str, Any]],
    directory: Path,
) -> None:
    def traced(part: Any) -> Any:
        return torch.export.export(part, (), tensors, dynamic_shapes=_dynamic(subject, list(tensors)))

    program = traced(module)
    if rung.options.get("quantize"):
        program = export_aot.quantized(program, traced, batches)
    export_aot.compile_to(program, directory / AOT_FILE, next(iter(tensors.values())).device.type)
