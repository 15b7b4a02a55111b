"""What rungs need, how products are made ready for 8 bits, and what ends a rung that cannot win."""

from __future__ import annotations

import dataclasses
import importlib.util
import runpy
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from conftest import MODELS
from headrace.artifact import Subject, TensorSpec
from headrace.errors import ConfigError, LoadError, Unavailable
from headrace.optimizing import compiled, export, layer, rungs
from headrace.optimizing.child import MACHINE, Job
from headrace.optimizing.choice import simplicity
from headrace.optimizing.export_aot import settings
from headrace.optimizing.pack import requires
from headrace.optimizing.smoothing import smooth
from headrace.runners import collate, engines, recipes

FLAGS = sorted(rungs.PORTABLE | {"avx512f", "avx512_vnni", "x86_64"})
INSTALLED = dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "torchao", "bitsandbytes"), "1")
MACHINE_HERE = rungs.Machine("cpu", 2, FLAGS, INSTALLED)
Attending: Any = runpy.run_path(str(MODELS / "rung_models.py"))["Attending"]
SUBJECT = Subject("module:factory", "logits", [TensorSpec("x", "float32", [0, 32])], activation="none")


def without(*packages: str) -> rungs.Machine:
    left = {name: version for name, version in INSTALLED.items() if name not in packages}
    return msgspec.structs.replace(MACHINE_HERE, packages=left)


def items(count: int = 12, seed: int = 0) -> list[collate.Item]:
    draw = np.random.default_rng(seed)
    return [{"x": draw.normal(size=(size, 32)).astype(np.float32)} for size in draw.integers(4, 20, count)]


def tensors(some: list[collate.Item]) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.from_numpy(item["x"][None])} for item in some]


# ── what they need ──


@pytest.mark.parametrize(
    ("rung", "package", "extra"),
    [
        ("openvino-int8-static", "nncf", "openvino"),
        ("openvino-int8-static", "openvino", "openvino"),
        ("torch-int8-static", "torchao", "quant"),
        ("torch-int8-static+packed", "torchao", "quant"),
        ("ort-int8-static", "onnxscript", "onnx"),
        ("nf4", "bitsandbytes", "quant"),
    ],
)
def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(rung: str, package: str, extra: str) -> None:
    assert rungs.find(rung).missing(without(package)) == f"{package} is not installed: pip install 'headrace[{extra}]'"
    assert rungs.find(rung).missing(MACHINE_HERE) == ""


