"""The rungs: what each is, what it needs, how it is built.

Torch rungs are recipes applied when the model is loaded (`runners/recipes.py`); the others are exported to files once.
`probe` runs in the ladder's own process and imports nothing heavy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.artifact import Engine
from headrace.errors import ConfigError
from headrace.runners.recipe_words import AROUND, GRAPHS

Probe = Callable[["Machine"], str]


class Machine(msgspec.Struct, frozen=True):
    """What the ladder runs on.

    Args:
        flags: instruction sets of the processor.
        packages: versions of what is installed.
        device: cpu or cuda:N; ``capability`` is the GPU's, such as 9.0.
        bandwidth: bytes per second that are read where weights lie; 0 if that was not measured.
        operations_per_s: of large products, float32 on a CPU and bfloat16 on a GPU; 0 if that was not measured.
    """

    device: str
    threads: int
    flags: list[str]
    packages: dict[str, str]
    capability: float = 0.0
    gpu: str = ""
    processor: str = ""
    python: str = ""
    memory_bytes: int = 0
    bandwidth: float = 0.0
    operations_per_s: float = 0.0


# Of a linear layer's weight, with the scales of its blocks: torchao's blocks of 128 have a scale and a zero of 16 bits;
# NF4's of 64 have a scale of 8 bits, and 256 of those one of 32; ONNX Runtime's of 32 have a scale of 32 bits.
BITS = {
    "torch-int8-dynamic": 8.0,
    "torchao-int8": 8.0,
    "torchao-int8-weights": 8.0,
    "torchao-int4": 4 + 32 / 128,
    "nf4": 4 + 8 / 64 + 32 / (64 * 256),
    "fp8": 8.0,
}


@dataclass(frozen=True)
class Rung:
    """One way to run the model.

    Args:
        recipe: for the torch module before it is run or exported.
        options: for the build, by engine.
        needs: packages to be installed, with the extra that brings them.
        where: cpu, cuda or both.
        probe: a reason why it cannot be built here, or nothing.
        calibrated: it is built with samples.
        builders: packages that are needed to build it and not to run it.
    """

    id: str
    engine: Engine = "torch"
    recipe: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    needs: Sequence[tuple[str, str]] = ()
    where: Literal["cpu", "cuda", "both"] = "both"
    probe: Probe = lambda machine: ""
    calibrated: bool = False
    builders: Sequence[tuple[str, str]] = ()

    @property
    def run_by(self) -> list[str]:
        """Words of the recipe by which it is run once it is built, in the ladder and as an artifact."""
        return [word for word in self.recipe if self.engine == "torch" or word in AROUND]

    @property
    def halved(self) -> bool:
        """Whether it computes in floats of 16 bits."""
        return not {"bf16", "fp16"}.isdisjoint(self.recipe)

    @property
    def quantized(self) -> bool:
        """Whether weights, at least, have 8 bits or fewer."""
        return not BITS.keys().isdisjoint(self.recipe) or bool(self.options.get("quantize"))

    def missing(self, machine: Machine) -> str:
        """Why it cannot be built on this machine, with what to do; empty if it can."""
        kind = "cpu" if machine.device == "cpu" else "cuda"
        if self.where not in ("both", kind):
            return f"runs on {'a CPU' if self.where == 'cpu' else 'an NVIDIA GPU'} only"
        for package, extra in (*self.needs, *self.builders):
            if package not in machine.packages:
                return f"{package} is not installed: pip install 'headrace[{extra}]'"
        return self.probe(machine)


def _capability(least: float, what: str) -> Probe:
    def probe(machine: Machine) -> str:
        if machine.capability >= least:
            return ""
        return f"{what} need a GPU of compute capability {least}, this one has {machine.capability}"

    return probe


def multiplies_integers(flags: Iterable[str]) -> bool:
    """Whether an x86-64 processor has instructions that add products of 8-bit integers in 32 bits."""
    return any("vnni" in flag or "amx_int8" in flag for flag in flags)


def saves_a_bit(flags: Iterable[str]) -> bool:
    """Whether one side of a product of 8-bit integers gets 7 bits only.

    x86-64 processors without those instructions add two products in 16 bits: with 8 bits on both sides that can
    overflow, perhaps on other inputs than those that drift is measured on. On all-MiniLM-L6-v2 the bit costs a mean
    cosine of .001 to .002.
    """
    flags = set(flags)
    return "x86_64" in flags and not multiplies_integers(flags)


def _int8_instructions(machine: Machine) -> str:
    """torchao's integer products without these are 6 to 26 times slower than float32."""
    if machine.device != "cpu" or multiplies_integers(machine.flags):
        return ""
    return "needs VNNI or AMX instructions, or a GPU: without them its integer products are slower than float32"


def _compiler(machine: Machine) -> str:
    """What torch compiles for a CPU is C++."""
    return _any_compiler(machine) if machine.device == "cpu" else ""


