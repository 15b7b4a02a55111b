"""A language model to ONNX, with its cache as inputs and outputs. Runs in a process of its own, as `export.py` does."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from headrace.errors import Unavailable
from headrace.optimizing.rungs import Rung
from headrace.runners.decoder import Decoder, Growing
from headrace.runners.decoder_onnx import STEP_BYTES
from headrace.runners.engines import ONNX_FILE

_MOST_ITEMS = 1024
_MOST_SLOTS = 1 << 16
_BLOCK = 32


def export(rung: Rung, decoder: Decoder, directory: Path) -> None:
    """Write the rung's files.

    Raises:
        Unavailable: there is no such way to run a language model.
    """
    if rung.engine != "onnx":
        raise Unavailable(f"{rung.engine} packages are made of models that encode, not yet of language models")
    quantize = rung.options.get("quantize", "")
    if quantize == "static":
        raise Unavailable("static quantisation is for models that encode", hint="ort-int8-weights")
    target = directory / ONNX_FILE
    plain = directory / ("float.onnx" if quantize else ONNX_FILE)
    _to_onnx(decoder, plain)
    if quantize == "weights":
        _weights(plain, target, int(rung.options["bits"]))
    elif quantize:
        from onnxruntime import quantization as ort

        ort.quantize_dynamic(
            str(plain), str(target), per_channel=True, reduce_range=True, weight_type=ort.QuantType.QInt8
        )
    if quantize:
        plain.unlink()
    _tell_step_bytes(target)


def _to_onnx(decoder: Decoder, path: Path) -> None:
    config = decoder.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = [f"{kind}_{layer}" for layer in range(config.num_hidden_layers) for kind in ("keys", "values")]
    past = {name: torch.zeros(2, heads, 3, width) for name in names}
    inputs = {
        "input_ids": torch.ones((2, 4), dtype=torch.int64),
        "pads": torch.zeros(2, dtype=torch.int64),
        "at": torch.arange(3, 7),
        "keep": torch.tensor([2, 3]),
    }
    items = torch.export.Dim("items", min=1, max=_MOST_ITEMS)
    slots, before, kept = (torch.export.Dim(name, min=1, max=_MOST_SLOTS) for name in ("slots", "before", "kept"))
    shapes = {"input_ids": {0: items, 1: slots}, "pads": {0: items}, "at": {0: slots}, "keep": {0: kept}}
    with torch.no_grad():
        torch.onnx.export(
            _Flat(decoder, [*inputs, *names]),
            (),
            str(path),
            kwargs=inputs | past,
            dynamo=True,
            dynamic_shapes=shapes | {name: {0: items, 2: before} for name in names},
            input_names=[*inputs, *names],
            output_names=["logits", *(f"all_{name}" for name in names)],
            external_data=False,
            verbose=False,
        )


class _Flat(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """A decoder whose cache is a tensor for each name, as `torch.export` wants them."""

    def __init__(self, decoder: Decoder, names: list[str]) -> None:
        super().__init__()
        self.decoder = decoder

        def forward(*tensors: Any, **named: Any) -> Any:
            given = dict(zip(names, tensors, strict=False)) | named
            past = [given[name] for name in names[4:]]
            cache = Growing(list(zip(past[::2], past[1::2], strict=True)))
            logits = self.decoder(given["input_ids"], given["pads"], given["at"], given["keep"], cache)
            return (logits, *(tensor for layer in cache.layers for tensor in layer))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def _tell_step_bytes(path: Path) -> None:
    """Write into the file how many bytes of weights a step reads: those of products, not the table of embeddings."""
    import onnx

    model = onnx.load(str(path))
    sizes = {each.name: len(each.raw_data) for each in model.graph.initializer}
    read = {name for node in model.graph.node if "Gather" not in node.op_type for name in node.input}
    entry = model.metadata_props.add()
    entry.key, entry.value = STEP_BYTES, str(sum(size for name, size in sizes.items() if name in read))
    onnx.save(model, str(path))


def _weights(source: Path, target: Path, bits: int) -> None:
    """Weights of products as integers in blocks, each with a scale; everything is computed from them in floats."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    config = nbits.DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, accuracy_level=4, bits=bits)
    quantizer = nbits.MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)
