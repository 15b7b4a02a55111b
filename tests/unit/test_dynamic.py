from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

import headrace as hr
from headrace.errors import Draining, NotReady
from headrace.testing import FakeRunner


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 25))


class Tiny(torch.nn.Module):
    """Mean of embeddings under the mask: padding shows at once if it is not masked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(100, 4)
        self.sizes: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.sizes.append(len(input_ids))
        assert not torch.is_grad_enabled()
        states = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        logits = states.sum(1) / attention_mask.sum(1, keepdim=True)
        return type("Output", (), {"logits": logits})()


def test_concurrent_calls_are_batched_padded_and_answered_apart() -> None:
    model = Tiny().train()
    items = [torch.randint(1, 100, (length,)) for length in (3, 4, 2, 4)]

    async def main() -> list[torch.Tensor]:
        async with hr.DynamicBatcher(model, max_batch_size=4, device="cpu") as batcher:
            return await asyncio.gather(*(batcher.infer({"input_ids": ids}) for ids in items))

    answers = run(main())
    assert model.sizes == [4]
    assert not model.training
    for ids, answer in zip(items, answers, strict=True):
        assert answer.shape == (4,)
        assert torch.allclose(answer, model.embedding(ids).mean(0), atol=1e-6)


def test_what_a_tokenizer_returns_is_taken_as_it_is() -> None:
    model = Tiny()

    async def main() -> torch.Tensor:
        async with hr.DynamicBatcher(model, max_wait_ms=0, device="cpu") as batcher:
            ids = torch.tensor([[5, 6, 7]])
            return await batcher.infer({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    assert torch.allclose(run(main()), model.embedding(torch.tensor([5, 6, 7])).mean(0), atol=1e-6)


def test_a_function_and_an_object_serve_too() -> None:
    async def main(model: Any) -> list[Any]:
        async with hr.DynamicBatcher(model, max_wait_ms=0) as batcher:
            return await asyncio.gather(*(batcher.infer(i) for i in range(5)))

    assert run(main(lambda inputs: [i + 1 for i in inputs])) == [1, 2, 3, 4, 5]
    assert run(main(FakeRunner(lambda i: i * 10))) == [0, 10, 20, 30, 40]


def test_a_lone_call_waits_for_company_only_so_long() -> None:
    async def main() -> tuple[int, list[list[Any]]]:
        runner = FakeRunner()
        async with hr.DynamicBatcher(runner, max_batch_size=8, max_wait_ms=30) as batcher:
            answer = await batcher.infer(7)
        return answer, runner.batches

    assert run(main()) == (7, [[7]])


def test_one_bad_item_fails_alone() -> None:
    def picky(inputs: list[Any]) -> list[Any]:
        if "bad" in inputs:
            raise ValueError("bad item")
        return inputs

    async def main() -> list[Any]:
        async with hr.DynamicBatcher(picky) as batcher:
            return await asyncio.gather(*(batcher.infer(i) for i in ("a", "bad", "c")), return_exceptions=True)

    first, bad, last = run(main())
    assert (first, last) == ("a", "c")
    assert isinstance(bad, hr.RunnerError)
    assert isinstance(bad.__cause__, ValueError)


def test_before_start_and_after_stop_it_says_so() -> None:
    async def main() -> None:
        batcher = hr.DynamicBatcher(FakeRunner())
        with pytest.raises(NotReady, match="not running"):
            await batcher.infer(1)
        await batcher.start()
        await batcher.start()
        assert await batcher.infer(1) == 1
        await batcher.stop()
        await batcher.stop()
        with pytest.raises(Draining):
            await batcher.infer(1)
        await batcher.start()
        assert await batcher.infer(2) == 2
        await batcher.stop()

    run(main())


def test_stop_answers_what_was_accepted() -> None:
    async def main() -> list[Any]:
        batcher = hr.DynamicBatcher(FakeRunner(), max_batch_size=2, max_wait_ms=10_000)
        await batcher.start()
        calls = [asyncio.ensure_future(batcher.infer(i)) for i in range(5)]
        await asyncio.sleep(0)
        await batcher.stop()
        return await asyncio.gather(*calls)

    assert run(main()) == [0, 1, 2, 3, 4]


def test_bounds_and_deadlines_hold_while_the_model_is_busy() -> None:
    gate = threading.Event()
    ran: list[Any] = []

    def slow(inputs: list[Any]) -> list[Any]:
        ran.extend(inputs)
        gate.wait(10)
        return inputs

    async def main() -> None:
        async with hr.DynamicBatcher(slow, max_batch_size=1, max_wait_ms=0, max_queue=2, timeout_s=0.3) as batcher:
            calls = [asyncio.ensure_future(batcher.infer(0))]
            while not ran:
                await asyncio.sleep(0.01)
            calls += [asyncio.ensure_future(batcher.infer(i)) for i in (1, 2)]
            await asyncio.sleep(0)
            with pytest.raises(hr.Overloaded):
                await batcher.infer(3)
            calls[2].cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(results[0], hr.DeadlineExceeded)
            assert isinstance(results[1], hr.DeadlineExceeded)
            gate.set()

    run(main())
    assert ran == [0], "neither the cancelled nor the late item was run"


def test_a_lost_device_is_told_at_once() -> None:
    class AcceleratorError(RuntimeError):
        pass

    def fails(item: Any) -> Any:
        raise AcceleratorError("CUDA error: device-side assert triggered")

    async def main() -> None:
        async with hr.DynamicBatcher(FakeRunner(fails), device="cpu") as batcher:
            for _ in range(2):
                with pytest.raises(hr.RunnerError, match="device-side assert"):
                    await asyncio.wait_for(batcher.infer("x"), 5)

    run(main())
