"""The CUDA backend on emulated GPUs gives the reference's bits, and raises what it must.

The kernels are those of the built extension; see tests/cuda/emulated.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from ep_megatron.handle import DispatchHandle
from tests.routing import CASES, Case
from tests.test_dispatch import HANDLE_NUMBERS, bits
from tests.test_hierarchical import node_sums

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.calls import RECIPES as DRAWN_RECIPES
from tests.cuda.emulated import NUM_SMS, Ranks
from tests.cuda.nic import gathered

SMALL = [case for case in CASES if case.hidden <= 64]
REPEATED = next(case for case in SMALL if case.name == "an expert repeated in a token")
RECIPES = [
    FP8,
    Fp8Recipe(scales="packed_ue8m0", layout="column_major"),
    replace(MXFP8, layout="column_major"),
]


def same(mine: Tensor | None, other: Tensor | None) -> None:
    assert (mine is None) == (other is None)
    if mine is not None and other is not None:
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        mine, other = (t.clone(memory_format=torch.contiguous_format) for t in (mine, other))
        assert torch.equal(bits(mine), bits(other))


def same_rows(mine: Rows, other: Rows) -> None:
    for name in ("x", "scales", "topk_weights", "topk_idx"):
        same(getattr(mine, name), getattr(other, name))


def same_handles(mine: DispatchHandle, other: DispatchHandle) -> None:
    assert torch.equal(mine.routes, other.routes)
    for name in HANDLE_NUMBERS:
        assert getattr(mine, name) == getattr(other, name), name


def check_case(
    backend: Backend, reference: Backend, case: Case, dtype: torch.dtype, expand: bool
) -> None:
    """Every operation on one routing, with weights, biases, signed zeros and NaNs."""
    rank = backend.rank
    routing = Routing(case.topk_idx(rank), case.num_experts, expand, case.alignment)
    sent = Rows(case.x(rank, dtype), topk_weights=case.weights(rank))
    (mine, handle), (other, other_handle) = (
        b.dispatch(sent, routing) for b in (backend, reference)
    )
    same_rows(mine, other)
    same_handles(handle, other_handle)
    rng = torch.Generator().manual_seed(rank)
    y = torch.randn(handle.num_recv_rows, case.hidden, generator=rng, dtype=torch.float64)
    y.view(-1)[::7] = -0.0
    columns = (len(y),) if expand else (len(y), case.num_topk)
    rows = Rows(y.to(dtype), topk_weights=torch.randn(columns, generator=rng))
    biases = [case.x(rank, dtype) + 1, case.x(rank, dtype) * 3]
    for used in ([], biases[:1], biases):
        for got, wanted in zip(
            backend.combine(rows, handle, used),
            reference.combine(rows, other_handle, used),
            strict=True,
        ):
            same(got, wanted)
    again = Rows(case.x(rank, dtype).flip(0), topk_weights=case.weights(rank, torch.float64))
    same_rows(backend.dispatch_again(again, handle), reference.dispatch_again(again, other_handle))


def check_fp8(
    backend: Backend, reference: Backend, case: Case, recipe: Fp8Recipe, dtype: torch.dtype
) -> None:
    """Rows are cast on their way; NaN and infinity spread over their block alone."""
    x = case.x(backend.rank, torch.float64)
    x *= torch.exp2(torch.arange(case.hidden) % 37 - 18 - torch.arange(len(x))[:, None] % 5)
    x = x.to(dtype)
    x[3:4, 100], x[4:5, 200] = torch.nan, -torch.inf
    for expand in (False, True):
        routing = Routing(case.topk_idx(backend.rank), case.num_experts, expand, case.alignment)
        for widen_to in (None, torch.float32):
            sent = Rows(x, topk_weights=case.weights(backend.rank), fp8=recipe, widen_to=widen_to)
            (mine, handle), (other, _) = (b.dispatch(sent, routing) for b in (backend, reference))
            same_rows(mine, other)
        same_rows(
            backend.dispatch_again(Rows(x.flip(0), fp8=recipe), handle),
            reference.dispatch_again(Rows(x.flip(0), fp8=recipe), _),
        )


def no_report(ranks: Ranks) -> None:
    assert ranks.machine.report() == []


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_operation_gives_the_bits_of_the_reference(case: Case) -> None:
    ranks = Ranks(case.num_ranks)
    for dtype in (torch.bfloat16, torch.float32):
        for expand in (False, True):
            ranks.run(check_case, case, dtype, expand)
    no_report(ranks)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["race", "weak"])
def test_no_interleaving_races_or_changes_a_bit(mode: str, seed: int) -> None:
    for name in ("three ranks", "an expert repeated in a token"):
        case = next(case for case in SMALL if case.name == name)
        ranks = Ranks(case.num_ranks, seed, mode)
        for expand in (False, True):
            ranks.run(check_case, case, torch.bfloat16, expand)
        no_report(ranks)


def check_reduced(backend: Backend, reference: Backend, case: Case, dtype: torch.dtype) -> None:
    """Rows summed on their rank: each rank's sum is rounded, wherever its rows lie."""
    rank = backend.rank
    routing = Routing(case.topk_idx(rank), case.num_experts, True, case.alignment)
    sent = Rows(case.x(rank, dtype), topk_weights=case.weights(rank))
    (mine, handle), (other, other_handle) = (
        b.dispatch(sent, routing) for b in (backend, reference)
    )
    same_rows(mine, other)
    biases = [case.x(rank, dtype) + 1, case.x(rank, dtype) * 3]
    y = (mine.x.double().sin() * 3).to(dtype)
    for rows in (replace(mine, x=y), mine):
        everyone = gathered(reference, rows.x)
        for used in ([], biases):
            out, out_weights = backend.combine(rows, handle, used)
            same(out, node_sums("ABCDEFGH"[: case.num_ranks], other_handle, everyone, used, dtype))
            same(out_weights, reference.combine(other, other_handle)[1])


