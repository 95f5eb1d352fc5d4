"""num_worst_tokens: a fixed number of rows, and nobody waits for counts."""

from typing import Any

import pytest
import torch

from ep_megatron import Buffer
from ep_megatron.handle import CapacityHandle
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_async import Gate, fresh, is_complete, same
from tests.test_dispatch import BACKENDS, buffer_of, send
from tests.test_errors import check_goes_on

CASE = Case("capacity", (40, 25), num_topk=4, hidden=64, alignment=4)
CAPACITY = 100


def within(buffer: Buffer, rank: int, **options: Any) -> tuple[Any, ...]:
    return fresh(buffer, CASE, rank, **{"num_worst_tokens": CAPACITY, **options})


def check_same_rows(rank: int, backend: str, async_finish: bool) -> None:
    """The rows that came are those without a capacity; so are sums, and the way back."""
    buffer = buffer_of(backend)
    expected = fresh(buffer, CASE, rank)
    num_rows = len(expected[0])
    assert 0 < num_rows < CAPACITY
    y = torch.randn(CAPACITY, CASE.hidden, generator=torch.Generator().manual_seed(rank))
    sums = buffer.combine(y[:num_rows], expected[4], topk_weights=expected[2])
    again = buffer.dispatch(CASE.x(rank, y.dtype), expected[4], topk_weights=CASE.weights(rank))

    gate = Gate()
    if not async_finish:
        gate.open()
    ours = within(buffer, rank, previous_event=gate.event, async_finish=async_finish)
    recv_x, recv_idx, recv_weights, counts, handle, event = ours
    assert isinstance(handle, CapacityHandle)
    assert counts == []
    weights = torch.zeros(CAPACITY, CASE.num_topk)
    weights[:num_rows] = expected[2]
    combined = buffer.combine(y, handle, topk_weights=weights, async_finish=async_finish)
    sent = buffer.dispatch(
        CASE.x(rank, y.dtype), handle, topk_weights=CASE.weights(rank), async_finish=async_finish
    )
    if async_finish:
        assert not is_complete(event)  # all three returned before anything could begin
        assert handle.num_recv_rows_tensor.item() == 0
        gate.open()
        sent[5].current_stream_wait()
    assert len(recv_x) == len(recv_idx) == len(recv_weights) == CAPACITY
    same(recv_x[:num_rows], expected[0])
    same(recv_idx[:num_rows], expected[1])
    same(recv_weights[:num_rows], expected[2])
    assert (recv_idx[num_rows:] == -1).all()
    assert not recv_weights[num_rows:].any()
    assert handle.num_recv_rows_tensor.tolist() == [num_rows]
    assert handle.num_recv_tokens_per_expert.tolist() == expected[3]
    assert not handle.has_overflowed
    same(combined[0], sums[0])
    same(combined[1], sums[1])
    assert isinstance(sent[0], torch.Tensor)
    assert isinstance(again[0], torch.Tensor)
    same(sent[0][:num_rows], again[0])
    assert sent[2] is not None
    assert again[2] is not None
    same(sent[2][:num_rows], again[2])


def check_overflow(rank: int, backend: str) -> None:
    """Too many rows raise on every rank, at the wait or in the call, and so does the handle."""
    buffer = buffer_of(backend)
    most = max(send(buffer, CASE, rank, False, torch.float32)[3].num_rows_per_rank)
    exact = within(buffer, rank, num_worst_tokens=most)
    assert len(exact[0]) == most
    with pytest.raises(ValueError, match=rf"num_worst_tokens = {most - 1} rows on a rank, got"):
        within(buffer, rank, num_worst_tokens=most - 1)
    *_, handle, event = within(buffer, rank, num_worst_tokens=most - 1, async_finish=True)
    y = torch.zeros(most - 1, CASE.hidden)
    after = buffer.combine(y, handle, async_finish=True)[2]
    for failed, message in ((event, f"rows on a rank, got {most}"), (after, "one that failed")):
        with pytest.raises(ValueError, match=message):
            failed.current_stream_wait()
    assert handle.has_overflowed
    check_goes_on(rank, buffer)


def check_arguments(rank: int, backend: str) -> None:
    buffer = buffer_of(backend)
    with pytest.raises(ValueError, match="expected num_worst_tokens to be the same on all ranks"):
        within(buffer, rank, num_worst_tokens=CAPACITY + rank)
    with pytest.raises(ValueError, match=r"expected num_worst_tokens to be from 0 to .*, got -1"):
        within(buffer, rank, num_worst_tokens=-1)
    handle = within(buffer, rank)[4]
    with pytest.raises(ValueError, match=rf"expected x to be \[{CAPACITY}, hidden\], got \[3, 64"):
        buffer.combine(torch.zeros(3, 64), handle)
    check_goes_on(rank, buffer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("async_finish", [False, True], ids=["sync", "async"])
def test_rows_within_a_capacity(backend: str, async_finish: bool) -> None:
    run_on_ranks(2, check_same_rows, backend, async_finish)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [check_overflow, check_arguments])
def test_what_does_not_fit(backend: str, check: Any) -> None:
    run_on_ranks(2, check, backend)
