"""Low-latency calls in which every synchronising instruction matters; see tests/cuda/workloads.py.

Most of them have a rank masked at a certain moment of another's kernel. A `Gate` is in the way of
that kernel until then: a call of the host's in front of one of its acquire loads.
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ep_megatron import Buffer
from ep_megatron.backends.packed_cuda import PackedCuda
from tests.cuda.buffers import Buffers, NodeBuffers
from tests.cuda.packed_graphs import SIZES, give_bad_indices, replayed
from tests.packed_cases import PackedCase, check_packed
from tests.test_cuda_low_latency import (
    TIMEOUT,
    bad_handles,
    be_named,
    come_late,
    mask_by_hand,
    stay_away,
    two_zero_copies,
)
from tests.test_low_latency import check_bad_input_of, check_hooks_of, check_steps_of, experts_rows

_FLAGS = Path(__file__).parents[2] / "csrc" / "cuda" / "low_latency_flags.cu"
Reports = list[tuple[str, str]]
Workload = Callable[[list[str], int, str], Reports]
_GATE = """
{ .reg .b32 %gated; .reg .pred %is_shut; .param .b32 back;
ep_gate_again: call.uni (back), ep_gate, (); ld.param.b32 %gated, [back+0];
setp.ne.u32 %is_shut, %gated, 0; @%is_shut bra ep_gate_again; }
"""


def _called(buffers: Buffers | NodeBuffers, *functions: Callable[..., Any]) -> Reports:
    for function in functions:
        buffers.call(function)
    reports: Reports = buffers.machine.report()
    return reports


def _but_races(reports: Reports) -> Reports:
    """Leave out what is read or written at once and thrown away; see docs/kernels.md."""
    return [(kind, text) for kind, text in reports if kind != "race"]


def packed_steps(kernels: list[str], seed: int, mode: str) -> Reports:
    """Many steps out of step, with and without hooks and zero-copy."""
    buffers = Buffers(3, seed, mode, kernels=kernels)
    return _called(buffers, lambda rank, buffer: check_steps_of(rank, buffer, 4))


def packed_hooks(kernels: list[str], seed: int, mode: str) -> Reports:
    """Two calls under way at once, and rows that readers of two combines share."""
    return _called(Buffers(2, seed, mode, kernels=kernels), check_hooks_of, two_zero_copies)


def packed_far(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls between three ranks of two nodes, out of step."""
    buffers = NodeBuffers("ABA", seed, mode, kernels=kernels)
    return _called(buffers, lambda rank, buffer: check_steps_of(rank, buffer, 4))


