"""Asynchronous calls: nothing is read too early, order is kept, errors come at the wait."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer
from ep_megatron.streams import CPUStream, EventHandle, EventOverlap
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import BACKENDS, bits, buffer_of, send
from tests.test_errors import check_goes_on

CASE = Case("async", (40, 25), num_topk=4, hidden=64, alignment=4)
LARGE = Case("large", (400, 300), num_topk=4, hidden=2048, alignment=4)  # in the arena
PATIENCE = 60.0


class Gate:
    """Work on a stream of its own that ends when it is told to."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self._open = threading.Event()
        self.stream = CPUStream("producer")
        self.event = self.stream.submit(lambda: self._pass(then))

    def _pass(self, then: Callable[[], object]) -> None:
        assert self._open.wait(PATIENCE)
        then()

    def open(self) -> None:
        self._open.set()

    def open_soon(self) -> None:
        timer = threading.Timer(0.3, self.open)
        timer.daemon = True
        timer.start()


def fresh(buffer: Buffer, case: Case, rank: int, **options: Any) -> tuple[Any, ...]:
    arguments = {
        "x": case.x(rank, torch.float32),
        "topk_idx": case.topk_idx(rank),
        "topk_weights": case.weights(rank),
        "num_experts": case.num_experts,
        "expert_alignment": case.alignment,
    }
    return buffer.dispatch(**{**arguments, **options})


def same(ours: object, theirs: object) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None:
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        assert torch.equal(bits(ours), bits(theirs))


def is_complete(overlap: EventOverlap) -> bool:
    assert overlap.event is not None
    return overlap.event.query()


def check_late_producer(rank: int, backend: str, case: Case, expand: bool) -> None:
    """Inputs that another stream writes late are read only after its event."""
    buffer = buffer_of(backend)
    expected = fresh(buffer, case, rank, expand=expand)
    handle = expected[4]
    y = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(rank))
    total, total_weights, _ = buffer.combine(y, handle, expected[2], bias=case.x(rank, y.dtype))
    again = buffer.dispatch(case.x(rank, y.dtype), handle, topk_weights=case.weights(rank))

    x, weights = case.x(rank, y.dtype), case.weights(rank)
    late_x, late_idx = torch.full_like(x, float("nan")), torch.full_like(case.topk_idx(rank), -1)
    late_y, late_weights = torch.full_like(y, float("nan")), torch.zeros_like(weights)
    late_recv = torch.zeros_like(expected[2])

    def produce() -> None:
        for target, value in (
            (late_x, x),
            (late_idx, case.topk_idx(rank)),
            (late_weights, weights),
            (late_y, y),
            (late_recv, expected[2]),
        ):
            target.copy_(value)

    # A fresh dispatch waits for the counts, so for the producer too.
    gate = Gate(produce)
    gate.open_soon()
    counted = buffer.get_dispatch_layout(late_idx, case.num_experts, gate.event, True)
    ours = fresh(
        buffer,
        case,
        rank,
        x=late_x,
        topk_idx=late_idx,
        topk_weights=late_weights,
        expand=expand,
        previous_event=counted[-1],
        async_finish=True,
    )
    assert ours[3] == expected[3]
    ours[5].current_stream_wait()
    for mine, theirs in zip(ours[:3], expected[:3], strict=True):
        same(mine, theirs)
    reference = buffer.get_dispatch_layout(case.topk_idx(rank), case.num_experts)
    same(counted[0], reference[0])
    same(counted[2], reference[2])
    same(counted[3], reference[3])

    # The others return at once: the producer is told to go on only afterwards.
    late_x.fill_(float("nan"))
    late_y.fill_(float("nan"))
    late_recv.zero_()
    gate = Gate(produce)
    combined = buffer.combine(
        late_y, handle, late_recv, late_x, previous_event=gate.event, async_finish=True
    )
    sent = buffer.dispatch(late_x, handle, topk_weights=late_weights, async_finish=True)
    assert not is_complete(combined[2])
    assert not is_complete(sent[5])
    gate.open()
    sent[5].current_stream_wait()  # behind the combine, so that is complete too
    assert is_complete(combined[2])
    same(combined[0], total)
    same(combined[1], total_weights)
    same(sent[0], again[0])
    same(sent[2], again[2])


