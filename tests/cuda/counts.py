"""What one dispatch and one combine move and execute, counted while the shipped PTX runs.

`python -m tests.cuda.counts` prints the tables of docs/kernels.md: bytes over NVLink, bytes that
memory reads and writes, instructions, launches and waits, beside what follows for DeepEP from its
published design. Counts need no GPU to be true; they say nothing of time.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import FP8, Fp8Recipe
from ep_megatron.handle import DispatchHandle
from tests.cuda.emulated import Ranks
from tests.routing import Case

_BARRIERS = ("bar.sync", "barrier.sync", "bar.red", "barrier.red", "barrier.cta")
_WAITING = ("ep_notify_kernel", "ep_arrive_kernel")


@dataclass(frozen=True)
class Counts:
    """Of one call, all ranks together, `launches` and after per rank."""

    peer_bytes: int  # rows and what belongs to them, over NVLink
    fixed_bytes: int  # the same, of notify and arrive
    own_bytes: int  # read and written in a rank's own memory by row kernels
    warp_instructions: int  # of row kernels
    scan_instructions: int  # of count and route
    launches: float
    waits: float  # for other ranks
    barriers: float  # of a block, in row kernels


def snapshot(ranks: Ranks) -> dict[str, dict[str, int]]:
    """Return all counts of the kernels so far."""
    counts: dict[str, dict[str, int]] = {
        name: dict(entry) for name, entry in ranks.machine.counts().items()
    }
    for name, entry in ranks.machine.kernels().items():
        executed = entry["opcodes"].items()
        barriers = sum(n for opcode, n in executed if opcode.startswith(_BARRIERS))
        counts.setdefault(name, {})["barriers"] = barriers
    return counts


def counted(ranks: Ranks, call: Callable[..., Any], *args: Any) -> tuple[Counts, list[Any]]:
    """Run a call on all ranks and return what it took."""
    before = snapshot(ranks)
    results = ranks.run(call, *args)
    ranks.machine.run()
    after = snapshot(ranks)

    def total(what: str, choose: Callable[[str], bool]) -> int:
        return sum(
            entry.get(what, 0) - before.get(name, {}).get(what, 0)
            for name, entry in after.items()
            if choose(name)
        )

    def is_waiting(name: str) -> bool:
        return name in _WAITING

    def is_scan(name: str) -> bool:
        return name in ("ep_count_kernel", "ep_route_kernel")

    def moves_rows(name: str) -> bool:
        return name.startswith("ep_") and not is_waiting(name) and not is_scan(name)

    def peer(choose: Callable[[str], bool]) -> int:
        return total("peer_read", choose) + total("peer_written", choose)

    return (
        Counts(
            peer_bytes=peer(moves_rows),
            fixed_bytes=peer(is_waiting),
            own_bytes=total("global_read", moves_rows) + total("global_written", moves_rows),
            warp_instructions=total("warp_instructions", moves_rows),
            scan_instructions=total("warp_instructions", is_scan),
            launches=total("launches", lambda name: name.startswith("ep_")) / ranks.num_ranks,
            waits=total("launches", is_waiting) / ranks.num_ranks,
            barriers=total("barriers", moves_rows) / ranks.num_ranks,
        ),
        results,
    )


def dispatch(
    backend: Backend, _reference: Backend, case: Case, expand: bool, recipe: Fp8Recipe | None
) -> tuple[Rows, DispatchHandle]:
    rank = backend.rank
    rows = Rows(case.x(rank, torch.bfloat16), topk_weights=case.weights(rank), fp8=recipe)
    routing = Routing(case.topk_idx(rank), case.num_experts, expand, case.alignment)
    return backend.dispatch(rows, routing)


def combine(
    backend: Backend, _reference: Backend, received: list[tuple[Rows, DispatchHandle]]
) -> None:
    rows, handle = received[backend.rank]
    if rows.x.dtype == torch.bfloat16:  # FP8 rows are not summed
        backend.combine(Rows(rows.x), handle)


@dataclass(frozen=True)
class Shape:
    """How many rows a routing makes per token, on average; own: that stay on the token's rank."""

    ranks: float  # one per destination rank
    ranks_own: float
    slots: float  # one per token and expert
    slots_own: float

    @staticmethod
    def of(case: Case) -> "Shape":
        """Count."""
        num_tokens = sum(case.num_tokens)
        sums = [0, 0, 0, 0]
        for rank in range(case.num_ranks):
            to = case.topk_idx(rank) // case.experts_per_rank
            to[case.topk_idx(rank) < 0] = -1
            for row in to.tolist():
                used = [other for other in row if other >= 0]
                sums[0] += len(set(used))
                sums[1] += rank in used
                sums[2] += len(used)
                sums[3] += used.count(rank)
        return Shape(*(count / num_tokens for count in sums))


@dataclass(frozen=True)
class Line:
    """A line of a table: per token, bytes in units of one bfloat16 row."""

    name: str
    nvlink: float
    memory: float
    launches: str
    waits: str
    instructions: str = ""

    def text(self) -> str:
        """Return it as a row of Markdown."""
        parts = (f"{self.nvlink:.2f}", f"{self.memory:.2f}", self.launches, self.waits)
        return f"| {' | '.join((self.name, *parts, self.instructions or 'not counted'))} |"


