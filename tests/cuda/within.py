"""Calls of a backend in which no host waits, compared with those of the reference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_megatron.backends.base import Backend, Routing, Rows, SyncFreeBackend
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.cuda_nodes import CudaNodesBackend
from ep_megatron.fp8 import Fp8Recipe
from tests.cuda.calls import draw, sent_of
from tests.routing import Case
from tests.test_dispatch import bits

SPARE_ROWS = 5
LATE = Case("late", (5, 6, 7), alignment=4)
FAILED = "one that failed"
NUMBERS = (
    "num_recv_tokens_per_expert",
    "num_valid_tokens_per_expert",
    "num_recv_tokens_per_rank",
)


def same(mine: Tensor | None, other: Tensor | None) -> None:
    """Compare bits."""
    assert (mine is None) == (other is None)
    if mine is not None and other is not None:
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        mine, other = (t.clone(memory_format=torch.contiguous_format) for t in (mine, other))
        assert torch.equal(bits(mine), bits(other))


def same_rows(mine: Rows, other: Rows) -> None:
    """Compare what came; behind it nobody has an expert or a weight."""
    num_rows = len(other.x)
    for name in ("x", "scales", "topk_weights", "topk_idx"):
        one, two = getattr(mine, name), getattr(other, name)
        same(None if one is None else one[:num_rows], two)
    assert mine.topk_idx is None or (mine.topk_idx[num_rows:] == -1).all()
    assert mine.topk_weights is None or not mine.topk_weights[num_rows:].any()


def routing_within(case: Case, rank: int, expand: bool, capacity: int) -> Routing:
    """Return the routing of a case into so many rows."""
    return Routing(case.topk_idx(rank), case.num_experts, expand, case.alignment, capacity)


def check_within(
    backend: Backend,
    reference: Backend,
    case: Case,
    dtype: torch.dtype,
    expand: bool,
    recipe: Fp8Recipe | None = None,
) -> None:
    """Check the calls of one routing; see `check_sent`."""
    rank = backend.rank
    sent = Rows(case.x(rank, dtype), topk_weights=case.weights(rank), fp8=recipe)
    check_sent(backend, reference, case, sent, dtype, expand)


def check_drawn_within(backend: Backend, reference: Backend, seeds: range) -> None:
    """Check calls drawn by seeds; see `check_sent`."""
    for seed in seeds:
        drawn = draw(backend.num_ranks, seed)
        sent = sent_of(backend.rank, drawn)
        check_sent(backend, reference, drawn.case, sent, drawn.summed, drawn.expand)


def check_sent(
    backend: Backend,
    reference: Backend,
    case: Case,
    sent: Rows,
    summed: torch.dtype,
    expand: bool,
) -> None:
    """Dispatch, combine rows of dtype `summed`, and dispatch along the handle.

    There is room for some more rows than come; those behind are not a number. Between nodes sums
    are those of calls that the host waits for.
    """
    assert isinstance(backend, SyncFreeBackend)
    rank = backend.rank
    other, known = reference.dispatch(sent, routing_within(case, rank, expand, 0))
    adder, along = reference, known
    if isinstance(backend, CudaNodesBackend):
        adder, (_, along) = backend, backend.dispatch(sent, routing_within(case, rank, expand, 0))
    capacity = max(known.num_rows_per_rank) + SPARE_ROWS
    mine, handle = backend.dispatch_within(sent, routing_within(case, rank, expand, capacity))
    same_rows(mine, other)
    assert len(mine.x) == capacity
    handle.check()
    assert not handle.has_overflowed
    assert handle.num_recv_rows_tensor.tolist() == [known.num_recv_rows]
    for name in NUMBERS:
        assert tuple(getattr(handle, name).tolist()) == getattr(known, name), name

    num_rows, weights = known.num_recv_rows, None
    rng = torch.Generator().manual_seed(rank)
    y = torch.randn(capacity, case.hidden, generator=rng, dtype=torch.float64).to(summed)
    y[num_rows:] = torch.nan
    if sent.topk_weights is not None:
        columns = (capacity,) if expand else (capacity, case.num_topk)
        weights = torch.randn(columns, generator=rng, dtype=sent.topk_weights.dtype)
    rows = Rows(y, topk_weights=weights)
    there = Rows(y[:num_rows], topk_weights=None if weights is None else weights[:num_rows])
    bias = case.x(rank, summed) + 1
    for biases in ([], [bias, bias * 3]):
        combined = backend.new_combined(rows, handle)
        backend.combine_within(rows, handle, biases, combined)
        for got, wanted in zip(combined, adder.combine(there, along, biases), strict=True):
            same(got, wanted)
    again = replace(sent, x=sent.x.flip(0))
    same_rows(backend.dispatch_again_within(again, handle), reference.dispatch_again(again, known))


def check_reduced_within(
    backend: Backend, _reference: Backend, case: Case, dtype: torch.dtype
) -> None:
    """Sums that are made on the rows' rank first are those of a call for which the host waits."""
    assert isinstance(backend, CudaBackend)
    x = Rows(case.x(backend.rank, dtype))
    _, known = backend.dispatch(x, routing_within(case, backend.rank, True, 0))
    capacity = max(known.num_rows_per_rank) + SPARE_ROWS
    _, handle = backend.dispatch_within(x, routing_within(case, backend.rank, True, capacity))
    y = torch.arange(capacity * case.hidden).view(capacity, -1).sin().to(dtype)
    combined = backend.new_combined(Rows(y), handle)
    backend.combine_within(Rows(y), handle, [], combined)
    same(combined[0], backend.combine(Rows(y[: known.num_recv_rows]), known)[0])


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"dispatch|combine") as caught:
        action()
    return str(caught.value)


def error_of_incomplete(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match="handle") as caught:
        action()
    return str(caught.value)


def check_failures(
    backend: CudaBackend | CudaNodesBackend, _reference: Backend, case: Case
) -> list[str]:
    """Nothing moves, and all ranks hear of it when they look; the next call goes on."""
    rank = backend.rank
    x, weights = case.x(rank, torch.float32), case.weights(rank)
    most = sum(case.num_tokens) + 2
    good = routing_within(case, rank, False, most)
    wrong = good.topk_idx.clone()
    if rank == 1:
        wrong[2, 1] = case.num_experts
    errors = []
    # What needs more room than there is meets on the host, and raises there.
    backend.dispatch_within(
        Rows(x.double(), topk_weights=weights), routing_within(case, rank, False, most + 10)
    )
    for rows, routing in (
        (x, replace(good, topk_idx=wrong)),
        (x.double() if rank == 2 else x, good),
        (x, replace(good, num_worst_tokens=most + rank)),
        (x, replace(good, num_worst_tokens=3)),
        (x, routing_within(case, rank, True, 3)),
    ):
        received, handle = backend.dispatch_within(Rows(rows, topk_weights=weights), routing)
        assert handle.has_overflowed == (routing.num_worst_tokens == 3)
        assert received.topk_idx is None or (received.topk_idx == -1).all()
        assert received.topk_weights is not None
        assert not received.topk_weights.any()
        assert not handle.numbers[1:].any()
        errors.append(error_of(handle.check))
        assert FAILED in error_of_incomplete(handle.check)
        # Nobody has a way along such a handle.
        y = torch.full((routing.num_worst_tokens, case.hidden), torch.nan)
        combined = backend.new_combined(Rows(y), handle)
        backend.combine_within(Rows(y), handle, [x], combined)
        if routing.num_worst_tokens == 3:
            same(combined[0], x)
    return errors
