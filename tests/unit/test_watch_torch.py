"""What a running program does wrong, seen while it runs. Real models and loops on the CPU; each case is a small one."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from headrace.errors import SetupError
from headrace.profiling.finding import Finding
from headrace.profiling.watch import Watch, watch_torch

STEPS = 30


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Whatever a test does, torch is as it was."""
    before = surface()
    yield
    assert surface() == before


def surface() -> dict[str, Any]:
    """Everything that a watch replaces, and all else in the same places."""
    owners = (
        torch.Tensor,
        nn.Module,
        torch.cuda,
        torch.mps,
        torch.xpu,
        torch.utils.data.dataloader._BaseDataLoaderIter,
    )
    found = {f"{owner}.{name}": value for owner in owners for name, value in vars(owner).items()}
    # (what the compiler hangs on modules when it is first used stays there: it counts them by their generation)
    theirs = ("__init__", "__setstate__", "___needs_generation_tag_patch")
    found = {name: value for name, value in found.items() if callable(value) and not name.endswith(theirs)}
    return {**found, "compile": torch.compile, "warnings": warnings.showwarning, "gc": list(gc.callbacks)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Training:
    """A model in training."""

    def __init__(self) -> None:
        self.net = Net()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.net.parameters(), foreach=False)
        self.x, self.y = torch.randn(6, 4), torch.randint(0, 2, (6,))

    def step(self) -> torch.Tensor:
        loss = self.criterion(self.net(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss


@pytest.fixture
def training() -> Training:
    return Training()


def line_of(mark: str) -> int:
    """The line of this file that ends in a comment."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return found


def only(watch: Watch) -> Finding:
    (found,) = watch.findings
    assert found.file == __file__
    assert found.title
    assert found.advice
    assert any(each.isdigit() for each in found.evidence)
    return found


def test_a_clean_training_loop_gives_nothing(training: Training) -> None:
    data = TensorDataset(torch.randn(120, 4), torch.randint(0, 2, (120,)))
    # Without a backward, a net as small as this waits for six items longer than it takes for them: a finding.
    loader, evaluated = DataLoader(data, batch_size=6), DataLoader(data, batch_size=60)
    total = torch.zeros(())
    with watch_torch() as watch:
        for _ in range(3):
            training.net.train()
            for step, (x, y) in enumerate(loader):
                loss = training.criterion(training.net(x), y)
                training.optimizer.zero_grad()
                loss.backward()
                training.optimizer.step()
                total += loss.detach()
                if step % 10 == 0:
                    print(f"loss {total.item() / (step + 1):.3f}", loss)
            training.net.eval()
            with torch.no_grad():
                hits = [(training.net(x).argmax(-1) == y).sum() for x, y in evaluated]
            assert torch.stack(hits).sum().item() >= 0
    assert watch.findings == []
    assert watch.steps == 60
    assert 0 < watch.seconds < 30


def test_a_clean_serving_loop_gives_nothing() -> None:
    net = Net().eval()
    with watch_torch() as watch, torch.inference_mode():
        for _ in range(STEPS):
            answer = net(torch.randn(3, 4)).argmax(-1)
            assert len(answer.cpu().tolist()) == 3
    assert watch.findings == []
    assert watch.steps == STEPS


def test_gradients_that_are_gathered_over_steps_are_needed(training: Training) -> None:
    with watch_torch() as watch:
        for _ in range(STEPS):
            parts = [training.criterion(training.net(training.x), training.y) for _ in range(4)]
            sum(parts).backward()
    assert watch.findings == []


def test_an_episode_keeps_its_graphs_until_its_end(training: Training) -> None:
    saved: list[torch.Tensor] = []
    with watch_torch() as watch:
        for _ in range(15):
            saved += [training.net(training.x).log_softmax(-1)[:, 0].mean() for _ in range(20)]
            torch.stack(saved).sum().backward()
            saved.clear()
    assert watch.findings == []


def test_a_model_that_only_makes_what_another_learns_from_may_be_in_train_mode() -> None:
    generator, critic = Net(), nn.Linear(2, 1)
    with watch_torch() as watch:
        for _ in range(STEPS):
            with torch.no_grad():
                made = generator(torch.randn(6, 4))
            critic(made).mean().backward()
            critic(generator(torch.randn(6, 4))).mean().backward()
    assert watch.findings == []


def test_a_checkpoint_that_computes_again_is_no_forward(training: Training) -> None:
    with watch_torch() as watch:
        for _ in range(STEPS):
            out = checkpoint(training.net.layers, training.x, use_reentrant=False)
            training.criterion(out, training.y).backward()
    assert watch.findings == []


def test_syncs_of_the_library_are_not_the_users(training: Training) -> None:
    with watch_torch() as watch:
        for _ in range(STEPS):
            training.step()  # Adam looks at its step count by .item()
    assert watch.findings == []


def test_a_loss_in_a_list_is_found_with_the_list(training: Training) -> None:
    losses = []
    with watch_torch() as watch:
        for _ in range(STEPS):
            loss = training.criterion(training.net(training.x), training.y)
            loss.backward()  # kept in a list
            losses.append(loss)
    found = only(watch)
    assert (found.code, found.severity, found.line) == ("graph_kept", "warning", line_of("kept in a list"))
    assert f"{STEPS - 1} of {STEPS - 1} graphs" in found.evidence
    assert "losses" in found.evidence


def test_a_list_that_is_gone_at_the_end_was_there(training: Training) -> None:
    def train() -> None:
        losses = [training.step() for _ in range(STEPS)]
        assert losses

    with watch_torch() as watch:
        train()
    assert only(watch).code == "graph_kept"


def test_a_sum_of_losses_is_found(training: Training) -> None:
    total: Any = 0.0
    with watch_torch() as watch:
        for _ in range(STEPS):
            loss = training.criterion(training.net(training.x), training.y)
            loss.backward()  # summed
            total += loss
            del loss
    found = only(watch)
    assert (found.code, found.line) == ("graph_kept", line_of("summed"))
    assert "another tensor" in found.evidence


def test_graphs_of_a_program_without_modules_are_followed_from_their_backward() -> None:
    weights = torch.randn(4, requires_grad=True)
    kept = []
    with watch_torch() as watch:
        for _ in range(STEPS):
            loss = (weights * torch.randn(4)).sum()
            loss.backward()  # plain tensors
            kept.append(loss)
    assert only(watch).line == line_of("plain tensors")


def test_outputs_kept_by_an_evaluation_are_found_with_their_gradients() -> None:
    net = Net().eval()
    outputs = []
    with watch_torch() as watch:
        for _ in range(STEPS):
            outputs += [net(torch.randn(3, 4))]  # kept outputs
    found = only(watch)
    assert (found.code, found.line) == ("graph_kept", line_of("kept outputs"))
    assert "no backward" in found.evidence
    assert "outputs" in found.evidence


def test_a_forward_with_gradients_that_nobody_uses_is_found() -> None:
    net = Net().eval()
    with watch_torch() as watch:
        for _ in range(STEPS):
            net(torch.randn(3, 4)).argmax(-1)  # with gradients
    found = only(watch)
    assert (found.code, found.severity, found.line) == ("grad_in_inference", "warning", line_of("with gradients"))
    assert found.evidence == f"{STEPS} of {STEPS} forwards built a graph, 0 were used"


def test_an_evaluation_with_gradients_beside_a_training_is_found(training: Training) -> None:
    with watch_torch() as watch:
        for _ in range(STEPS):
            training.step()
            training.net.eval()
            training.net(training.x).argmax(-1)  # validation
            training.net.train()
    assert (only(watch).code, only(watch).line) == ("grad_in_inference", line_of("validation"))


def test_a_frozen_model_builds_no_graph() -> None:
    net = Net().eval().requires_grad_(False)
    with watch_torch() as watch:
        for _ in range(STEPS):
            net(torch.randn(3, 4))
    assert watch.findings == []


def test_a_gradient_that_is_asked_for_is_used() -> None:
    net = Net().eval()
    with watch_torch() as watch:
        for _ in range(STEPS):
            x = torch.randn(3, 4, requires_grad=True)
            torch.autograd.grad(net(x).sum(), x)
    assert watch.findings == []


def test_any_output_of_a_model_may_be_the_one_that_is_used() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"unused": self.a(x), "used": (self.b(x),)}

    two = Two()
    with watch_torch() as watch:
        for _ in range(STEPS):
            two(torch.randn(3, 4))["used"][0].sum().backward()
    assert watch.findings == []


def test_inference_in_train_mode_is_found_with_what_is_on() -> None:
    net = Net()
    with watch_torch() as watch, torch.no_grad():
        for _ in range(STEPS):
            net(torch.randn(3, 4))  # in train mode
    found = only(watch)
    assert (found.code, found.severity, found.line) == (
        "train_mode_in_inference",
        "warning",
        line_of("in train mode"),
    )
    assert found.evidence.startswith(f"{STEPS} of {STEPS} forwards")
    assert "1 BatchNorm1d, 1 Dropout" in found.evidence


def test_train_mode_of_a_model_without_modes_is_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    with watch_torch() as watch, torch.no_grad():
        for _ in range(STEPS):
            net(torch.randn(3, 4))
    assert watch.findings == []


def test_a_sync_in_every_step_is_found_once_for_its_line(training: Training) -> None:
    total = 0.0
    with watch_torch() as watch:
        for _ in range(STEPS):
            loss = training.step()
            total += loss.item()  # every step
    found = only(watch)
    assert (found.code, found.severity, found.line) == ("sync_in_loop", "info", line_of("every step"))
    assert found.evidence == f"{STEPS} calls in {STEPS} steps, on the CPU"
    assert ".item()" in found.title


def test_number_by_number_is_more_than_a_result() -> None:
    net = Net().eval()
    with watch_torch() as watch, torch.inference_mode():
        for _ in range(STEPS):
            answer = net(torch.randn(3, 4)).argmax(-1)
            assert len([each.item() for each in answer]) == 3  # one by one
    found = only(watch)
    assert (found.code, found.line) == ("sync_in_loop", line_of("one by one"))
    assert found.evidence == f"{3 * STEPS} calls in {STEPS} steps, on the CPU"


@pytest.mark.parametrize(
    ("fetch", "words"),
    [
        (lambda t: t.item(), ".item()"),
        (lambda t: t.cpu(), ".cpu()"),
        (lambda t: t.tolist(), ".tolist()"),
        (lambda t: float(t), "float()"),
        (lambda t: int(t), "int()"),
        (lambda t: bool(t), "if tensor"),
        (lambda t: [0, 1, 2][t.long() * 0], "as an index"),
        (lambda t: print(t), "print()"),
        (lambda t: f"{t:.2f}", "f-string"),
    ],
)
def test_every_way_to_fetch_a_number_counts(fetch: Callable[[torch.Tensor], Any], words: str) -> None:
    tensor = torch.tensor(1.0)
    with watch_torch() as watch:
        for _ in range(STEPS):
            fetch(tensor)
    assert words in only(watch).title
    assert only(watch).evidence.startswith(f"{STEPS} calls")


def test_what_is_free_on_the_host_does_not_count() -> None:
    tensor = torch.ones(3)
    with watch_torch() as watch:
        for _ in range(STEPS):
            tensor.numpy()
            tensor.to("cpu")
            tensor.nonzero()
    assert watch.findings == []


def test_few_calls_are_nothing_unless_few_are_asked_for() -> None:
    tensor = torch.ones(())
    with watch_torch() as watch:
        for _ in range(STEPS):
            tensor.item()
            assert len(watch.findings) == (len(watch.findings) > 0)
    assert len(watch.findings) == 1
    with watch_torch(min_calls=STEPS + 1) as watch:
        for _ in range(STEPS):
            tensor.item()
    assert watch.findings == []


def test_emptying_the_cache_in_every_step_is_found(training: Training) -> None:
    with watch_torch() as watch:
        for _ in range(STEPS):
            training.step()
            torch.cuda.empty_cache()  # emptied
    found = only(watch)
    assert (found.code, found.line) == ("empty_cache_in_loop", line_of("emptied"))
    assert found.evidence == f"{STEPS} calls in {STEPS} steps"


def test_emptying_the_cache_now_and_then_is_nothing(training: Training) -> None:
    with watch_torch() as watch:
        for step in range(STEPS):
            training.step()
            if step % 10 == 0:
                torch.cuda.empty_cache()
    assert watch.findings == []


def test_outputs_in_a_cycle_are_found() -> None:
    net = Net().eval()

    class Request:
        def answer(self) -> None:
            self.output = net(torch.randn(3, 4))  # in a cycle
            self.again = lambda: self.output

    gc.collect()
    gc.disable()
    try:
        with watch_torch() as watch, torch.inference_mode():
            for _ in range(STEPS):
                Request().answer()
    finally:
        gc.enable()
    found = only(watch)
    assert (found.code, found.line) == ("cycle_holds_tensors", line_of("in a cycle"))
    assert found.evidence.startswith(f"{STEPS} of {STEPS}")


class Slow(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.003)
        return torch.ones(4)


def test_a_loop_that_waits_for_its_data_is_found() -> None:
    net = nn.Linear(4, 2)
    with watch_torch() as watch:
        for x in DataLoader(Slow(), batch_size=2):  # waits
            net(x).sum().backward()
    found = only(watch)
    assert (found.code, found.severity, found.line) == ("input_bound", "warning", line_of("waits"))
    assert "14 batches, 0 workers" in found.evidence


def test_a_loop_whose_steps_take_longer_than_its_data_is_not() -> None:
    net = nn.Linear(4, 2)
    with watch_torch() as watch:
        for x in DataLoader(Slow(), batch_size=2):
            net(x).sum().backward()
            time.sleep(0.03)
    assert watch.findings == []


def test_another_threads_work_is_seen() -> None:
    net = Net().eval()

    def serve() -> None:
        for _ in range(STEPS):
            net(torch.randn(3, 4))  # in a thread

    with watch_torch() as watch:
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    assert (only(watch).code, only(watch).line) == ("grad_in_inference", line_of("in a thread"))


def test_a_second_watch_is_refused_and_the_first_goes_on() -> None:
    tensor = torch.ones(())
    with watch_torch() as watch:
        with pytest.raises(SetupError, match="active already"), watch_torch():
            pass
        for _ in range(STEPS):
            tensor.item()
    assert len(watch.findings) == 1
    with watch_torch() as again:
        pass
    assert again.findings == []


def test_an_exception_goes_through_and_everything_is_put_back() -> None:
    tensor = torch.ones(())

    def fail() -> None:
        with watch_torch() as watch:
            seen.append(watch)
            for _ in range(STEPS):
                tensor.item()
            raise KeyError("the user's own")

    seen: list[Watch] = []
    before = surface()
    with pytest.raises(KeyError, match="the user's own"):
        fail()
    assert surface() == before
    assert [each.code for each in seen[0].findings] == ["sync_in_loop"]


def test_an_error_of_the_models_is_the_models() -> None:
    with watch_torch() as watch, torch.inference_mode():
        net = Net().eval()
        with pytest.raises(RuntimeError, match="shapes"):
            net(torch.randn(3, 5))
        with pytest.raises(RuntimeError):
            torch.ones(2).item()
        for _ in range(STEPS):
            net(torch.randn(3, 4))
    assert watch.findings == []
    assert watch.steps == STEPS


def test_what_somebody_else_has_patched_meanwhile_stays() -> None:
    calls = []
    with watch_torch():
        ours = torch.Tensor.item

        def theirs(tensor: torch.Tensor) -> Any:
            calls.append(tensor)
            return ours(tensor)

        torch.Tensor.item = theirs  # type: ignore[method-assign]
    assert torch.Tensor.item is theirs
    assert torch.ones(()).item() == 1.0
    assert len(calls) == 1
    del torch.Tensor.item


def test_numbers_and_gradients_are_those_without_a_watch() -> None:
    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        training = Training()
        for _ in range(5):
            training.step()
        return [each.detach().clone() for each in training.net.parameters()]

    plain = train()
    with watch_torch():
        watched = train()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_the_compiler_meets_torch_as_it_is() -> None:
    """Whole graphs stay whole, nothing is warned of, and what runs outside of them is counted."""
    torch._dynamo.reset()
    net = Net().eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)

    @torch.compile(backend="eager")
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    with watch_torch() as watch, torch.inference_mode():
        late = torch.compile(net.layers, backend="eager", fullgraph=True)
        for _ in range(STEPS):
            x = torch.ones(3, 4)
            assert torch.equal(compiled(x), net(x))
            assert torch.equal(late(x), net(x))
            assert torch.equal(branches(x), x * 2)
    assert {each.code for each in watch.findings} <= {"sync_in_loop"}
    assert torch._dynamo.callback.callback_handler.start_callbacks == []
    assert torch._dynamo.callback.callback_handler.end_callbacks == []
    torch._dynamo.reset()
