"""From a torch program to an AOTInductor package, in float32 or with calibrated 8-bit products.

A package is compiled code with its weights: it is loaded in a fraction of a second, without a compiler and without the
libraries that made it. On an x86-64 CPU the code is for all processors with AVX2 (`rungs.PORTABLE`). That costs nothing
where the time goes into products, as oneDNN chooses its instructions when it runs. Products of integers are portable in
theory only: their weights lie as suits the processor here, and without its instructions oneDNN takes a hundred times as
long. So an artifact of them asks for those too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from headrace.artifact import processor_flags
from headrace.errors import Unavailable
from headrace.optimizing.rungs import PORTABLE, saves_a_bit

# The last spares programs that would only try whether the compiler knows instructions that every one knows.
_FOR_AVX2 = {"cpp.march": "x86-64-v3", "cpp.simdlen": 256, "cpp.vec_isa_ok": True}

Export = Callable[[Any], Any]


def compile_to(program: Any, file: Path, device: str) -> None:
    """Compile an exported program."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings(device))


def settings(device: str) -> dict[str, Any]:
    """Inductor's settings for a package that is to run on a CPU, or on a GPU.

    Weights are laid out for oneDNN once and for all (freezing): without it each call would.
    """
    if device != "cpu":
        return {}
    return {"freezing": True} | (_FOR_AVX2 if processor_flags() >= PORTABLE else {})


def quantized(program: Any, again: Export, batches: Iterable[dict[str, torch.Tensor]]) -> Any:
    """A program whose linear layers compute in 8-bit integers, with scales from real inputs.

    Nothing of it has to be kept beside the package, and nothing is pickled: the scales become constants of the code.

    Args:
        program: in float32, from `torch.export`.
        again: exports a module as the program was exported.
        batches: the real inputs.

    Raises:
        Unavailable: torchao is not installed.
    """
    try:
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except ImportError:
        raise Unavailable("torchao is not installed", hint="pip install 'headrace[quant]'") from None
    module = program.module()
    # A head whose answer nobody reads would be annotated all the same, and has no user to be annotated for.
    module.graph.eliminate_dead_code()
    module.recompile()
    quantizer = x86.X86InductorQuantizer()
    reduced = saves_a_bit(processor_flags())
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=reduced))
    prepared = prepare_pt2e(module, quantizer)
    for batch in batches:
        prepared(**batch)
    return again(convert_pt2e(prepared))