@pytest.mark.parametrize("rung", ["aot", "compile", "regional", "torch-int8-static", "bf16+compile"])
def test_without_a_compiler_nothing_is_compiled(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert rungs.find(rung).missing(MACHINE_HERE) == "there is no C++ compiler, no-such-compiler: apt install g++"
    assert rungs.find("bf16").missing(MACHINE_HERE) == ""
    card = msgspec.structs.replace(MACHINE_HERE, device="cuda:0")
    assert ("C++" in rungs.find(rung).missing(card)) == (rung == "aot"), "a package's own code is C++ on a GPU too"


@pytest.mark.parametrize(
    ("ident", "words"),
    [
        ("bf16+aot+graphs", ["graphs"]),
        ("ort-int8-static+packed", ["packed"]),
        ("bf16+aot", []),
        ("bf16+compile+graphs", ["sdpa", "bf16", "compile", "graphs"]),
    ],
)
def test_what_was_exported_is_run_by_the_words_that_are_left_to_do(ident: str, words: list[str]) -> None:
    assert rungs.find(ident).run_by == words


@pytest.mark.parametrize(
    ("recipe", "any_shape"),
    [
        (["sdpa", "bf16"], True),
        (["sdpa", "bf16", "compile"], True),
        (["sdpa", "bf16", "compile", "graphs"], False),
        (["sdpa", "bf16", "reduce-overhead"], False),
        (["sdpa", "bf16", "kv-static", "graphs"], True),
    ],
)
def test_attention_that_plans_is_for_few_shapes(recipe: list[str], any_shape: bool) -> None:
    assert recipes.takes_any_shape(recipe) == any_shape


def test_some_integers_are_for_some_processors() -> None:
    arm = msgspec.structs.replace(MACHINE_HERE, flags=["aarch64", "asimddp"])
    assert "AVX2" in rungs.find("torch-int8-static").missing(arm)
    plain = msgspec.structs.replace(MACHINE_HERE, flags=["avx2", "x86_64"])
    assert "VNNI" in rungs.find("torchao-int8").missing(plain)
    for rung in ("torch-int8-static", "ort-int8-static", "torchao-int8-weights"):
        assert rungs.find(rung).missing(plain) == ""
    assert rungs.saves_a_bit(plain.flags)
    assert not rungs.saves_a_bit(FLAGS)
    assert not rungs.saves_a_bit(arm.flags)


def needed(folder: Path, rung: str) -> Any:
    (folder / MACHINE).write_bytes(msgspec.json.encode(MACHINE_HERE))
    return requires(rungs.find(rung), Job(str(folder), "module:factory", "auto", "cpu", 2), SUBJECT)


def test_what_builds_a_package_is_not_needed_to_run_it(tmp_path: Path) -> None:
    assert set(needed(tmp_path, "torch-int8-static").packages) == {"torch"}
    assert "nncf" not in needed(tmp_path, "openvino-int8-static").packages


def test_compiled_code_is_for_every_processor_with_avx2_and_integers_for_those_like_this_one(tmp_path: Path) -> None:
    assert needed(tmp_path, "aot").isa == sorted(rungs.PORTABLE)
    assert needed(tmp_path, "torch-int8-static").isa == sorted(rungs.PORTABLE | {"avx512f", "avx512_vnni"})
    assert settings("cuda") == {}
    assert settings("cpu")["freezing"]


def test_of_two_as_fast_the_one_whose_answers_do_not_depend_on_their_batch_is_chosen() -> None:
    assert simplicity("ort") < simplicity("ort-int8-static") < simplicity("ort-int8-dynamic")


# ── smoothing ──


def test_smoothing_changes_the_layers_and_not_what_they_give() -> None:
    module = Attending().eval()
    some = tensors(items())
    with torch.no_grad():
        before = [module(**each) for each in some]
        assert smooth(module, some) == 4
        for one, other in zip(before, (module(**each) for each in some), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert module.query.inverse is module.key.inverse is module.value.inverse, "one product for all three"
    assert type(module.unused) is torch.nn.Linear, "nobody knows what goes into it"
    x = torch.cat([(each["x"] * module.size).reshape(-1, 32) for each in some]).abs().amax(0)
    smoothed = x * module.query.inverse
    assert smoothed.max() / smoothed.mean() < 0.5 * x.max() / x.mean()


def test_weights_that_belong_to_something_else_too_are_left_alone() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 8)
            self.inner = torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.table(x)))

    module = Tied().eval()
    with torch.no_grad():
        assert smooth(module, [{"x": torch.arange(50)[None]}]) == 1
    assert module.head.weight is module.table.weight
    linear = torch.nn.Linear(4, 4)
    with torch.no_grad():
        assert smooth(linear, [{"input": torch.ones(1, 4)}]) == 0, (
            "it stands in no other module, to be put in its place"
        )


# ── ONNX Runtime's integers ──


def exported(rung: rungs.Rung, directory: Path) -> Path:
    export.export(rung, SUBJECT, Attending().eval(), items(2, seed=1), items(), directory)
    return directory


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(rungs.find("ort-int8-static"), tmp_path_factory.mktemp("static"))


def error(engine: engines.Engine) -> float:
    """Of the answers to items that nothing was calibrated with, each alone."""
    asked = items(9, seed=2)
    with torch.no_grad():
        wanted = [Attending().eval()(**each)[0].numpy() for each in tensors(asked)]
    found = [collate.run(engine, [item], SUBJECT, packed=False)[0] for item in asked]
    each = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)]
    return float(np.mean(each))


