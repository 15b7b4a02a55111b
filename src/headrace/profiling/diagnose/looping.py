"""Code that keeps an event loop from everything else: in general, and tokenising in particular."""

from __future__ import annotations

from collections import defaultdict

from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent, times
from headrace.profiling.diagnose.kinds import TOKENISING, weighted_spots, weights
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import SURELY, enough, is_loop, is_users, of_task, on_loop, place, surely, total_s
from headrace.profiling.record import Block, Record

BLOCK_S = 0.05
# One block of 60 ms is nothing, nor are two in a minute; once it is a quarter of a second somebody has noticed.
_LEAST_SHARE = 0.02
_LONG_S = 0.25
_NEARLY_ALL = 0.9


@once
def tokenising(record: Record) -> list[Claim]:
    """A tokeniser runs on the loop for a tenth of the time or more."""
    if not enough(record):
        return []
    part = {
        number: weight for number, weight in weights(record, TOKENISING).items() if on_loop(record, record.cpu[number])
    }
    where = weighted_spots(record, part)
    share = sum(spot.seconds for spot in where) / total_s(record)
    if share < TOKENISING.floor or surely(record, share) < SURELY * TOKENISING.floor:
        return []
    spot = where[0]
    blocks = [block for block in record.blocks if spot.frame in block.frames]
    longest = f"; it held the loop for up to {duration(max(each.seconds for each in blocks))}" if blocks else ""
    finding = Explained(
        TOKENISING.code,
        "warning",
        f"text is tokenised on the event loop, {percent(share)} of the time",
        f"{percent(spot.seconds / total_s(record))} of the time in {place(record, spot.frame, spot.line)} below a "
        f"callback of the loop, {spot.samples} samples{longest}",
        "tokenise in a thread (`await asyncio.to_thread(tokenizer.encode_batch, texts)`; the Rust tokenizers let go of "
        "the GIL), several texts at a time",
        record.frames[spot.frame].file,
        spot.line,
        share=share,
    )
    return [Claim(finding, part)]


@once
def blocked(record: Record) -> list[Claim]:
    """A callback ran for more than 50 ms while other tasks waited."""
    taken = {(claim.finding.file, claim.finding.line) for claim in tokenising(record)}
    starts: dict[int, list[Block]] = defaultdict(list)
    for block in record.blocks:
        mine = _mine(record, block)
        if block.seconds > BLOCK_S and mine and _others_wait(record, block.frames[mine[0]]):
            starts[block.frames[mine[0]]].append(block)
    found = []
    for blocks in starts.values():
        frame, line = _common(record, blocks)
        share = min(1.0, sum(block.seconds for block in blocks) / record.wall_s)
        longest = max(block.seconds for block in blocks)
        known = (record.frames[frame].file, line) in taken
        if not known and ((len(blocks) > 1 and share >= _LEAST_SHARE) or longest >= _LONG_S):
            found.append(Claim(_finding(record, frame, line, blocks, share), _stacks_of(record, frame)))
    return found


def _mine(record: Record, block: Block) -> list[int]:
    """Positions of the user's functions below the loop, the outermost first."""
    looping = [position for position, frame in enumerate(block.frames) if is_loop(record.frames[frame])]
    start = looping[-1] + 1 if looping else 0
    return [n for n in range(start, len(block.frames)) if is_users(record.frames[block.frames[n]])]


def _others_wait(record: Record, root: int) -> bool:
    """Whether tasks waited beside the one that this function is the start of.

    In a server somebody always does: of its own tasks (leases, connections) a live look just keeps no waits.
    """
    if record.attached:
        return True
    roots: dict[str, set[int]] = defaultdict(set)
    for stack in record.waiting:
        if of_task(record, stack) and stack.seconds >= BLOCK_S:
            roots[stack.owner].add(stack.frames[0])
    return len(roots) >= 2 or any(root not in frames for frames in roots.values())


def _common(record: Record, blocks: list[Block]) -> tuple[int, int]:
    """The innermost function that nearly all of this time was below, and the line there that most of it was at."""
    ways = [[(block.frames[n], block.lines[n]) for n in _mine(record, block)] for block in blocks]
    whole = sum(block.seconds for block in blocks)
    frame, line = ways[0][0]
    for depth in range(max(map(len, ways))):
        functions: dict[int, float] = defaultdict(float)
        lines: dict[tuple[int, int], float] = defaultdict(float)
        for block, way in zip(blocks, ways, strict=True):
            if depth < len(way):
                functions[way[depth][0]] += block.seconds
                lines[way[depth]] += block.seconds
        most = max(functions, key=lambda each: functions[each])
        if functions[most] < _NEARLY_ALL * whole:
            break
        frame, line = max((each for each in lines if each[0] == most), key=lambda each: (each[1] > 0, lines[each]))
    return frame, line


def _finding(record: Record, frame: int, line: int, blocks: list[Block], share: float) -> Explained:
    seconds = [block.seconds for block in blocks]
    return Explained(
        "blocked_loop",
        "warning",
        f"{record.frames[frame].function} keeps the event loop from everything else",
        f"{times(len(blocks))} for more than 50 ms in {place(record, frame, line)}, {duration(max(seconds))} at most, "
        f"{duration(sum(seconds))} in all, {percent(share)} of the run; other tasks wait meanwhile",
        "put what waits into its async form (`asyncio.sleep`, an async client) or into `await asyncio.to_thread(…)`; "
        "put what computes in Python into a process (`ProcessPoolExecutor`), for a thread would share the GIL",
        record.frames[frame].file,
        line,
        share=share,
    )


def _stacks_of(record: Record, frame: int) -> dict[int, float]:
    return {number: 1.0 for number, stack in enumerate(record.cpu) if frame in stack.frames and on_loop(record, stack)}