def _any_compiler(machine: Machine) -> str:
    """A package's own code is C++ on every device."""
    program = os.environ.get("CXX", "g++")
    return "" if shutil.which(program) else f"there is no C++ compiler, {program}: apt install g++"


def _x86_compiler(machine: Machine) -> str:
    if "avx2" not in machine.flags:
        return "torch quantises calibrated products for x86-64 processors with AVX2 alone"
    return _compiler(machine)


def _tensorrt(machine: Machine) -> str:
    if "tensorrt-libs" not in machine.packages:
        return "the TensorRT builder library cannot be imported: pip install 'headrace[tensorrt]'"
    return ""


_ONNX = (("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx"))
_QUANT = (("torchao", "quant"),)
# What x86-64-v3 is, as Linux names it: processors since 2013 (Intel) and 2015 (AMD). Code that is compiled for a CPU is
# for these. On all-MiniLM-L6-v2 and a processor with AVX-512 it was as fast as code for that processor alone.
PORTABLE = frozenset({"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})

# In the order in which they are tried on a CPU: what costs little and gives much comes first.
_ALL = [
    Rung("fp32"),
    Rung("sdpa", recipe=["sdpa"]),
    Rung("packed", recipe=["sdpa", "packed"]),
    Rung("tf32", recipe=["sdpa", "tf32"], where="cuda", probe=_capability(8.0, "TF32 products")),
    Rung("bf16", recipe=["sdpa", "bf16"]),
    Rung("fp16", recipe=["sdpa", "fp16"]),
    Rung("ort", "onnx", needs=_ONNX),
    # Of two that are as fast the first is chosen: where scales are constants an answer does not depend on its batch.
    Rung("ort-int8-static", "onnx", options={"quantize": "static"}, needs=_ONNX, where="cpu", calibrated=True),
    Rung("ort-int8-dynamic", "onnx", options={"quantize": "dynamic"}, needs=_ONNX, where="cpu", calibrated=True),
    Rung("ort-int8-weights", "onnx", options={"quantize": "weights", "bits": 8}, needs=_ONNX, where="cpu"),
    Rung("ort-int4-weights", "onnx", options={"quantize": "weights", "bits": 4}, needs=_ONNX, where="cpu"),
    Rung("openvino", "openvino", needs=[("openvino", "openvino")], where="cpu"),
    Rung(
        "openvino-int8-static",
        "openvino",
        options={"quantize": "static"},
        needs=[("openvino", "openvino")],
        where="cpu",
        calibrated=True,
        builders=[("nncf", "openvino")],
    ),
    Rung(
        "torch-int8-static",
        "aot",
        recipe=["sdpa"],
        options={"quantize": "static"},
        where="cpu",
        probe=_x86_compiler,
        calibrated=True,
        builders=_QUANT,
    ),
    Rung(
        "flash",
        recipe=["flash", "bf16"],
        needs=[("flash_attn", "flash")],
        where="cuda",
        probe=_capability(8.0, "FlashAttention's kernels"),
    ),
    Rung("torch-int8-dynamic", recipe=["torch-int8-dynamic"], where="cpu"),
    Rung("torchao-int8", recipe=["sdpa", "torchao-int8"], needs=_QUANT, probe=_int8_instructions),
    Rung("torchao-int8-weights", recipe=["sdpa", "torchao-int8-weights"], needs=_QUANT),
    Rung("torchao-int4", recipe=["sdpa", "bf16", "torchao-int4"], needs=_QUANT, where="cuda"),
    Rung("nf4", recipe=["sdpa", "nf4"], needs=[("bitsandbytes", "quant")]),
    Rung(
        "fp8",
        recipe=["sdpa", "bf16", "fp8", "regional", "graphs"],
        needs=_QUANT,
        where="cuda",
        probe=_capability(8.9, "8-bit floats"),
    ),
    Rung("aot", "aot", recipe=["sdpa"], probe=_any_compiler),
    Rung("compile", recipe=["sdpa", "compile"], probe=_compiler),
    Rung("regional", recipe=["sdpa", "regional"], probe=_compiler),
    Rung("kv-off", recipe=["kv-off"]),
    Rung("kv-static", recipe=["sdpa", "kv-static"]),
    Rung("graphs", recipe=["sdpa", "graphs"], where="cuda"),
    Rung("varlen", recipe=["bf16", "varlen", "graphs"], where="cuda", probe=_capability(8.0, "varlen attention")),
    Rung("reduce-overhead", recipe=["sdpa", "reduce-overhead"], where="cuda"),
    Rung("max-autotune", recipe=["sdpa", "max-autotune"], where="cuda"),
    Rung("tensorrt", "aot", needs=[("torch_tensorrt", "tensorrt")], where="cuda", probe=_tensorrt),
]
RUNGS = {rung.id: rung for rung in _ALL}
BASELINE = "fp32"
_ON_CPU = [
    *("sdpa", "packed", "ort", "ort-int8-static", "ort-int8-static+packed", "ort-int8-dynamic", "openvino"),
    *("openvino-int8-static", "torch-int8-dynamic", "bf16", "torchao-int8", "torchao-int8-weights", "nf4", "aot"),
    *("torch-int8-static", "compile", "tensorrt"),
]
_ON_CUDA = [
    *("sdpa", "tf32", "bf16", "flash", "fp16", "packed"),
    *("reduce-overhead", "bf16+reduce-overhead", "fp16+reduce-overhead"),
    *("bf16+graphs", "bf16+compile+graphs", "bf16+regional+graphs", "varlen", "varlen+compile", "bf16+aot+graphs"),
    # In 8 bits layers are compiled one for all: as a whole it took over 150 s on an H100 (torch 2.11).
    *("fp8", "bf16+torchao-int8+regional+graphs", "torchao-int4", "nf4", "ort", "tensorrt"),
]


# Language models. What is written token by token is bound by reading weights: fewer bytes, and nothing in between.
_WRITING_ON_CPU = [
    *("sdpa", "kv-off", "kv-static", "ort", "ort-int8-weights", "ort-int4-weights", "ort-int8-dynamic"),
    *("torch-int8-dynamic", "bf16", "torchao-int8-weights", "nf4"),
]
_WRITING_ON_CUDA = [
    *("sdpa", "kv-off", "bf16", "flash", "bf16+kv-static", "bf16+kv-static+graphs", "bf16+kv-static+compile+graphs"),
    *("bf16+torchao-int8-weights+kv-static+compile+graphs", "torchao-int4+kv-static+compile+graphs", "nf4"),
]


def usual(device: str, task: str) -> list[str]:
    """What is tried where nobody names rungs, in order."""
    if task == "generate":
        return _WRITING_ON_CPU if device == "cpu" else _WRITING_ON_CUDA
    return _ON_CPU if device == "cpu" else _ON_CUDA


def find(ident: str) -> Rung:
    """A rung by its id, or several joined by ``+``: ``bf16+compile``.

    Raises:
        ConfigError: there is no such rung, or two that exclude one another are joined.
    """
    parts = [_one(each, ident) for each in ident.split("+")]
    if len(parts) == 1:
        return parts[0]
    engines = [part for part in parts if part.engine != "torch"]
    if len(engines) > 1:
        raise ConfigError(f"{ident} joins two ways to run a model", field="rungs", hint="one of them at most")
    last = engines[0] if engines else parts[0]
    places = {part.where for part in parts} - {"both"}
    if len(places) > 1:
        raise ConfigError(f"{ident} joins what runs on a CPU with what runs on a GPU", field="rungs")
    words = [word for part in parts for word in part.recipe]
    if GRAPHS in words and last.engine not in ("torch", "aot"):
        raise ConfigError(f"{ident} would capture what torch does not run", field="rungs", hint="aot+graphs")
    return Rung(
        ident,
        last.engine,
        _in_order(words),
        {name: value for part in parts for name, value in part.options.items()},
        [need for part in parts for need in part.needs],
        next(iter(places), "both"),
        lambda machine: next((reason for part in parts if (reason := part.probe(machine))), ""),
        any(part.calibrated for part in parts),
        [need for part in parts for need in part.builders],
    )


def after_crash(rung: Rung) -> str:
    """What to try where a rung's process was killed.

    A C++ compiler with a library of its own (linked statically, say) makes packages that torch cannot load: on such a
    machine torch 2.11's loader ended with SIGSEGV for a single linear layer.
    """
    compiler = os.environ.get("CXX", "")
    if rung.engine != "aot" or compiler in ("", "g++"):
        return ""
    return f"; it was compiled by CXX={compiler}, whose C++ library may not go with torch's: try CXX=g++"


def _in_order(words: list[str]) -> list[str]:
    """Attention first, then precision, then quantisation, compilation last."""
    order = ["sdpa", "flash", "tf32", "bf16", "fp16", "torch-int8-dynamic", "torchao-int8", "torchao-int8-weights"]
    order += [
        "torchao-int4",
        "nf4",
        "fp8",
        "kv-off",
        "kv-static",
        "varlen",
        "compile",
        "regional",
        "reduce-overhead",
        "max-autotune",
        "graphs",
        "packed",
    ]
    return sorted(dict.fromkeys(words), key=order.index)


def _one(ident: str, whole: str) -> Rung:
    rung = RUNGS.get(ident)
    if rung is None:
        raise ConfigError(f"there is no rung {ident!r} in {whole!r}", field="rungs", hint=", ".join(RUNGS))
    return rung


def directory_of(work: Path, ident: str) -> Path:
    """Where a rung's files lie."""
    return work / "rungs" / ident
