"""One cell of the fault matrix: a fault of rank 1 at one moment of a step, as each rank sees it.

Ranks 0 and 2 live on from cell to cell, and go on after each as a group of two; rank 1 is a fresh
process every time. In the hierarchical backend rank 0 is alone on its host.
"""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig, layout
from ep_megatron.backends.base import OPERATIONS, Call, Rows
from ep_megatron.backends.shared_memory import SharedMemoryBackend
from tests.packed_cases import PackedCase
from tests.puppet import CONTROL_BYTES, NO_PLACE, mapped_segments
from tests.routing import Case
from tests.test_dispatch import send

VICTIM = 1
CASE = Case("fault cells", (40, 30, 20), hidden=64)
PACKED = PackedCase((6, 7, 8))
# In the order of a step; the numbers are those of their calls.
# A layout is local: its rank is missed in the dispatch that follows.
CALLS = {
    "layout": 2, "dispatch": 2, "cached dispatch": 3, "combine": 4, "queued combine": 5,
}  # fmt: skip
PACKED_CALLS = {"low_latency_dispatch": 1, "low_latency_combine": 2}
LATE_SECONDS = 0.6  # rank 2 behind the others, where rank 1 is struck while it waits
STRIKE_AFTER = 0.2


@dataclass(frozen=True)
class Moment:
    """When rank 1 is struck: before, waiting in, inside, after or "after sending" one call."""

    when: str
    call: str

    def __str__(self) -> str:
        return f"{self.when} {self.call}"

    @property
    def is_packed(self) -> bool:
        return self.call in PACKED_CALLS


@dataclass(frozen=True)
class Cell:
    backend: str
    moment: Moment
    fault: str  # "kill", "stop" or "raise"
    timeout: float


def strike(fault: str) -> None:
    if fault == "raise":
        raise KeyError("the caller's own trouble")
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def _strike_later(fault: str) -> None:
    """Strike while the main thread waits, from the thread that may raise there or any other."""
    if fault == "raise":
        signal.signal(signal.SIGALRM, lambda *_: strike(fault))
        signal.setitimer(signal.ITIMER_REAL, STRIKE_AFTER)
    else:
        threading.Timer(STRIKE_AFTER, strike, (fault,)).start()


def _strike_inside(buffer: Buffer, moment: Moment, fault: str, handle: Any) -> None:
    """Let the next call of `buffer` strike once the ranks have agreed, before its rows move."""
    backend: Any = buffer._backend
    if moment.call == "layout":
        _strike_first(layout, "count_tokens", fault)
        return
    if isinstance(backend, SharedMemoryBackend):
        if moment.call == "dispatch":
            dispatch = backend.dispatch
            backend.dispatch = lambda rows, routing, _=None: dispatch(  # type: ignore
                rows, routing, lambda *_: strike(fault)
            )
        else:
            _post_by_hand(backend, Call.of(moment.call, Rows(CASE.x(1, torch.float32)), handle))
            strike(fault)
        return
    owner, name = backend, "_deliver"
    if buffer.backend == "process_group" and moment.call == "combine":
        name = "_send_back"
    elif buffer.backend == "hierarchical":
        is_combine = moment.call == "combine"
        owner, name = (backend._inside, "combine") if is_combine else (backend, "_cross")
    _strike_first(owner, name, fault)


def _strike_first(owner: Any, name: str, fault: str) -> None:
    whole = getattr(owner, name)

    def struck(*arguments: Any, **named: Any) -> Any:
        strike(fault)
        return whole(*arguments, **named)  # who was stopped goes on

    setattr(owner, name, struck)


def _post_by_hand(backend: SharedMemoryBackend, call: Call) -> None:
    """Do what a call of compiled code does first, and no more: the others take this rank for in."""
    words = mapped_segments()
    epoch = words[VICTIM].epoch() + 1
    words[VICTIM].begin(epoch, call.operation)
    offer = CONTROL_BYTES if call.operation == OPERATIONS.index("combine") else NO_PLACE
    committed = CONTROL_BYTES + backend.num_bytes_committed
    words[VICTIM].post(epoch, list(call), committed=committed, rows_offset=offer)
    for rank in words.keys() - {VICTIM}:
        words[rank].raise_flag("posted", VICTIM, epoch)


