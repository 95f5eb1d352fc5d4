"""Low-latency calls at their edges: many calls, and a post that is overwritten."""

from typing import Any

import numpy as np
import pytest
import torch

from ep_megatron import Buffer
from tests.packed_cases import PackedCase, expected_combined

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from ep_megatron import _cuda
from tests.cuda.buffers import Buffers
from tests.cuda.emulated import shipped_ptx
from tests.cuda.packed_workloads import TWO, Dispatch, Gate, keep
from tests.test_cuda_low_latency import TIMEOUT
from tests.test_low_latency import check_steps_of, experts_rows

CONTROL_HEAD_BYTES = 8 * (5 * _cuda.MAX_RANKS + 2 * _cuda.MAX_EXPERTS)  # before the posts
POST_HEAD_BYTES = 624
POST_BYTES = POST_HEAD_BYTES + 4 * 2 * _cuda.MAX_EXPERTS
BEFORE_MANY = (1 << 32) - 3


def test_calls_go_on_where_32_bits_end() -> None:
    buffers = Buffers(3, mode="race")
    buffers.come_after(BEFORE_MANY)
    buffers.call(check_steps_of, 4)
    assert buffers.machine.report() == []


def combine_late(rank: int, buffer: Buffer) -> None:
    """Calls behind 32 bits of them use each other's places."""
    case = PackedCase((5, 6))
    idx, weights, expected = case.topk_idx(rank), case.weights(rank), expected_combined(case, rank)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        case.x(rank), idx, case.capacity, case.num_experts, use_fp8=False
    )
    assert isinstance(recv, torch.Tensor)
    rows = experts_rows(case, rank, recv)
    out, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
    assert torch.equal(out, expected)
    under_way = [
        buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
        for _ in range(2)
    ]
    for out, _, hook in under_way:
        assert hook is not None
        hook()
        assert torch.equal(out, expected)


def test_places_are_taken_in_turn_where_32_bits_end() -> None:
    buffers = Buffers(2, mode="race")
    buffers.come_after(BEFORE_MANY)
    buffers.call(combine_late)
    assert buffers.machine.report() == []


def test_the_call_behind_32_bits_can_break_down() -> None:
    buffers = Buffers(2, mode="race", timeout=TIMEOUT)
    buffers.come_after(BEFORE_MANY)
    assert keep(buffers) == []


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_a_post_that_is_overwritten_leads_nowhere(operation: str) -> None:
    """Rank 1 has given rank 0 up, which reads its post at that time: rows stay inside, and count
    for nothing once rank 0 finds out."""
    gate = Gate(0)
    gated = Gate.put(shipped_ptx(), "ep_packed_meet_kernel", "(flag)")
    buffers = Buffers(2, enable_shrink=True, kernels=gated)
    buffers.machine.on_call("ep_gate", gate)
    number = 1 if operation == "dispatch" else 2

    def overwrite() -> None:
        packed: Any = buffers.buffers[0]._low_latency
        post = CONTROL_HEAD_BYTES + POST_BYTES * (number % 2 * _cuda.MAX_RANKS + 1)
        wild = np.full(2 * TWO.num_experts, 1 << 28, np.int32)
        if operation == "combine":  # as many rows, but elsewhere
            at = packed._kernels._controls[0] + post + POST_HEAD_BYTES
            wild = np.frombuffer(buffers.machine.read(0, at, wild.nbytes), np.int32).copy()
            wild[::2] = 1 << 28
        buffers.machine.write(0, packed._kernels._controls[0] + post + POST_HEAD_BYTES, wild)

    def check(rank: int, buffer: Buffer) -> None:
        if operation == "combine" and rank == 0:
            gate.open()
        dispatch = Dispatch(rank, buffer, TWO, 1)
        if operation == "combine":
            dispatch.receive()
            if rank == 0:
                gate.shut()
            assert isinstance(dispatch.recv, torch.Tensor)
            idx, weights = TWO.topk_idx(rank, 1), TWO.weights(rank, 1)
            rows = experts_rows(TWO, rank, dispatch.recv)
            out, _, hook = buffer.low_latency_combine(
                rows, idx, weights, dispatch.handle, return_recv_hook=True
            )
        if rank == 1:
            assert gate.has_come.wait(120)
            buffer.low_latency_update_mask_buffer(0, True)
            overwrite()
            gate.open()
        elif operation == "dispatch":
            dispatch.receive((1,))
        else:
            assert hook is not None
            hook()
            assert torch.equal(out, expected_combined(TWO, 0, 1, (1,)))

    buffers.call(check)