def test_integers_give_nearly_what_the_model_gives_and_less_so_without_smoothing(static: Path, tmp_path: Path) -> None:
    rough = exported(dataclasses.replace(rungs.find("ort-int8-static"), calibrated=False), tmp_path)
    engine = engines.open_onnx(static, "cpu", 1)
    assert 0 < error(engine) < min(0.08, 0.4 * error(engines.open_onnx(rough, "cpu", 1)))
    for item in items(2, seed=3):  # scales are constants: what else is in the batch changes nothing
        alone = collate.run(engine, [item], SUBJECT, packed=False)[0]
        twice = collate.run(engine, [item, item], SUBJECT, packed=False)
        np.testing.assert_allclose(twice[1], alone, atol=1e-5)


def test_scales_of_each_batch_give_nearly_what_the_model_gives(tmp_path: Path) -> None:
    assert 0 < error(engines.open_onnx(exported(rungs.find("ort-int8-dynamic"), tmp_path), "cpu", 1)) < 0.08


def test_products_with_weights_are_integers_and_what_they_give_is_not(static: Path) -> None:
    import onnx

    assert [path.name for path in static.iterdir()] == [engines.ONNX_FILE]
    graph = onnx.load(str(static / engines.ONNX_FILE)).graph
    makers = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    quantised = [
        node
        for node in products
        if all(name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input[:2])
    ]
    assert len(quantised) == 4, "query, key, value, out"
    assert len(products) == 6, "and the two of attention, which stay as they are"
    written = {name for node in products for name in node.output}
    assert not [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in written]
    # The three that read one tensor share its multiplication and its rounding.
    assert len({node.input[0] for node in quantised}) == 2


def test_weights_alone_are_quantised_of_language_models(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="language models"):
        exported(rungs.find("ort-int8-weights"), tmp_path)


def test_attention_by_flash_attn_needs_the_package_and_a_gpu_that_its_kernels_are_for() -> None:
    card = msgspec.structs.replace(MACHINE_HERE, device="cuda:0", capability=9.0)
    flash = rungs.find("flash")
    assert flash.missing(MACHINE_HERE) == "runs on an NVIDIA GPU only"
    assert flash.missing(card) == "flash_attn is not installed: pip install 'headrace[flash]'"
    old = msgspec.structs.replace(card, capability=7.5, packages={"flash_attn": "2.8"})
    assert "compute capability 8.0" in flash.missing(old)
    assert flash.missing(msgspec.structs.replace(old, capability=8.0)) == ""


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_what_transformers_refuses_of_attention_is_said() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    with pytest.raises(Unavailable, match="FlashAttention2"):
        recipes.apply(["flash", "bf16"], model, "cpu")


# ── compiled packages ──


def test_a_package_can_be_captured_and_what_torch_does_not_run_cannot() -> None:
    rung = rungs.find("bf16+aot+graphs")
    assert (rung.engine, rung.recipe, rung.where) == ("aot", ["sdpa", "bf16", "graphs"], "cuda")
    with pytest.raises(ConfigError, match=r"ort\+graphs would capture what torch does not run"):
        rungs.find("ort+graphs")


def test_a_crash_of_a_package_names_the_compiler_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "other/g++")
    assert "compiled by CXX=other/g++" in rungs.after_crash(rungs.find("bf16+aot"))
    assert rungs.after_crash(rungs.find("bf16")) == ""
    monkeypatch.setenv("CXX", "g++")  # what it would advise
    assert rungs.after_crash(rungs.find("bf16+aot")) == ""
    monkeypatch.delenv("CXX")
    assert rungs.after_crash(rungs.find("bf16+aot")) == ""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("rung", [pytest.param("aot", marks=pytest.mark.long), "torch-int8-static"])