def take_step(rank: int, buffer: Buffer, cell: Cell | None) -> None:
    """One step of all calls, or of all low-latency calls; with `cell` it ends in an error."""
    handle: Any = None

    def at(when: str, call: str) -> None:
        moment = cell.moment if cell is not None else None
        if cell is None or moment is None or moment.call != call:
            return
        if rank == VICTIM and moment.when == when:
            strike(cell.fault)
        if when != "before" or moment.when == "before":
            return
        if rank == VICTIM and moment.when == "waiting in":
            _strike_later(cell.fault)
        elif rank == VICTIM and moment.when == "inside":
            _strike_inside(buffer, moment, cell.fault, handle)
        elif rank == 2 and moment.when == "waiting in":
            time.sleep(LATE_SECONDS)

    if cell is not None and cell.moment.is_packed:
        _packed_step(rank, buffer, at)
        return
    send(buffer, CASE, rank, True, torch.float32)
    at("before", "layout")
    buffer.get_dispatch_layout(CASE.topk_idx(rank), CASE.num_experts)
    at("after", "layout")
    at("before", "dispatch")
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    at("before", "cached dispatch")
    again = buffer.dispatch(CASE.x(rank, torch.float32), handle=handle)[0]
    assert isinstance(again, torch.Tensor)
    assert torch.equal(again, recv_x)
    at("before", "combine")
    combined = buffer.combine(recv_x, handle)[0]
    at("before", "queued combine")
    queued, _, event = buffer.combine(recv_x, handle, async_finish=True)
    event.current_stream_wait()
    used = (CASE.topk_idx(rank) >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(combined, CASE.x(rank, torch.float32) * used)
    assert torch.equal(queued, combined)
    buffer.dispatch(CASE.x(rank, torch.float32), handle=handle)


def _packed_step(rank: int, buffer: Buffer, at: Callable[[str, str], None]) -> None:
    idx = PACKED.topk_idx(rank)
    at("before", "low_latency_dispatch")
    recv, _, handle, _, hook = buffer.low_latency_dispatch(
        PACKED.x(rank), idx, PACKED.capacity, PACKED.num_experts, use_fp8=False,
        return_recv_hook=True,
    )  # fmt: skip
    at("after sending", "low_latency_dispatch")
    assert hook is not None
    hook()
    assert isinstance(recv, torch.Tensor)
    at("before", "low_latency_combine")
    _, _, hook = buffer.low_latency_combine(
        recv, idx, PACKED.weights(rank), handle, return_recv_hook=True
    )
    at("after sending", "low_latency_combine")
    assert hook is not None
    hook()
    for _ in range(2):  # a rank that has sent its part is missed in the call after the next
        buffer.clean_low_latency_buffer(PACKED.capacity, PACKED.hidden, PACKED.num_experts)


def _join(store: str, rank: int, num_ranks: int) -> dist.ProcessGroup:
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), num_ranks, rank)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _make_buffer(group: dist.ProcessGroup, rank: int, cell: Cell, timeout: float) -> Buffer:
    host_id = "A" if rank == 0 else "B"  # for a backend that asks
    config = BufferConfig(backend=cell.backend, timeout=timeout, host_id=host_id)
    return Buffer(group, low_latency_mode=cell.moment.is_packed, config=config)


def endure(rank: int, store: str, cell: Cell) -> tuple[str, str, float]:
    """Take a step in which rank 1 is struck; return what was raised, its text, and after how long.

    The start of that time is the end of the last call without a fault.
    """
    group = _join(store, rank, 3)
    buffer = _make_buffer(group, rank, cell, cell.timeout)
    dist.barrier()
    start = time.monotonic()
    try:
        take_step(rank, buffer, cell)
        outcome = ("returned", "", time.monotonic() - start)
    except RuntimeError as error:  # or one of its kinds
        outcome = ("RuntimeError", str(error), time.monotonic() - start)
        del error
    except Exception as error:
        outcome = (type(error).__name__, str(error), time.monotonic() - start)
        del error
    if rank == VICTIM and cell.fault == "raise":
        os._exit(0)  # as the end of a script: nothing is closed or said
    if outcome[0] == "RuntimeError":
        outcome = _expect_broken(rank, buffer, cell, outcome)
    del buffer
    gc.collect()
    return outcome


def _expect_broken(
    rank: int, buffer: Buffer, cell: Cell, outcome: tuple[str, str, float]
) -> tuple[str, str, float]:
    """After an error the Buffer says so at once, and waits for nobody."""
    start = time.monotonic()
    try:
        if cell.moment.is_packed:
            buffer.clean_low_latency_buffer(PACKED.capacity, PACKED.hidden, PACKED.num_experts)
        else:
            send(buffer, CASE, rank, True, torch.float32)
    except RuntimeError as error:
        text = str(error)
        if "expected a working Buffer, got one that broke down" not in text:
            return ("no break-down", text, 0)
        if time.monotonic() - start > 5:
            return ("late break-down", text, 0)
        return outcome
    return ("no error", "after an error the Buffer went on", 0)


def leave_group(rank: int) -> None:
    dist.destroy_process_group()
    gc.collect()


def go_on(rank: int, store: str, cell: Cell) -> dict[str, int]:
    """Make a group and a Buffer of ranks 0 and 2, use them, and count what the process holds."""
    new_rank = rank // 2
    group = _join(store, new_rank, 2)
    buffer = _make_buffer(group, rank, cell, 60)
    case = Case("the others", (40, 20), hidden=64)
    recv_x, _, _, handle = send(buffer, case, new_rank, True, torch.float32)
    combined = buffer.combine(recv_x, handle)[0]
    used = (case.topk_idx(new_rank) >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(combined, case.x(new_rank, torch.float32) * used)
    dist.barrier()
    del buffer, group, recv_x, handle
    leave_group(rank)
    return held()


def held() -> dict[str, int]:
    """Count what could be left behind: threads, descriptors, mapped segments."""
    deadline = time.monotonic() + 5
    while True:  # threads end a moment after their owner
        gc.collect()
        names = [thread.name for thread in threading.enumerate()]
        ours = sum("ep_megatron" in name for name in names)
        if ours == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return {
        "own threads": ours,
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "segments": Path("/proc/self/maps").read_text().count("/ep_megatron."),
    }


def serve(rank: int, pipe: Connection) -> None:
    """Run what the test sends, until it hangs up."""
    torch.set_num_threads(1)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(rank, *args)))
        except BaseException as error:
            pipe.send((f"{type(error).__name__}: {error}", None))


def held_by(rank: int) -> dict[str, int]:
    return held()