def packed_replays(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls of graphs, their rows copied or not, and such that all ranks refuse."""
    buffers = Buffers(3, seed, mode, kernels=kernels)
    case = PackedCase(SIZES[3])
    for how in ("odd", "zero_copy"):
        buffers.call(replayed, buffers.devices, case, "bf16", how)
    buffers.call(give_bad_indices, buffers.devices)
    reports: Reports = buffers.machine.report()
    return reports


def packed_refused(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls that all ranks refuse, for values: of indices, of a layout."""
    return _called(Buffers(2, seed, mode, kernels=kernels), bad_handles)


def packed_disagreed(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls that all ranks refuse, for anything; ranks of unequal sizes push to the same slots."""
    return _but_races(_called(Buffers(2, seed, mode, kernels=kernels), check_bad_input_of))


def packed_masked(kernels: list[str], seed: int, mode: str) -> Reports:
    """Ranks that mask each other by hand and take each other back."""
    buffers = Buffers(3, seed, mode, enable_shrink=True, kernels=kernels)
    barrier = threading.Barrier(3)
    found = buffers.call(mask_by_hand, barrier.wait)
    assert found == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    return _called(buffers)


def packed_absent(kernels: list[str], seed: int, mode: str) -> Reports:
    """A rank that stays away and is masked."""
    buffers = Buffers(3, seed, mode, timeout=TIMEOUT, enable_shrink=True, kernels=kernels)
    assert buffers.call(stay_away) == [[0, 1, 0], [], [0, 1, 0]]
    return _but_races(_called(buffers))


def packed_late(kernels: list[str], seed: int, mode: str) -> Reports:
    """A rank that comes after it was masked, and finds out."""
    buffers = Buffers(3, seed, mode, timeout=TIMEOUT, enable_shrink=True, kernels=kernels)
    found = buffers.call(come_late, threading.Event())
    assert found == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    return _but_races(_called(buffers))


def packed_named(kernels: list[str], seed: int, mode: str) -> Reports:
    """A rank that stays away, where that is an error."""
    buffers = Buffers(3, seed, mode, timeout=TIMEOUT, kernels=kernels)
    assert buffers.call(be_named)[1] == ""
    return _called(buffers)


# -- at a certain moment --------------------------------------------------------------------------

TWO = PackedCase((6, 7))
THREE = PackedCase((6, 7, 5))


class Gate:
    """Holds one rank's kernel before it looks at a flag, while the gate is shut."""

    def __init__(self, rank: int) -> None:
        self._rank, self.has_come, self._is_open = rank, threading.Event(), threading.Event()

    def open(self) -> None:
        """Let the kernel go on, now and until it is shut."""
        self._is_open.set()

    def shut(self) -> None:
        """Hold the kernel when it comes again."""
        self._is_open.clear()

    def __call__(self, rank: int, _lane: int, _arguments: tuple[int, ...]) -> int:
        """Return whether a lane waits."""
        is_shut = rank == self._rank and not self._is_open.is_set()
        if is_shut:
            self.has_come.set()
        return is_shut

    @staticmethod
    def put(kernels: list[str], kernel: str, look: str, number: int = 0) -> list[str]:
        """Return the kernels with a gate in one of them.

        It is in front of the `number`-th load that comes from a line of the source with `look`.
        """
        lines, texts = _FLAGS.read_text().splitlines(), []
        for text in kernels:
            head, entry, body = text.partition(f".entry {kernel}(")
            if entry:
                found = [
                    load.start()
                    for load in re.finditer(r"ld\.(acquire|relaxed)\.\S*u64", body)
                    if look in lines[_line_at(body[: load.start()]) - 1]
                ]
                extern = ".address_size 64\n.extern .func (.param .b32 back) ep_gate ();"
                head = head.replace(".address_size 64", extern, 1)
                text = head + entry + body[: found[number]] + _GATE + body[found[number] :]
            texts.append(text)
        return texts


def _line_at(ptx: str) -> int:
    """Return which line of the source has called what comes next."""
    return int(ptx[ptx.rindex(" inlined_at ") :].split()[2])


class Dispatch:
    """A dispatch whose receiving half is another step."""

    def __init__(self, rank: int, buffer: Buffer, case: PackedCase, number: int) -> None:
        self._rank, self._case, self._number = rank, case, number
        x, self._idx = case.x(rank, number), case.topk_idx(rank, number)
        self.recv, self._count, self.handle, _, self._hook = buffer.low_latency_dispatch(
            x, self._idx, case.capacity, case.num_experts, use_fp8=False, return_recv_hook=True
        )

    def receive(self, masked: tuple[int, ...] = ()) -> None:
        """Compare what comes with what must, less what masked ranks have sent."""
        assert self._hook is not None
        self._hook()
        check_packed(
            self._case, self._rank, self.recv, self._count, self.handle, None, self._number, masked
        )


def _each(buffers: Buffers | NodeBuffers, *functions: Callable[[Buffer], object]) -> Reports:
    """Let every rank do its own."""
    buffers.call(lambda rank, buffer: functions[rank](buffer))
    reports: Reports = buffers.machine.report()
    return reports


def packed_masked_after(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rank 0 reads two calls and masks rank 1, which then writes to the same slots again."""
    is_masked, has_read = threading.Event(), threading.Event()

    def masker(buffer: Buffer) -> None:
        for number in (1, 2):
            Dispatch(0, buffer, TWO, number).receive()
        assert has_read.wait(120)
        buffer.low_latency_update_mask_buffer(1, True)
        is_masked.set()

    def writer(buffer: Buffer) -> None:
        for number in (1, 2):
            Dispatch(1, buffer, TWO, number).receive()
        has_read.set()
        assert is_masked.wait(120)
        under_way = [Dispatch(1, buffer, TWO, number) for number in (3, 4)]
        for dispatch in under_way:
            dispatch.receive((0,))

    return _each(Buffers(2, seed, mode, enable_shrink=True, kernels=kernels), masker, writer)


def packed_masked_both(kernels: list[str], seed: int, mode: str) -> Reports:
    """Two ranks read two calls and mask each other; then they post to the same places again."""
    barrier = threading.Barrier(2)

    def check(rank: int, buffer: Buffer) -> None:
        for number in (1, 2):
            Dispatch(rank, buffer, TWO, number).receive()
        barrier.wait(120)
        buffer.low_latency_update_mask_buffer(1 - rank, True)
        barrier.wait(120)
        for dispatch in [Dispatch(rank, buffer, TWO, number) for number in (3, 4)]:
            dispatch.receive((1 - rank,))

    return _called(Buffers(2, seed, mode, enable_shrink=True, kernels=kernels), check)


def packed_masked_in_begin(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rank 1 looks whether rank 0 is done; then that is done, and masks it before it looks again.

    What rank 0 has read in between is overwritten by rank 1's push.
    """
    gate = Gate(1)

    def masker(buffer: Buffer) -> None:
        first, second = (Dispatch(0, buffer, TWO, number) for number in (1, 2))
        assert gate.has_come.wait(120)
        first.receive()
        buffer.low_latency_update_mask_buffer(1, True)
        gate.open()
        second.receive((1,))

    def writer(buffer: Buffer) -> None:
        for dispatch in [Dispatch(1, buffer, TWO, number) for number in (1, 2)]:
            dispatch.receive()
        Dispatch(1, buffer, TWO, 3).receive((0,))

    gated = Gate.put(kernels, "ep_packed_begin_kernel", "(masked_by)")
    buffers = Buffers(2, seed, mode, enable_shrink=True, kernels=gated)
    buffers.machine.on_call("ep_gate", gate)
    return _each(buffers, masker, writer)


def packed_masked_in_meet(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rank 0 masks rank 1, which waits for its post."""
    gate = Gate(1)

    def masker(buffer: Buffer) -> None:
        assert gate.has_come.wait(120)
        buffer.low_latency_update_mask_buffer(1, True)
        gate.open()

    def waiter(buffer: Buffer) -> None:
        Dispatch(1, buffer, TWO, 1).receive((0,))

    gated = Gate.put(kernels, "ep_packed_meet_kernel", "(masked_by)")
    buffers = Buffers(2, seed, mode, enable_shrink=True, kernels=gated)
    buffers.machine.on_call("ep_gate", gate)
    return _each(buffers, masker, waiter)


def lose_rows(buffers: NodeBuffers, source: int) -> None:
    """Let no row of a rank arrive at other nodes; its posts do."""
    packed, put = buffers.buffers[source]._low_latency, buffers.machine._functions["ep_put_signal"]
    assert isinstance(packed, PackedCuda)
    begin = packed._kernels._windows[source]
    window = range(begin, begin + packed._window.num_bytes)

    def put_others(rank: int, lane: int, arguments: tuple[int, ...]) -> int | None:
        is_row = rank == source and arguments[0] in window
        return None if is_row else put(rank, lane, arguments)

    buffers.machine.on_call("ep_put_signal", put_others)


def late_rows(buffers: NodeBuffers) -> Reports:
    """The post of rank 0 comes to rank 1, of another node, and no row: rank 1 masks it."""
    lose_rows(buffers, 0)

    def sender(buffer: Buffer) -> None:
        Dispatch(0, buffer, TWO, 1).receive()

    def receiver(buffer: Buffer) -> None:
        Dispatch(1, buffer, TWO, 1).receive((0,))

    return _each(buffers, sender, receiver)


def packed_masked_before_rows(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rank 1 has the post of rank 0, of another node, and waits for its rows; then it is masked."""
    gate = Gate(1)

    def masker(buffer: Buffer) -> None:
        dispatch = Dispatch(0, buffer, TWO, 1)
        assert gate.has_come.wait(120)
        buffer.low_latency_update_mask_buffer(1, True)
        gate.open()
        dispatch.receive((1,))

    def waiter(buffer: Buffer) -> None:
        Dispatch(1, buffer, TWO, 1).receive((0,))

    gated = Gate.put(kernels, "ep_packed_meet_kernel", "(masked_by)", 1)
    buffers = NodeBuffers("AB", seed, mode, enable_shrink=True, kernels=gated)
    lose_rows(buffers, 0)
    buffers.machine.on_call("ep_gate", gate)
    return _each(buffers, masker, waiter)


def packed_masked_in_finish(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rank 2 masks rank 1, which has read its rows and has not yet looked: it reads again."""
    gate = Gate(1)

    def partner(buffer: Buffer) -> None:
        dispatch = Dispatch(0, buffer, THREE, 1)
        assert gate.has_come.wait(120)
        dispatch.receive()

    def masker(buffer: Buffer) -> None:
        dispatch = Dispatch(2, buffer, THREE, 1)
        assert gate.has_come.wait(120)
        buffer.low_latency_update_mask_buffer(1, True)
        gate.open()
        dispatch.receive((1,))

    def reader(buffer: Buffer) -> None:
        Dispatch(1, buffer, THREE, 1).receive((2,))

    gated = Gate.put(kernels, "ep_packed_finish_kernel", "masked_by")
    buffers = Buffers(3, seed, mode, enable_shrink=True, kernels=gated)
    buffers.machine.on_call("ep_gate", gate)
    return _each(buffers, partner, reader, masker)


def read_late(buffers: Buffers) -> Reports:
    """Rank 1 has not read call 1 when rank 0 wants to overwrite it, and is masked.

    When rank 1 writes call 3, rank 0 has read what was there of call 1.
    """
    is_masked = threading.Event()

    def masker(buffer: Buffer) -> None:
        for dispatch in [Dispatch(0, buffer, TWO, number) for number in (1, 2)]:
            dispatch.receive()
        Dispatch(0, buffer, TWO, 3).receive((1,))
        is_masked.set()

    def late(buffer: Buffer) -> None:
        under_way = [Dispatch(1, buffer, TWO, number) for number in (1, 2)]
        assert is_masked.wait(120)
        for dispatch in under_way:
            dispatch.receive((0,))
        Dispatch(1, buffer, TWO, 3).receive((0,))

    return _each(buffers, masker, late)


def packed_late_reader(kernels: list[str], seed: int, mode: str) -> Reports:
    """See `read_late`."""
    return read_late(Buffers(2, seed, mode, timeout=TIMEOUT, enable_shrink=True, kernels=kernels))


def packed_late_sender(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rank 1 has not sent call 3 in time; when it writes call 4, rank 0 has read call 2 there."""
    is_masked, has_read = threading.Event(), threading.Event()

    def masker(buffer: Buffer) -> None:
        for number in (1, 2):
            Dispatch(0, buffer, TWO, number).receive()
        assert has_read.wait(120)
        Dispatch(0, buffer, TWO, 3).receive((1,))
        is_masked.set()

    def late(buffer: Buffer) -> None:
        for number in (1, 2):
            Dispatch(1, buffer, TWO, number).receive()
        has_read.set()
        assert is_masked.wait(120)
        for number in (3, 4):
            Dispatch(1, buffer, TWO, number).receive((0,))

    buffers = Buffers(2, seed, mode, timeout=TIMEOUT, enable_shrink=True, kernels=kernels)
    return _each(buffers, masker, late)


def keep(buffers: Buffers) -> Reports:
    """Rank 1 does not read, and that is an error on rank 0: what is there is not overwritten."""
    has_given_up = threading.Event()

    def hasty(buffer: Buffer) -> None:
        for dispatch in [Dispatch(0, buffer, TWO, number) for number in (1, 2)]:
            dispatch.receive()
        third = Dispatch(0, buffer, TWO, 3)
        with pytest.raises(RuntimeError, match="no answer from rank 1"):
            third.receive()
        has_given_up.set()

    def slow(buffer: Buffer) -> None:
        under_way = [Dispatch(1, buffer, TWO, number) for number in (1, 2)]
        assert has_given_up.wait(120)
        for dispatch in under_way:
            dispatch.receive()

    return _each(buffers, hasty, slow)


def packed_kept(kernels: list[str], seed: int, mode: str) -> Reports:
    """See `keep`."""
    return keep(Buffers(2, seed, mode, timeout=TIMEOUT, kernels=kernels))


def packed_other_routing(kernels: list[str], seed: int, mode: str) -> Reports:
    """A combine that leaves out a row of the last rank, not of the first."""

    def check(rank: int, buffer: Buffer) -> None:
        dispatch = Dispatch(rank, buffer, TWO, 1)
        dispatch.receive()
        assert isinstance(dispatch.recv, Tensor)
        idx, weights = TWO.topk_idx(rank, 1), TWO.weights(rank, 1)
        token, slot = (idx >= TWO.experts_per_rank).nonzero()[0].tolist()
        if rank == 0:
            idx[token, slot] = -1
        rows = experts_rows(TWO, rank, dispatch.recv)
        if rank == 0:
            with pytest.raises(ValueError, match="topk_idx to be that of the dispatch"):
                buffer.low_latency_combine(rows, idx, weights, dispatch.handle)
        else:
            buffer.low_latency_combine(rows, idx, weights, dispatch.handle)

    return _called(Buffers(2, seed, mode, kernels=kernels), check)


PACKED: list[Workload] = [
    packed_steps,
    packed_hooks,
    packed_replays,
    packed_far,
    packed_masked,
    packed_refused,
    packed_disagreed,
    packed_absent,
    packed_named,
    packed_late,
    packed_masked_after,
    packed_masked_both,
    packed_masked_in_begin,
    packed_masked_in_meet,
    packed_masked_before_rows,
    packed_masked_in_finish,
    packed_late_reader,
    packed_late_sender,
    packed_kept,
    packed_other_routing,
]