def check_many_queued(rank: int, backend: str) -> None:
    """Calls of two handles are queued without waiting; each gives what it gives alone."""
    buffer = buffer_of(backend)
    cases = [Case(str(k), (30 + k, 20 + k), hidden=64, alignment=4) for k in range(2)]
    alone = [send(buffer, case, rank, True, torch.float32) for case in cases]
    sums = [buffer.combine(rows[0] * 3, rows[3])[0] for rows in alone]
    results = []
    for step in range(20):
        case, (rows, _, _, handle) = cases[step % 2], alone[step % 2]
        sent = buffer.dispatch(case.x(rank, rows.dtype), handle, async_finish=True)
        combined = buffer.combine(rows * 3, handle, async_finish=True)
        new = fresh(buffer, case, rank, expand=True, async_finish=True)
        results.append((step % 2, sent[0], combined[0], new[0], new[5]))
    results[-1][-1].current_stream_wait()
    for which, again, total, rows, event in results:
        assert is_complete(event)
        same(again, alone[which][0])
        same(total, sums[which])
        same(rows, alone[which][0])


def check_sync_is_behind(rank: int, backend: str) -> None:
    """A synchronous call takes its turn behind what is queued, on every rank."""
    buffer = buffer_of(backend)
    rows, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    expected = buffer.combine(rows, handle)[0]
    # Only one rank queues; for the other the order of its synchronous calls is the same.
    if rank == 0:
        gate = Gate()
        first = buffer.combine(rows, handle, previous_event=gate.event, async_finish=True)
        gate.open_soon()
        second = buffer.dispatch(CASE.x(rank, rows.dtype), handle)
        assert is_complete(first[2])
    else:
        first = buffer.combine(rows, handle)
        second = buffer.dispatch(CASE.x(rank, rows.dtype), handle)
    same(first[0], expected)
    assert isinstance(second[0], Tensor)
    same(second[0], rows)


def check_own_connections(rank: int, backend: str) -> None:
    """The caller uses the group while queued calls wait for a rank: nothing mingles."""
    buffer = buffer_of(backend)
    rows, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    expected = buffer.combine(rows, handle)[0]
    gate = Gate() if rank == 1 else None
    combined, _, event = buffer.combine(
        rows, handle, previous_event=gate.event if gate else None, async_finish=True
    )
    for step in range(20):
        value = torch.full((5,), float(rank + step))
        dist.all_reduce(value)
        assert torch.equal(value, torch.full((5,), 2.0 * step + 1))
    assert not is_complete(event)  # rank 1 has not even begun
    dist.barrier()
    if gate:
        gate.open()
    event.current_stream_wait()
    same(combined, expected)