def test_a_package_is_loaded_as_it_is_and_answers(rung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if rung == "torch-int8-static":
        pytest.importorskip("torchao")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++")
    (tmp_path / "files").mkdir()
    exported(rungs.find(rung), tmp_path / "files")
    assert [path.name for path in (tmp_path / "files").iterdir()] == [engines.AOT_FILE]
    monkeypatch.setenv("PATH", "")  # to load it takes no compiler
    found = error(engines.open_exported("aot", tmp_path / "files", "cpu", 1, SUBJECT))
    assert found < 1e-5 if rung == "aot" else 0 < found < 0.08


# ── layers compiled one for all ──


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.inner:
            x = torch.relu(linear(x)) + x
        return x


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(5))
        self.head = torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of the compiler's own modules
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_repeated_layers_are_compiled_once_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stack = Stack().eval()
    with torch.inference_mode(), compiled.watched(["regional"]) as check:
        x = torch.randn(3, 7, 32)  # what layers are given has been computed
        wanted = stack(x)
        found = recipes.apply(["regional"], stack, "cpu")
        torch.testing.assert_close(found(x), wanted)
        found(torch.randn(5, 11, 32))
        check()
    assert fresh_compiler.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's, of itself and of torch
def test_of_layers_alike_only_they_are_quantised_and_without_any_it_is_said() -> None:
    pytest.importorskip("torchao")
    found = recipes.apply(["torchao-int8-weights", "regional"], Stack(), "cpu")
    plain = {name for name, each in found.named_modules() if type(getattr(each, "weight", 0)) is torch.nn.Parameter}
    assert plain == {"head"}
    with pytest.raises(Unavailable, match="no list of layers that are alike"):
        recipes.apply(["regional"], Attending(), "cpu")


# ── what ends a rung early ──


def test_a_layer_that_is_much_slower_is_told_with_its_numbers() -> None:
    module = Attending().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    told = layer.too_slow(module, ["sdpa", "bf16"], most_slower=0.0)
    assert told.startswith("nothing was built: one layer of 32 × 32 takes ")
    assert "times as long with 16, " in told
    assert told.endswith("with 512 rows as in float32")
    assert layer.too_slow(module, ["sdpa", "bf16"], most_slower=1e9) == ""
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("recipe", [[], ["sdpa"], ["packed"], ["bf16", "compile"]])
def test_of_what_is_no_other_way_to_compute_one_layer_tells_nothing(recipe: list[str]) -> None:
    assert layer.too_slow(Attending(), recipe, most_slower=0.0) == ""
    assert layer.too_slow(torch.nn.Embedding(4, 4), [*recipe, "bf16"], most_slower=0.0) == ""


def test_an_obviously_slower_layer_is_measured_as_one() -> None:
    linear = torch.nn.Linear(64, 64)

    def forty_times(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            y = linear(x)
        return y

    given = torch.randn(64, 64)
    assert layer.ratio(linear, forty_times, given, given) > 5


def test_what_the_compiler_gives_up_on_is_an_error(fresh_compiler: Any) -> None:
    def run() -> None:
        with compiled.watched(["sdpa", "compile"]):
            fresh_compiler.config.recompile_limit = 2
            double = torch.compile(lambda x: x * 2, backend="eager", dynamic=True)
            for dimensions in range(1, 5):
                double(torch.ones([2] * dimensions))

    with pytest.raises(LoadError, match="compiled 2 times for different inputs"):
        run()


def test_what_cannot_be_compiled_at_all_is_an_error_and_the_rest_is_none(fresh_compiler: Any) -> None:
    with compiled.watched(["compile"]) as check:
        with pytest.raises(LoadError, match="nothing of it could be compiled"):
            check()
        torch.compile(lambda x: x * 2, backend="eager")(torch.ones(3))
        check()
    with compiled.watched(["sdpa"]) as check:
        fresh_compiler.utils.counters.clear()
        check()


@pytest.fixture
def fresh_compiler() -> Any:
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