@pytest.mark.parametrize("mode", ["race", "weak"])
def test_rows_may_be_reduced_before_they_are_combined(mode: str) -> None:
    config = BufferConfig(timeout=1e9, num_sms=NUM_SMS, reduce_before_combine=True)
    for case in (REPEATED, Case("reduced", (9, 8, 7), num_topk=7, alignment=4, style="holes")):
        ranks = Ranks(case.num_ranks, 0, mode, config)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            ranks.run(check_reduced, case, dtype)
        no_report(ranks)


def check_mixed(backend: Backend, reference: Backend, case: Case, dtype: torch.dtype) -> None:
    """Rows in the arena are read where they are; rank 0's are elsewhere, and may be reduced."""
    x = case.x(backend.rank, dtype)
    routing = Routing(case.topk_idx(backend.rank), case.num_experts, expand=True)
    (mine, handle), (other, other_handle) = (
        b.dispatch(Rows(x), routing) for b in (backend, reference)
    )
    rows = replace(mine, x=mine.x.clone()) if backend.rank == 0 else mine
    same(backend.combine(rows, handle)[0], reference.combine(other, other_handle)[0])


def test_some_ranks_reduce() -> None:
    ranks = Ranks(REPEATED.num_ranks)
    ranks.run(check_mixed, REPEATED, torch.float32)
    launched = [{launch.kernel for launch in device.launches} for device in ranks.devices]
    assert ["ep_reduce_float32_kernel" in kernels for kernels in launched] == [True, False]


@pytest.mark.parametrize("recipe", RECIPES, ids=["fp8", "packed_columns", "mxfp8_columns"])
def test_rows_are_cast_on_their_way(recipe: Fp8Recipe) -> None:
    case = Case("cast", (6, 7, 5), hidden=1024, alignment=4)
    ranks = Ranks(case.num_ranks)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ranks.run(check_fp8, case, recipe, dtype)
    no_report(ranks)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_every_cast_reaches_every_number_of_ranks(num_ranks: int) -> None:
    case = Case("cast", (6, 7, 0, 5, 4, 9, 1, 8)[:num_ranks], hidden=512, alignment=4)
    ranks = Ranks(num_ranks)
    for recipe in DRAWN_RECIPES:
        ranks.run(check_fp8, case, recipe, torch.bfloat16)
    no_report(ranks)


def routing_of(case: Case, rank: int) -> Routing:
    return Routing(case.topk_idx(rank), case.num_experts, True, case.alignment)


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match="dispatch") as caught:
        action()
    return str(caught.value)