def deepep_dispatch(shape: Shape, row: float, expand: bool) -> list[Line]:
    """Return what DeepEP's dispatch moves by design; `row` is a row as it travels.

    V1: rows are read once per destination, go into a ring there and are copied out of it; another
    kernel lays them by expert. V2: rows are read once, go into fixed places at their destination,
    and an epilogue copies or expands them. Both get FP8 rows that another kernel has cast.
    """
    by_rank, away = shape.ranks * row, (shape.ranks - shape.ranks_own) * row
    cast = 0.0 if row == 1 else 1 + row
    laid = by_rank + shape.slots * row if expand else 0.0
    written = shape.slots * row if expand else by_rank
    num_kernels = (row != 1) + (1 if expand else 0)
    return [
        Line("DeepEP V1", away, cast + 4 * by_rank + laid, f"{3 + num_kernels}", "3 and the ring"),
        Line("DeepEP V2", away, cast + row + 2 * by_rank + written, f"{2 + (row != 1)}", "3"),
    ]


def deepep_combine(shape: Shape, expand: bool) -> list[Line]:
    """Return what DeepEP's combine moves by design.

    V1: another kernel sums a rank's rows of a token; sums go into the ring at the token's rank,
    which adds them. V2: a rank's rows are summed as they are sent into fixed places, which an
    epilogue adds. What travels has been rounded to bfloat16.
    """
    by_rank, away = shape.ranks, shape.ranks - shape.ranks_own
    summed = shape.slots + by_rank if expand else 0.0
    read = shape.slots if expand else by_rank
    return [
        Line("DeepEP V1", away, summed + 3 * by_rank + 1, "3" if expand else "2", "2 and the ring"),
        Line("DeepEP V2", away, read + 2 * by_rank + 1, "2", "2"),
    ]


def line_of(name: str, counts: Counts, num_tokens: int, row_bytes: int) -> Line:
    """Return what was counted, per token."""
    bytes_per_token = num_tokens * row_bytes
    return Line(
        name,
        counts.peer_bytes / bytes_per_token,
        (counts.peer_bytes + counts.own_bytes) / bytes_per_token,
        f"{counts.launches:g}",
        f"{counts.waits:g}",
        f"{counts.warp_instructions / num_tokens:.0f}"
        f" + {counts.scan_instructions / num_tokens:.1f}",
    )


def tables(case: Case, num_sms: int = 8) -> Iterator[str]:
    """Yield the tables of every row order and cast, line by line."""
    shape, num_tokens, row_bytes = Shape.of(case), sum(case.num_tokens), 2 * case.hidden
    yield (
        f"EP {case.num_ranks}, {case.num_tokens[0]} tokens per rank, hidden {case.hidden}, top-"
        f"{case.num_topk} of {case.num_experts}: {shape.ranks:.2f} ranks per token, "
        f"{shape.ranks_own:.2f} of them its own; {shape.slots_own:.2f} of its slots its own"
    )
    for recipe in (None, FP8):
        row = 1.0 if recipe is None else (case.hidden + case.hidden // 32) / row_bytes
        for expand in (False, True):
            sent, back = _one_call(case, num_sms, expand, recipe, reduces=False)
            lines = [line_of("ep_megatron", back, num_tokens, row_bytes)]
            if expand and recipe is None:
                _, reduced = _one_call(case, num_sms, expand, recipe, reduces=True)
                lines.append(line_of("ep_megatron, reduced", reduced, num_tokens, row_bytes))
            order = "by expert" if expand else "by rank"
            own = line_of("ep_megatron", sent, num_tokens, row_bytes)
            calls = [(f"dispatch, {order}", sent, [own, *deepep_dispatch(shape, row, expand)])]
            if recipe is None:
                lines += deepep_combine(shape, expand)
                calls.append((f"combine, {order}", back, lines))
            for what, mine, lines in calls:
                yield ""
                yield (
                    f"| {what}, {'bfloat16' if recipe is None else 'FP8'} | rows over NVLink | "
                    "rows read and written | launches | waits for ranks | warp instructions |"
                )
                yield "|---|---|---|---|---|---|"
                for line in lines:
                    yield line.text()
                yield (
                    f"Beside rows: {mine.fixed_bytes / case.num_ranks / 1024:.1f} KiB per rank and "
                    f"call over NVLink; {mine.barriers:g} block barriers in kernels that move rows."
                )


def _one_call(
    case: Case, num_sms: int, expand: bool, recipe: Fp8Recipe | None, reduces: bool
) -> tuple[Counts, Counts]:
    """Return what one dispatch and the combine of what came take."""
    config = BufferConfig(timeout=1e9, num_sms=num_sms, reduce_before_combine=reduces)
    ranks = Ranks(case.num_ranks, config=config)
    sent, received = counted(ranks, dispatch, case, expand, recipe)
    back, _ = counted(ranks, combine, received)
    return sent, back


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Count what dispatch and combine move.")
    parser.add_argument("--num-ranks", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=64, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--num-topk", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=256)
    args = parser.parse_args()
    case = Case(
        "counts",
        (args.num_tokens,) * args.num_ranks,
        args.num_topk,
        args.num_experts // args.num_ranks,
        args.hidden,
    )
    for line in tables(case):
        print(line, flush=True)


if __name__ == "__main__":
    main()
