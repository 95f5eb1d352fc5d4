"""Every verb over emulated GPUs, in many interleavings: no report, and all bits as they must be.

`python -m tests.cuda.interleavings --seeds 20` makes the calls of the tests, one interleaving per
seed, in race and in weak mode, and prints what it did; it fails where anything differs or is
reported.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ep_megatron.config import BufferConfig
from tests.cuda import layers
from tests.cuda.buffers import Buffers
from tests.cuda.calls import FLOATS, check_drawn
from tests.cuda.calls import RECIPES as DRAWN_RECIPES
from tests.cuda.emulated import NUM_SMS, Ranks
from tests.cuda.nic import Nodes
from tests.cuda.seeds import has_failed
from tests.cuda.within import check_within
from tests.routing import Case
from tests.test_cuda_backend import check_case, check_fp8, check_reduced
from tests.test_cuda_low_latency import two_zero_copies
from tests.test_cuda_nodes import check as check_nodes
from tests.test_cuda_nodes import check_fp8 as check_fp8_nodes
from tests.test_low_latency import CASES as PACKED_CASES
from tests.test_low_latency import RECIPES, check_cases, check_hooks_of, check_steps_of

CAST = (6, 7, 0, 5, 4, 9, 1, 8)  # tokens of each rank
LAYOUTS = ("AB", "ABB", "AABB", "ABBA", "AAAABBBB", "AABBCCDD")
ALL_RANKS = (2, 3, 4, 8)
NUM_DRAWN = 6  # calls of a seed


@dataclass(frozen=True)
class Calls:
    """What ranks do together.

    Attributes:
        name: of the verbs, and of their case.
        num_ranks: how many.
        make: (seed, mode) -> emulated ranks.
        run: makes the calls on them; raises where bits differ.
    """

    name: str
    num_ranks: int
    make: Callable[[int, str], Ranks]
    run: Callable[[Any, int], object]


def _layers(case: Case) -> Calls:
    def run(ranks: Ranks, _seed: int) -> None:
        layers.run_with_buffers(ranks, layers.check, case, layers.FORMS)

    return Calls(f"layers: {case.name}", case.num_ranks, partial(Ranks, case.num_ranks), run)


def _operations(case: Case) -> Calls:
    def run(ranks: Ranks, _seed: int) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            for expand in (False, True):
                ranks.run(check_case, case, dtype, expand)

    name = f"dispatch, combine with biases, cached: {case.name}"
    return Calls(name, case.num_ranks, partial(Ranks, case.num_ranks), run)


def _casts(num_ranks: int) -> Calls:
    case = Case("cast", CAST[:num_ranks], hidden=512, alignment=4)

    def run(ranks: Ranks, seed: int) -> None:
        recipe = DRAWN_RECIPES[seed % len(DRAWN_RECIPES)]
        ranks.run(check_fp8, case, recipe, FLOATS[seed % 3])

    return Calls("rows cast on their way", num_ranks, partial(Ranks, num_ranks), run)


def _drawn(num_ranks: int) -> Calls:
    def run(ranks: Ranks, seed: int) -> None:
        ranks.run(check_drawn, range(seed * NUM_DRAWN, (seed + 1) * NUM_DRAWN))

    return Calls("drawn calls", num_ranks, partial(Ranks, num_ranks), run)


def _reduced(num_ranks: int) -> Calls:
    case = Case("reduced", CAST[:num_ranks], num_topk=7, alignment=4, style="holes")
    config = BufferConfig(timeout=1e9, num_sms=NUM_SMS, reduce_before_combine=True)

    def run(ranks: Ranks, seed: int) -> None:
        ranks.run(check_reduced, case, FLOATS[seed % 4])

    def make(seed: int, mode: str) -> Ranks:
        return Ranks(num_ranks, seed, mode, config)

    return Calls("rows reduced before combine", num_ranks, make, run)


def _low_latency(num_ranks: int) -> Calls:
    cases = [case for case in PACKED_CASES.values() if case.num_ranks == num_ranks]

    def run(buffers: Buffers, _seed: int) -> None:
        buffers.call(check_cases, cases, list(RECIPES))
        if num_ranks == 2:
            buffers.call(check_hooks_of)
            buffers.call(two_zero_copies)
        if num_ranks == 3:
            buffers.call(check_steps_of, 5)

    return Calls("low latency", num_ranks, partial(Buffers, num_ranks), run)


def _nodes(layout: str) -> Calls:
    num_ranks = len(layout)
    case = Case("nodes", CAST[:num_ranks], num_topk=4, experts_per_rank=2, hidden=8, alignment=4)
    cast = Case("cast", CAST[:num_ranks], hidden=256, alignment=4)

    def run(nodes: Nodes, seed: int) -> None:
        nodes.run(check_nodes, case, layout, FLOATS[seed % 3], False)
        nodes.run(check_fp8_nodes, cast)

    return Calls(f"between nodes: {layout}", num_ranks, partial(Nodes, layout), run)


def _nodes_within(layout: str) -> Calls:
    num_ranks = len(layout)
    case = Case("nodes", CAST[:num_ranks], num_topk=4, experts_per_rank=2, hidden=24, alignment=4)
    cast = replace(case, hidden=512)  # a multiple of what four packed scales are for

    def run(nodes: Nodes, seed: int) -> None:
        nodes.run(check_within, case, FLOATS[seed % 3], bool(seed % 2))
        recipe = DRAWN_RECIPES[seed % len(DRAWN_RECIPES)]
        nodes.run(check_within, cast, torch.bfloat16, not seed % 2, recipe)

    name = f"between nodes, no host waits: {layout}"
    return Calls(name, num_ranks, partial(Nodes, layout), run)


def all_calls() -> Iterator[Calls]:
    """Yield the calls, those of few ranks first."""
    for num_ranks in ALL_RANKS:
        cases = [case for case in layers.SMALL if case.num_ranks == num_ranks]
        yield from map(_layers, cases)
        yield from map(_operations, cases)
        for verbs in (_casts, _drawn, _reduced, _low_latency):
            yield verbs(num_ranks)
        for layout in (layout for layout in LAYOUTS if len(layout) == num_ranks):
            yield from (_nodes(layout), _nodes_within(layout))


def main() -> None:
    """Make all calls, with many interleavings of each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="interleavings of each")
    parser.add_argument("--ranks", type=int, nargs="*", help="only calls of these many ranks")
    parser.add_argument("--only", default="", help="only calls with this in their name")
    args = parser.parse_args()
    any_failed = False
    for calls in all_calls():
        if args.only not in calls.name or calls.num_ranks not in (args.ranks or ALL_RANKS):
            continue
        for mode in ("race", "weak"):
            what = f"{mode} EP {calls.num_ranks}, {calls.name}"
            any_failed |= has_failed(what, args.seeds, partial(_make, calls, mode))
    sys.exit(any_failed)


def _make(calls: Calls, mode: str, seed: int) -> None:
    ranks = calls.make(seed, mode)
    calls.run(ranks, seed)
    assert not ranks.machine.report(), ranks.machine.report()


if __name__ == "__main__":
    main()
