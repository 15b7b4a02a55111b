from __future__ import annotations

import pytest

from headrace.batcher import PASSES_BASE, WINDOW_ITEMS, Batcher, Entry
from headrace.errors import Overloaded


def entry(key: int, cost: int = 1, arrived: float = 0.0, deadline: float = 1e9) -> Entry:
    return Entry(key, f"item {key}", cost, arrived, deadline)


def keys(batch: list[Entry]) -> list[object]:
    return [each.key for each in batch]


def test_items_of_one_length_run_in_order_of_arrival() -> None:
    room = Batcher(max_batch_size=2)
    for key in range(5):
        room.offer(entry(key))
    assert [keys(room.take(0)[0]) for _ in range(4)] == [[0, 1], [2, 3], [4], []]


def test_the_oldest_runs_with_its_neighbours_in_length() -> None:
    room = Batcher(max_batch_size=3, overhead_tokens=10)
    for key, cost in enumerate([50, 5, 52, 6, 51, 7]):
        room.offer(entry(key, cost))
    assert keys(room.take(0)[0]) == [0, 2, 4]
    assert keys(room.take(0)[0]) == [1, 3, 5]


def test_in_a_long_queue_only_the_oldest_are_compared_by_length() -> None:
    """Whoever is far behind moves up in order of arrival, however well its length would fit into a batch."""
    room = Batcher(max_batch_size=2, overhead_tokens=1)
    lengths = [10, *(50 for _ in range(WINDOW_ITEMS - 1)), 10]
    for key, cost in enumerate(lengths):
        room.offer(entry(key, cost))
    assert keys(room.take(0)[0]) == [0], "the other one of its length is not in the window yet"
    assert keys(room.take(0)[0]) == [1, 2]
    room.cancel(3)
    assert len(room) == len(lengths) - 4
    taken = [key for _ in range(len(lengths)) for key in keys(room.take(0)[0])]
    assert sorted(taken) == list(range(4, len(lengths)))


def test_a_large_overhead_makes_wide_batches_and_a_small_one_narrow() -> None:
    def first_batch(overhead: float) -> list[object]:
        room = Batcher(max_batch_size=8, overhead_tokens=overhead)
        for key, cost in enumerate([10, 12, 60]):
            room.offer(entry(key, cost))
        return keys(room.take(0)[0])

    assert first_batch(1e6) == [0, 1, 2]
    assert first_batch(20) == [0, 1]


def test_padding_counts_against_the_token_budget() -> None:
    room = Batcher(max_batch_tokens=100, overhead_tokens=1e6)
    for key, cost in enumerate([10, 40, 40, 40]):
        room.offer(entry(key, cost))
    assert keys(room.take(0)[0]) == [0, 1]
    assert keys(room.take(0)[0]) == [2, 3]


def test_an_item_over_the_token_budget_runs_alone() -> None:
    room = Batcher(max_batch_tokens=100)
    for key, cost in enumerate([500, 500, 3]):
        room.offer(entry(key, cost))
    assert [keys(room.take(0)[0]) for _ in range(3)] == [[0], [1], [2]]


def test_what_is_late_is_not_computed() -> None:
    room = Batcher()
    room.offer(entry(1, deadline=5.0))
    room.offer(entry(2, deadline=20.0))
    batch, expired = room.take(10.0)
    assert (keys(batch), keys(expired)) == ([2], [1])


def test_what_is_cancelled_is_not_computed() -> None:
    room = Batcher()
    room.offer(entry(1))
    room.offer(entry(2))
    assert room.cancel(1)
    assert not room.cancel(1)
    assert keys(room.take(0)[0]) == [2]


def test_a_full_room_refuses() -> None:
    room = Batcher(capacity=1)
    room.offer(entry(1))
    with pytest.raises(Overloaded):
        room.offer(entry(2))


def test_without_a_wait_a_batch_is_due_at_once_and_with_one_when_full_or_old() -> None:
    assert Batcher().wait_s(0) is None
    at_once = Batcher()
    at_once.offer(entry(1, arrived=3.0))
    assert at_once.wait_s(3.0) == 0
    patient = Batcher(max_batch_size=2, max_wait_s=0.5)
    patient.offer(entry(1, arrived=3.0))
    assert patient.wait_s(3.1) == pytest.approx(0.4)
    assert patient.wait_s(3.6) == 0
    patient.offer(entry(2, arrived=3.1))
    assert patient.wait_s(3.1) == 0


def test_an_overdue_item_goes_before_more_fitting_ones() -> None:
    """A stream of short items would pass a long one by for ever if only the fit counted."""
    room = Batcher(max_batch_size=2, overhead_tokens=1)
    room.offer(entry(0, 10))
    room.offer(entry(1, 500))
    fresh = 2
    for taken in range(PASSES_BASE + 3):
        room.offer(entry(fresh, 10))
        room.offer(entry(fresh + 1, 10))
        fresh += 2
        if 1 in keys(room.take(0)[0]):
            assert taken <= PASSES_BASE + 2
            return
    raise AssertionError("passed over for ever")
