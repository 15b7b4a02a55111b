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

from headrace.artifact import Subject
from headrace.optimizing.rungs import Rung
from headrace.runners import collate
from headrace.runners.engines import AOT_FILE, ONNX_FILE, OPENVINO_FILE

_LONGEST = 4096
_MOST_ITEMS = 1024


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
        calibration: for static quantisation.
    """
    arrays = collate.collate(example, subject)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    device = next(iter(module.parameters())).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    module = _Named(module, list(tensors))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' notes to their own developers
        if rung.engine == "onnx":
            _onnx(rung, subject, module, tensors, calibration, directory)
        elif rung.engine == "openvino":
            _openvino(rung, subject, module, tensors, calibration, directory)
        else:
            _aot(subject, module, tensors, directory)


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
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = directory / "prepared.onnx"
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    target = str(directory / ONNX_FILE)
    if rung.options["quantize"] == "dynamic":
        ort.quantize_dynamic(
            str(prepared), target, per_channel=True, reduce_range=True, weight_type=ort.QuantType.QInt8
        )
    else:
        ort.quantize_static(
            str(prepared),
            target,
            _Calibration(subject, calibration, prepared),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            weight_type=ort.QuantType.QInt8,
        )
    plain.unlink()
    prepared.unlink()


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


def _aot(subject: Subject, module: Any, tensors: dict[str, Any], directory: Path) -> None:
    shapes = _dynamic(subject, list(tensors))
    program = torch.export.export(module, (), tensors, dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(directory / AOT_FILE))
