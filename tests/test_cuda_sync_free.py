"""Calls between emulated GPUs in which no host waits: the reference's bits, and errors that come
later.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_megatron.backends.base import Backend, Rows
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.routing import CASES, Case

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from ep_megatron import _cuda
from ep_megatron.backends.cuda import CudaBackend
from tests.cuda.emulated import NUM_SMS, EmulatedDevice, Ranks, shipped_ptx
from tests.cuda.within import (
    LATE,
    check_failures,
    check_reduced_within,
    check_within,
    error_of,
    routing_within,
)
from tests.cuda.workloads import without_trap
from tests.emulator.machine import Fault

SMALL = [case for case in CASES if case.hidden <= 64]


def no_report(ranks: Ranks) -> None:
    assert ranks.machine.report() == []


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_no_host_waits_and_every_bit_is_the_reference_s(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(case.num_ranks)
    for expand in (False, True):
        ranks.run(check_within, case, torch.float32, expand)

    def wait(*_: Any) -> bool:
        raise AssertionError("a host waits")

    monkeypatch.setattr(EmulatedDevice, "wait_for_word", wait)
    for expand in (False, True):  # there is room from here on
        ranks.run(check_within, case, torch.bfloat16, expand)
    no_report(ranks)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", ["race", "weak"])
def test_no_interleaving_races_or_changes_a_bit(mode: str, seed: int) -> None:
    for name in ("three ranks", "an expert repeated in a token"):
        case = next(case for case in SMALL if case.name == name)
        ranks = Ranks(case.num_ranks, seed, mode)
        for expand, dtype in ((False, torch.bfloat16), (True, torch.float32)):
            ranks.run(check_within, case, dtype, expand)
        no_report(ranks)


@pytest.mark.parametrize(
    "recipe", [FP8, replace(MXFP8, layout="column_major")], ids=["fp8", "mxfp8_columns"]
)
def test_rows_are_cast_on_their_way(recipe: Fp8Recipe) -> None:
    case = Case("cast", (6, 7, 5), hidden=256, alignment=4)
    ranks = Ranks(case.num_ranks)
    for expand in (False, True):
        ranks.run(check_within, case, torch.bfloat16, expand, recipe)
    no_report(ranks)


def test_rows_may_be_reduced() -> None:
    case = Case("reduced", (9, 8), num_topk=7, alignment=4, style="holes")
    ranks = Ranks(2, config=BufferConfig(timeout=1e9, num_sms=NUM_SMS, reduce_before_combine=True))
    for dtype in (torch.float32, torch.float64):  # whose sums lose nothing
        ranks.run(check_within, case, dtype, True)
    for dtype in (torch.bfloat16, torch.float16):
        ranks.run(check_reduced_within, case, dtype)
    no_report(ranks)


@pytest.mark.parametrize("mode", ["race", "weak"])
def test_what_fails_on_the_device_raises_on_every_rank(mode: str) -> None:
    ranks = Ranks(3, 0, mode)
    errors = ranks.run(check_failures, LATE)
    assert errors[0] == errors[1] == errors[2]
    assert "rank 1: expected topk_idx to be in [0, 9)" in errors[0][0]
    assert "float32 on rank 0, 1 and float64 on rank 2" in errors[0][1]
    most = sum(LATE.num_tokens) + 2
    assert f"got {most} on rank 0 and {most + 1} on rank 1" in errors[0][2]
    assert "num_worst_tokens = 3 rows on a rank, got" in errors[0][3]
    for expand in (False, True):
        ranks.run(check_within, LATE, torch.float32, expand)
    no_report(ranks)


def check_next_call(backend: CudaBackend, _reference: Backend, case: Case) -> list[str]:
    """Who does not look hears of it in the next call, which waits for all, and in no other."""
    rank = backend.rank
    x = Rows(case.x(rank, torch.float32))
    backend.dispatch_within(x, routing_within(case, rank, False, 20))
    backend.dispatch_within(x, routing_within(case, rank, False, 2))
    routing = routing_within(case, rank, False, 0)
    errors = [error_of(lambda: backend.dispatch(x, routing))]
    backend.dispatch(x, routing)
    return errors


def test_a_failure_raises_from_the_next_call() -> None:
    ranks = Ranks(3)
    errors = ranks.run(check_next_call, LATE)
    assert "num_worst_tokens = 2 rows on a rank" in errors[0][0]
    no_report(ranks)


def check_room(backend: CudaBackend, reference: Backend, case: Case) -> None:
    """The block grows with the call, and is given back; a call without room raises on all ranks."""
    for hidden in (8, 512, 64):
        check_within(backend, reference, replace(case, hidden=hidden), torch.float32, True)
    wide = torch.zeros(case.num_tokens[backend.rank], 16384)
    routing = routing_within(case, backend.rank, False, 500)
    with pytest.raises(RuntimeError, match="exceed max_bytes"):
        backend.dispatch_within(Rows(wide), routing)
    check_within(backend, reference, case, torch.float32, False)


def test_room_is_found_on_all_ranks_alike() -> None:
    config = BufferConfig(timeout=1e9, num_sms=2, initial_bytes=0, max_bytes=8 << 20)
    ranks = Ranks(3, config=config)
    ranks.run(check_room, Case("room", (40, 5, 0), alignment=16, style="first_rank"))
    for backend in ranks.backends:
        assert backend._arena.num_bytes_in_use == backend.within._block.num_bytes
    no_report(ranks)


def check_late(backend: CudaBackend, _reference: Backend) -> str:
    """Nobody waits for rank 1 on the host; the device says who is late, and then stops."""
    rows = Rows(LATE.x(backend.rank, torch.float32))
    routing = routing_within(LATE, backend.rank, True, 40)
    backend.dispatch_within(rows, routing)
    if backend.rank == 1:
        return ""
    _, handle = backend.dispatch_within(rows, routing)
    assert handle.numbers.tolist() == [_cuda.TIMED_OUT, *[0] * (len(handle.numbers) - 1)]
    with pytest.raises(RuntimeError, match="got nothing from rank 1") as caught:
        backend.dispatch_within(rows, routing)
    with pytest.raises(RuntimeError, match="broke down"):
        backend.dispatch_within(rows, routing)
    return str(caught.value)


@pytest.mark.parametrize("stops", [False, True], ids=["named", "stops"])
def test_a_rank_that_does_not_come(stops: bool) -> None:
    # The emulated host cannot look any more once a kernel has stopped the machine.
    kernels = shipped_ptx() if stops else without_trap(shipped_ptx())
    ranks = Ranks(3, config=BufferConfig(timeout=3.0, num_sms=2), kernels=kernels)
    if stops:
        with pytest.raises(Fault, match="trap"):
            ranks.run(check_late)
    else:
        ranks.run(check_late)
