"""Calls between emulated nodes in which no host waits: the reference's rows, and the sums of calls
that the host waits for.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_megatron.backends.base import Backend, Rows
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.routing import Case

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")
pytest.importorskip("ep_megatron._nvshmem", reason="built without NVSHMEM")

from ep_megatron.backends.cuda_nodes import CudaNodesBackend
from tests.cuda.emulated import EmulatedDevice, shipped_ptx
from tests.cuda.graphs import replayed, run
from tests.cuda.nic import Nodes
from tests.cuda.within import check_failures, check_within, error_of, routing_within
from tests.cuda.workloads import check_lost_within, lose_within, without_trap

CASES = {
    2: Case("two", (5, 4), num_topk=3, hidden=16),
    3: Case("three", (5, 0, 6), num_topk=3, hidden=16, experts_per_rank=2, alignment=4),
    4: Case("four", (5, 0, 7, 3), num_topk=4, experts_per_rank=2, hidden=24, alignment=4),
    8: Case("eight", (3, 4, 0, 5, 2, 6, 1, 3), num_topk=5, experts_per_rank=2, hidden=8),
}
LATE = Case("late", (5, 6, 7, 2), alignment=4)
MODES = pytest.mark.parametrize("mode", ["race", "weak"])


def no_report(nodes: Nodes) -> None:
    assert nodes.machine.report() == []


@pytest.mark.parametrize("layout", ["AB", "ABA", "AABB", "ABBA", "AAAB", "AAAABBBB"])
def test_rows_and_sums_are_those_of_calls_that_the_host_waits_for(layout: str) -> None:
    nodes = Nodes(layout)
    for expand, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        nodes.run(check_within, CASES[len(layout)], dtype, expand)
    no_report(nodes)


def test_sums_travel_in_float32_where_asked() -> None:
    nodes = Nodes("AABB", is_exact=True)
    nodes.run(check_within, CASES[4], torch.bfloat16, True)
    no_report(nodes)


@pytest.mark.parametrize("style", ["nothing", "first_rank", "holes", "repeated"])
def test_other_routings(style: str) -> None:
    nodes = Nodes("AABB")
    nodes.run(check_within, replace(CASES[4], style=style), torch.float32, style == "holes")
    no_report(nodes)


@MODES
@pytest.mark.parametrize("seed", range(2))
def test_no_interleaving_races_or_changes_a_bit(mode: str, seed: int) -> None:
    nodes = Nodes("AABB", seed, mode)
    nodes.run(check_within, CASES[4], torch.bfloat16, bool(seed))
    no_report(nodes)


@pytest.mark.parametrize(
    "recipe", [FP8, replace(MXFP8, layout="column_major")], ids=["fp8", "mxfp8_columns"]
)
def test_rows_are_cast_once_before_they_cross(recipe: Fp8Recipe) -> None:
    nodes = Nodes("AABB")
    case = Case("cast", (3, 4, 0, 5), num_topk=3, hidden=256, alignment=4)
    nodes.run(check_within, case, torch.bfloat16, recipe == FP8, recipe)
    no_report(nodes)


def test_no_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes("AABB")

    def calls(backend: CudaNodesBackend, _reference: Backend, case: Case) -> None:
        x, rank = Rows(case.x(backend.rank, torch.float32)), backend.rank
        _, handle = backend.dispatch_within(x, routing_within(case, rank, False, 20))
        backend.dispatch_again_within(x, handle)
        y = Rows(torch.ones(20, case.hidden))
        backend.combine_within(y, handle, [], backend.new_combined(y, handle))

    nodes.run(calls, CASES[4])  # there is room from here on

    def wait(*_: Any) -> bool:
        raise AssertionError("a host waits")

    monkeypatch.setattr(EmulatedDevice, "wait_for_word", wait)
    nodes.run(calls, CASES[4])
    no_report(nodes)


@MODES
def test_what_fails_on_the_device_raises_on_every_rank(mode: str) -> None:
    nodes = Nodes("AABB", 0, mode)
    errors = nodes.run(check_failures, LATE)
    assert errors[0] == errors[1] == errors[2] == errors[3]
    assert "rank 1: expected topk_idx to be in [0, 12)" in errors[0][0]
    assert "float32 on rank 0, 1, 3 and float64 on rank 2" in errors[0][1]
    assert "num_worst_tokens = 3 rows on a rank, got" in errors[0][3]
    for expand in (False, True):
        nodes.run(check_within, LATE, torch.float32, expand)
    no_report(nodes)


def too_many_cross(backend: CudaNodesBackend, _reference: Backend) -> list[str]:
    """Rows fit, but a rank sends, or passes on, more tokens than rows may come."""
    errors = []
    rank = backend.rank
    case = Case("cross", (4, 4, 4, 4), num_topk=2)
    spread = torch.tensor([[6 * (1 - rank // 2) + 3 * (at % 2), -1] for at in range(4)])
    spread = spread if rank in (0, 2) else torch.full((4, 2), -1)
    routing = replace(routing_within(case, rank, False, 3), topk_idx=spread)
    x = Rows(case.x(rank, torch.float32))
    backend.dispatch_within(x, routing_within(case, rank, False, 9))
    received, handle = backend.dispatch_within(x, routing)
    assert handle.has_overflowed
    assert received.topk_idx is not None
    assert torch.equal(received.topk_idx, torch.full_like(received.topk_idx, -1))
    errors.append(error_of(handle.check))
    backend.dispatch_within(x, routing)
    errors.append(error_of(lambda: backend.dispatch(x, routing)))  # who does not look hears later
    return errors


def test_too_many_tokens_between_nodes() -> None:
    nodes = Nodes("AABB")
    errors = nodes.run(too_many_cross)
    assert errors[0][0] == errors[3][0]
    assert (
        "num_worst_tokens = 3 tokens between nodes to be sent by a rank, got 4 on rank 0"
        in (errors[0][0])
    )
    assert "tokens between nodes" in errors[1][1]
    no_report(nodes)


@pytest.mark.parametrize(("layout", "expand"), [("AB", True), ("AABB", False), ("ABBA", True)])
def test_a_layer_is_replayed_with_other_routings(layout: str, expand: bool) -> None:
    case = Case("graph", (4, 5, 6, 3)[: len(layout)], num_topk=3, alignment=4)
    run(Nodes(layout), replayed, case, expand, None)


@MODES
def test_no_interleaving_of_replays_races(mode: str) -> None:
    case = Case("graph", (4, 0, 6), num_topk=3, alignment=4)
    run(Nodes("ABB", 1, mode), replayed, case, mode == "weak", None)


@pytest.mark.parametrize("stops", [False, True], ids=["named", "stops"])
def test_rows_that_do_not_come_end_the_kernels_that_would_read_them(stops: bool) -> None:
    # The emulated host cannot look any more once a kernel has stopped the machine.
    kernels = shipped_ptx() if stops else without_trap(shipped_ptx())
    nodes = Nodes("AB", timeout=0.05, kernels=kernels)
    lose_within(nodes, 0)
    errors = nodes.run(check_lost_within, CASES[2])
    assert ("trap" if stops else "got nothing from rank 0;") in errors[1]


def check_refused(backend: Any, _reference: Backend, case: Case, how: str) -> list[str]:
    """Rank 0 refuses a call, or finds no room in which it alone needs more; then others go on."""
    rank, routing = backend.rank, routing_within(case, backend.rank, False, 40)
    x = Rows(case.x(rank, torch.float32))
    backend.dispatch_within(x, routing)

    def call() -> None:
        if rank == 0 and how == "refuses":
            backend.fail("dispatch", "something")
        elif rank == 0:
            backend.dispatch_within(Rows(case.x(rank, torch.float64)), routing)
        else:
            backend.dispatch_within(x, routing)

    first = error_of_any(call)
    return [first, *(error_of_any(lambda: dispatch_and_check(backend, x, routing)) for _ in "ab")]


def dispatch_and_check(backend: Any, x: Rows, routing: Any) -> None:
    backend.dispatch_within(x, routing)[1].check()


def error_of_any(function: Any) -> str:
    try:
        function()
    except Exception as error:  # a trap would be a Fault, and stop the machine
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("how", ["refuses", "has no room"])
def test_ranks_of_a_node_stay_in_step_with_one_that_refuses(how: str) -> None:
    """It is in the meeting of all ranks and not in its node's, where the others are already."""
    nodes = Nodes("AABB", timeout=4.0)
    for errors in nodes.run(check_refused, LATE, how):
        assert all(not error or error.startswith("ValueError") for error in errors), errors
        assert errors[-1] == ""
    no_report(nodes)