def check_errors(backend: Backend, _reference: Backend, case: Case) -> list[str]:
    """Each of these raises on all ranks, and the next call goes on."""
    rank = backend.rank
    x, routing = case.x(rank, torch.bfloat16), routing_of(case, rank)
    wrong = routing.topk_idx.clone()
    if rank == 1:
        wrong[2, 1] = case.num_experts
    other = torch.float16 if rank == 0 else torch.bfloat16
    errors = [
        error_of(lambda: backend.dispatch(Rows(x), replace(routing, topk_idx=wrong))),
        error_of(lambda: backend.dispatch(Rows(x.to(other)), routing)),
    ]
    if rank == 0:
        backend.fail("dispatch", "a reason")
    else:
        errors.append(error_of(lambda: backend.dispatch(Rows(x), routing)))
    wide = torch.zeros(len(x), 16400, dtype=torch.bfloat16)
    errors.append(error_of(lambda: backend.dispatch(Rows(wide if rank else x), routing)))
    _, handle = backend.dispatch(Rows(x), routing)
    y = torch.zeros(handle.num_recv_rows, case.hidden)
    assert not backend.combine(Rows(y), handle)[0].any()
    return errors


def test_bad_calls_raise_on_every_rank_and_the_next_goes_on() -> None:
    case = Case("errors", (5, 6, 7))
    ranks = Ranks(3)
    errors = ranks.run(check_errors, case)
    assert errors[1] == errors[2]
    assert errors[0][:2] == errors[1][:2]
    assert (
        "rank 1: expected topk_idx to be in [0, 9), or -1 for an unused slot, got 9" in errors[0][0]
    )
    assert "float16 on rank 0 and bfloat16 on rank 1, 2" in errors[0][1]
    assert "rank 0: a reason" in errors[1][2]
    assert "rank 2: expected hidden to be at most 16384" in errors[0][2]
    no_report(ranks)


def check_growth(backend: Backend, reference: Backend, case: Case) -> None:
    for hidden in (4096, 16384):
        grown = replace(case, hidden=hidden)
        check_case(backend, reference, grown, torch.bfloat16, True)


def test_memory_grows_on_all_ranks_together() -> None:
    case = Case("growth", (60, 5), num_topk=4, style="first_rank")
    config = BufferConfig(timeout=1e9, num_sms=2, initial_bytes=0)
    ranks = Ranks(2, config=config)
    ranks.run(check_growth, case)
    committed = [backend._arena.num_bytes_committed for backend in ranks.backends]
    assert committed[0] > committed[1] >= 1 << 20
    assert all(b._arena.num_bytes_in_use <= committed[r] for r, b in enumerate(ranks.backends))
    no_report(ranks)


def check_no_room(backend: Backend, _reference: Backend, case: Case) -> str:
    x, routing = case.x(backend.rank, torch.bfloat16), routing_of(case, backend.rank)
    with pytest.raises(RuntimeError, match="exceed max_bytes") as caught:
        backend.dispatch(Rows(x), routing)
    small, _ = backend.dispatch(Rows(x[:, :8].contiguous()), routing)
    assert small.x.shape[1] == 8
    return str(caught.value)


def test_a_rank_without_room_raises_on_all() -> None:
    case = Case("no room", (60, 5), num_topk=4, style="first_rank", hidden=16384)
    ranks = Ranks(2, config=BufferConfig(timeout=1e9, num_sms=2, max_bytes=2 << 20))
    assert len(set(ranks.run(check_no_room, case))) == 1


def check_late(backend: Backend, _reference: Backend, case: Case) -> str:
    if backend.rank == 1:
        return ""
    x, routing = case.x(backend.rank, torch.bfloat16), routing_of(case, backend.rank)
    with pytest.raises(RuntimeError, match="got nothing from rank 1") as caught:
        backend.dispatch(Rows(x), routing)
    with pytest.raises(RuntimeError, match="broke down"):
        backend.dispatch(Rows(x), routing)
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named() -> None:
    ranks = Ranks(3, config=BufferConfig(timeout=3.0, num_sms=2))
    ranks.run(check_late, Case("late", (5, 6, 7)))
    no_report(ranks)


def check_special_sums(backend: Backend, _reference: Backend) -> None:
    """One addend keeps its bits; a NaN that was summed is the quiet one without payload."""
    topk_idx = torch.tensor([[0, 1], [0, -1], [-1, -1]])
    expanded = Routing(topk_idx, 2, expand=True)
    _, handle = backend.dispatch(Rows(torch.zeros(3, 8, dtype=torch.bfloat16)), expanded)
    payload = torch.full((handle.num_recv_rows, 8), -0x3F, dtype=torch.int16)
    out = backend.combine(Rows(payload.view(torch.bfloat16)), handle)[0].view(torch.int16)
    assert (out[0] == 0x7FC0).all()
    assert (out[1] == -0x3F).all()
    assert (out[2] == 0).all()


def test_nans_and_single_rows() -> None:
    ranks = Ranks(1)
    ranks.run(check_special_sums)
    no_report(ranks)
