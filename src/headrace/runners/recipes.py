"""What can be done to a float32 torch module as it is loaded, each under the word that manifests and rungs use.

A recipe is a list of such words, applied in order: ``["bf16", "compile"]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from headrace.errors import Unavailable
from headrace.runners.recipe_words import BY_SHAPE, CACHES, COMPILE, GRAPHS, REGIONAL, VARLEN


def apply(recipe: list[str], module: torch.nn.Module, device: str) -> Any:
    """The module on its device with all steps done; what is given may be changed.

    Raises:
        Unavailable: a package for a step is missing; says which.
    """
    if device.startswith("cuda") and takes_any_shape(recipe):
        torch.backends.cuda.enable_cudnn_sdp(False)
    module = module.eval()
    quantizing = [word for word in recipe if word in _ON_DEVICE]
    for word in recipe:
        if word in _BEFORE:
            module = _BEFORE[word](module)
    module = module.to(device)
    for word in quantizing:
        if REGIONAL in recipe:
            # Left as it is, what is not compiled would take more kernels than in floats, and a product of few rows a
            # copy to the host.
            for layer in _repeated(module):
                _ON_DEVICE[word](layer)
        else:
            module = _ON_DEVICE[word](module)
    if VARLEN in recipe:
        from headrace.runners import varlen

        module = varlen.exchange(module, device)
    for word in recipe:
        if word in COMPILES:
            return COMPILES[word](module)
    return module


def takes_any_shape(recipe: Collection[str]) -> bool:
    """Whether batches are run in the shapes they come in, so that cuDNN's attention is to be left out of this process.

    Of 16-bit floats it makes a plan for each new shape. On an H100 (torch 2.11) a plan takes 40 to 75 ms, where a call
    of BERT-base takes 6 and a prompt to a decoder of a billion parameters 11, or one more token with a cache that grows
    10. It is worth it where shapes are few and captured: a call with 512 tokens takes up to 20 % less time. Prompts
    come in any shape, whatever becomes of the steps after them.
    """
    return {GRAPHS, *BY_SHAPE}.isdisjoint(recipe) or not set(CACHES).isdisjoint(recipe)


def _attention(implementation: str) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Of a transformers model, wherever it lies in the module; others have no choice of it."""

    def change(module: torch.nn.Module) -> torch.nn.Module:
        for part in module.modules():
            if hasattr(part, "set_attn_implementation"):
                try:
                    part.set_attn_implementation(implementation)
                except (ImportError, ValueError) as error:
                    raise Unavailable(str(error), hint="leave it out of --rungs") from None
                break
        return module

    return change


def _tf32(module: torch.nn.Module) -> torch.nn.Module:
    torch.set_float32_matmul_precision("high")
    return module


def _quantize_dynamic(module: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and measured because guides still name it first
        made: torch.nn.Module = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)
    return made


def _torchao(make: Callable[[Any], Any]) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def quantize(module: torch.nn.Module) -> torch.nn.Module:
        try:
            import torchao.quantization as ao
        except ImportError:
            raise Unavailable("torchao is not installed", hint="pip install 'headrace[quant]'") from None
        ao.quantize_(module, make(ao))
        return module

    return quantize


def _integers(ao: Any) -> Any:
    # A product of integers takes its scale along, in a kernel that there is for GPUs only.
    if torch.cuda.is_available():
        torch._inductor.config.force_fuse_int_mm_with_mul = True
    return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _nf4(module: torch.nn.Module) -> torch.nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise Unavailable("bitsandbytes is not installed", hint="pip install 'headrace[quant]'") from None
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                made = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,  # double quantisation
                    quant_type="nf4",
                )
                made.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                made.bias = child.bias
                # It is quantised as it is moved.
                setattr(parent, name, made.to(child.weight.device))
    return module


def _compile(module: torch.nn.Module) -> Any:
    """Compile once for all shapes, and once more for a single row.

    For one shape each it takes as long for every one, 10 s on an H100, and saves 1 to 3 % of a call to BERT-base.
    """
    return torch.compile(module, dynamic=True)


def _compile_layers(module: torch.nn.Module) -> torch.nn.Module:
    """Compile what is repeated, once for all its repetitions ("regional compilation").

    On an H100 and of BERT-base's shape that takes 7 s instead of 24, with 8-bit floats 7 s where the whole took more
    than 150; a call takes 14 to 32 % longer.
    """
    layers = _repeated(module)
    _allow_compilations()  # a layer that looks at its number is compiled once for each
    for layer in layers:
        layer.compile(dynamic=True)
    return module


def _repeated(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that a model is a stack of, without those that are parts of others."""
    found = [
        layer
        for part in module.modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) > 1 and len({type(layer) for layer in part}) == 1
        for layer in part
    ]
    if not found:
        raise Unavailable("it has no list of layers that are alike", hint="`compile` takes it as a whole")
    inner = {each for layer in found for each in layer.modules() if each is not layer}
    return [layer for layer in found if layer not in inner]


def _compile_by_shape(mode: str) -> Callable[[torch.nn.Module], Any]:
    def compile_(module: torch.nn.Module) -> Any:
        _allow_compilations()
        return torch.compile(module, mode=mode, dynamic=False)

    return compile_


def _allow_compilations() -> None:
    """torch stops at 8 of one function."""
    torch._dynamo.config.recompile_limit = 256


_BEFORE: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "sdpa": _attention("sdpa"),
    "flash": _attention("flash_attention_2"),
    "tf32": _tf32,
    "bf16": lambda module: module.to(torch.bfloat16),
    "fp16": lambda module: module.to(torch.float16),
    "torch-int8-dynamic": _quantize_dynamic,
}
# torchao would have the compiler try block sizes one after the other for each kernel and shape: on an H100 a layer of
# 8-bit integers took 34 s and more instead of 6 to compile, and was as fast.
_ON_DEVICE: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "torchao-int8": _torchao(_integers),
    "torchao-int8-weights": _torchao(lambda ao: ao.Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao-int4": _torchao(
        lambda ao: ao.Int4WeightOnlyConfig(
            group_size=128,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm="hqq",
            set_inductor_config=False,
        )
    ),
    "fp8": _torchao(
        lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
    ),
    "nf4": _nf4,
}
COMPILES: dict[str, Callable[[torch.nn.Module], Any]] = {
    COMPILE: _compile,
    REGIONAL: _compile_layers,
    **{mode: _compile_by_shape(mode) for mode in sorted(BY_SHAPE)},
}
QUANTIZES = ("torch-int8-dynamic", *_ON_DEVICE)


def bytes_of(module: Any) -> int:
    """Bytes of all tensors that a module holds, quantised ones as they are kept."""
    module = getattr(module, "_orig_mod", module)
    total = sum(_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
    for part in module.modules():
        # Packed weights of quantize_dynamic's layers are no parameters; a layer and its one part both give them.
        if hasattr(part, "_weight_bias") and not isinstance(part._packed_params, torch.nn.Module):
            total += sum(_bytes(tensor) for tensor in part._weight_bias() if tensor is not None)
    return total


def _bytes(tensor: Any) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
    return int(tensor.numel() * tensor.element_size())