def check_overlaps_with_a_late_rank(rank: int, backend: str) -> None:
    """What a rank does while another is late costs it nothing."""
    buffer = buffer_of(backend)
    rows, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    late, work = 1.5, 1.0
    dist.barrier()
    if rank == 1:
        time.sleep(late)
        buffer.combine(rows, handle)
        return
    start = time.monotonic()
    event = buffer.combine(rows, handle, async_finish=True)[2]
    returned = time.monotonic() - start
    deadline = start + work
    steps = 0
    while time.monotonic() < deadline:
        (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
        steps += 1
    assert not is_complete(event)
    event.current_stream_wait()
    whole = time.monotonic() - start
    assert returned < work / 2
    assert steps > 10
    assert whole > late - 0.3  # it did wait for the other, and
    assert whole < late + work - 0.1 or whole > 10 * late  # not after its own work (or the machine
    # was so slow that nothing can be told)


def check_errors(rank: int, backend: str) -> None:
    """One rank's bad arguments raise there at once and on the others at the wait."""
    buffer = buffer_of(backend)
    rows, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    other = send(buffer, CASE, rank, True, torch.float32)[3]
    if rank == 1:
        with pytest.raises(ValueError, match="combine: expected x to be"):
            buffer.combine(rows[1:], handle, async_finish=True)
    else:
        event = buffer.combine(rows, handle, async_finish=True)[2]
        with pytest.raises(ValueError, match="rank 1: expected x to be"):
            event.current_stream_wait()
    check_goes_on(rank, buffer)

    # They disagree; what stands behind goes on.
    event = buffer.combine(rows, handle if rank else other, async_finish=True)[2]
    after = buffer.combine(rows, handle, async_finish=True)
    with pytest.raises(ValueError, match=r"expected the handle .* to be the same on all ranks"):
        event.current_stream_wait()
    after[2].current_stream_wait()
    same(after[0], buffer.combine(rows, handle)[0])

    # A fresh dispatch waits for counts, and so raises in the call.
    idx = CASE.topk_idx(rank)
    if rank == 1:
        idx[3, 0] = 99
    with pytest.raises(ValueError, match="got 99"):
        fresh(buffer, CASE, rank, topk_idx=idx, async_finish=True)
    check_goes_on(rank, buffer)


def check_failed_producer(rank: int, backend: str) -> None:
    """What a call waits for fails on one rank: all hear of it, and the Buffer goes on."""
    buffer = buffer_of(backend)
    rows, _, _, handle = send(buffer, CASE, rank, True, torch.float32)

    def fail() -> None:
        if rank == 1:
            raise OSError("the disk is full")

    for calls in (1, 2):
        gate = Gate(fail)
        gate.open()
        if calls == 1:
            event: EventOverlap | EventHandle = buffer.combine(
                rows, handle, previous_event=gate.event, async_finish=True
            )[2]
            with pytest.raises((OSError, ValueError), match="the disk is full"):
                event.current_stream_wait()
        else:
            with pytest.raises((OSError, ValueError), match="the disk is full"):
                buffer.combine(rows, handle, previous_event=EventOverlap(gate.event))
        with (
            pytest.raises(OSError, match="disk is full") if rank == 1 else contextlib.nullcontext()
        ):
            gate.event.current_stream_wait()
        check_goes_on(rank, buffer)


def check_inputs(rank: int, backend: str) -> None:
    """Inputs may be dropped after the call; taking their memory away too early is an error."""
    buffer = buffer_of(backend)
    rows, _, _, handle = send(buffer, LARGE, rank, True, torch.float32)
    expected = buffer.combine(rows * 2, handle)[0]
    gate = Gate()
    y = rows * 2
    combined, _, event = buffer.combine(y, handle, previous_event=gate.event, async_finish=True)
    del y
    noise = [torch.full_like(rows, float("nan")) for _ in range(4)]
    gate.open()
    event.current_stream_wait()
    same(combined, expected)
    assert noise
    gate = Gate()
    y = rows * 2
    event = buffer.combine(y, handle, previous_event=gate.event, async_finish=True)[2]
    if rank == 1:
        y.untyped_storage().resize_(0)
    gate.open()
    with pytest.raises(ValueError, match="expected the inputs to keep their memory"):
        event.current_stream_wait()
    check_goes_on(rank, buffer)


def check_destroy(rank: int, backend: str) -> None:
    """destroy() stands behind what is queued; the thread and the Buffer go."""
    assert dist.group.WORLD is not None
    buffer = Buffer(dist.group.WORLD, config=buffer_of(backend).config)
    rows, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    expected = buffer.combine(rows, handle)[0]
    gate = Gate()
    combined, _, event = buffer.combine(rows, handle, previous_event=gate.event, async_finish=True)
    gate.open_soon()
    buffer.destroy()
    event.current_stream_wait()
    same(combined, expected)
    with pytest.raises(RuntimeError, match="expected a stream in use, got one that was closed"):
        buffer.combine(rows, handle, async_finish=True)
    with pytest.raises(RuntimeError, match="it was destroyed"):
        buffer.combine(rows, handle)


CHECKS = [
    check_many_queued,
    check_sync_is_behind,
    check_own_connections,
    check_overlaps_with_a_late_rank,
    check_errors,
    check_failed_producer,
    check_inputs,
    check_destroy,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=[c.__name__.removeprefix("check_") for c in CHECKS])
def test_async(check: Callable[..., None], backend: str) -> None:
    run_on_ranks(2, check, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CASE, LARGE], ids=lambda case: case.name)
@pytest.mark.parametrize("expand", [False, True], ids=["by rank", "by expert"])
def test_nothing_is_read_too_early(backend: str, case: Case, expand: bool) -> None:
    run_on_ranks(2, check_late_producer, backend, case, expand)
