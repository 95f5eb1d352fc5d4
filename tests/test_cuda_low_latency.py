"""Low-latency calls of the public Buffer on emulated GPUs: the definition's bits, whatever order.

The checks are those of the CPU backends (tests/test_low_latency.py); the kernels are those of the
built extension.
"""

import threading
from collections.abc import Callable

import pytest
import torch

from ep_megatron import Buffer, fp8
from ep_megatron.backends.packed import COMBINE, DISPATCH, LowLatencyCall
from ep_megatron.backends.packed_window import Window
from tests.packed_cases import PackedCase, check_packed, expected_combined

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.buffers import Buffers, NodeBuffers
from tests.test_dispatch import bits
from tests.test_low_latency import (
    CASES,
    FLAGS,
    RECIPES,
    check_bad_input_of,
    check_cases,
    check_hooks_of,
    check_steps_of,
    experts_rows,
)

TIMEOUT = 0.1  # seconds of the emulated clock, which counts instructions


def no_report(buffers: Buffers | NodeBuffers) -> None:
    assert buffers.machine.report() == []


@pytest.mark.parametrize("num_ranks", sorted({case.num_ranks for case in CASES.values()}))
def test_rows_and_sums_are_those_of_the_definition(num_ranks: int) -> None:
    cases = [case for case in CASES.values() if case.num_ranks == num_ranks]
    buffers = Buffers(num_ranks)
    buffers.call(check_cases, cases, list(RECIPES))
    no_report(buffers)


def test_hooks() -> None:
    buffers = Buffers(2)
    buffers.call(check_hooks_of)
    no_report(buffers)


@pytest.mark.parametrize(("mode", "seed"), [("plain", 0), ("race", 1), ("weak", 2)])
def test_many_steps_out_of_step(mode: str, seed: int) -> None:
    buffers = Buffers(3, seed, mode)
    buffers.call(check_steps_of, 12 if mode == "plain" else 5)
    no_report(buffers)


def test_bad_input_raises_everywhere_and_the_next_call_works() -> None:
    buffers = Buffers(2)
    buffers.call(check_bad_input_of)
    no_report(buffers)


MASKS = PackedCase((6, 7, 8))


def step(buffer: Buffer, rank: int, number: int, masked: tuple[int, ...] = ()) -> None:
    """One dispatch and combine, compared with the definition less the masked ranks."""
    idx = MASKS.topk_idx(rank, number)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(
        MASKS.x(rank, number), idx, MASKS.capacity, MASKS.num_experts, use_fp8=False
    )
    assert isinstance(recv, torch.Tensor)
    check_packed(MASKS, rank, recv, count, handle, None, number, masked)
    rows = experts_rows(MASKS, rank, recv)
    out, _, _ = buffer.low_latency_combine(rows, idx, MASKS.weights(rank, number), handle)
    assert torch.equal(out, expected_combined(MASKS, rank, number, masked))


def masks(buffer: Buffer) -> list[int]:
    status = torch.full((3,), -1, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def mask_by_hand(rank: int, buffer: Buffer, meet: Callable[[], object]) -> list[int]:
    for other in range(3):
        if other != rank and (rank == 1 or other == 1):
            buffer.low_latency_update_mask_buffer(other, True)
    meet()
    for number in range(2):
        step(buffer, rank, number, (0, 2) if rank == 1 else (1,))
    found = masks(buffer)
    meet()
    buffer.low_latency_clean_mask_buffer()
    meet()
    step(buffer, rank, 2)
    assert masks(buffer) == [0, 0, 0]
    with pytest.raises(ValueError, match="another rank"):
        buffer.low_latency_update_mask_buffer(rank, True)
    return found


def test_masks_by_hand() -> None:
    buffers = Buffers(3, enable_shrink=True)
    barrier = threading.Barrier(3)
    found = buffers.call(mask_by_hand, barrier.wait)
    assert found == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    no_report(buffers)


def stay_away(rank: int, buffer: Buffer) -> list[int]:
    step(buffer, rank, 0)
    if rank == 1:
        return []
    for number in range(1, 5):
        step(buffer, rank, number, (1,))
    return masks(buffer)


@pytest.mark.parametrize("mode", ["plain", "weak"])
def test_a_rank_that_stays_away_costs_its_tokens_only(mode: str) -> None:
    buffers = Buffers(3, 3, mode, timeout=TIMEOUT, enable_shrink=True)
    assert buffers.call(stay_away) == [[0, 1, 0], [], [0, 1, 0]]
    no_report(buffers)


def come_late(rank: int, buffer: Buffer, others_are_done: threading.Event) -> list[int]:
    step(buffer, rank, 0)
    if rank == 1:
        assert others_are_done.wait(120)
        step(buffer, rank, 1, (0, 2))  # it finds out that it was masked
        return masks(buffer)
    for number in range(1, 3):
        step(buffer, rank, number, (1,))
    if rank == 0:
        others_are_done.set()
    return masks(buffer)


def test_a_late_rank_is_masked_and_knows() -> None:
    buffers = Buffers(3, timeout=TIMEOUT, enable_shrink=True)
    assert buffers.call(come_late, threading.Event()) == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


def be_named(rank: int, buffer: Buffer) -> str:
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError, match=r"low_latency_dispatch: .*no answer from rank 1") as e:
        step(buffer, rank, 0)
    with pytest.raises(RuntimeError, match="make a new Buffer"):
        step(buffer, rank, 1)
    return str(e.value)


def test_without_masks_a_rank_that_stays_away_is_named() -> None:
    buffers = Buffers(3, timeout=TIMEOUT)
    assert buffers.call(be_named)[1] == ""
    no_report(buffers)


def two_zero_copies(rank: int, buffer: Buffer) -> None:
    """Combines with the caller's buffer and without, in all orders that two places allow."""
    case = PackedCase((5, 6))
    idx, weights = case.topk_idx(rank), case.weights(rank)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        case.x(rank), idx, case.capacity, case.num_experts, use_fp8=False
    )
    assert isinstance(recv, torch.Tensor)
    rows, expected = experts_rows(case, rank, recv), expected_combined(case, rank)
    for order in ("zzz", "szs", "Rs", "zs", "Rsz"):
        for how in order:
            if how == "R":  # reserved now, used by a later z
                place = buffer.get_next_low_latency_combine_buffer(handle)
                continue
            if how == "z":
                place = buffer.get_next_low_latency_combine_buffer(handle)
                place.copy_(rows)
            out, _, _ = buffer.low_latency_combine(rows, idx, weights, handle, zero_copy=how == "z")
            assert torch.equal(out, expected), (order, how)


@pytest.mark.parametrize("mode", ["plain", "race", "weak"])
def test_zero_copy_and_staged_combines_in_turn(mode: str) -> None:
    buffers = Buffers(2, 5, mode)
    buffers.call(two_zero_copies)
    no_report(buffers)


def too_large(rank: int, buffer: Buffer) -> str:
    case = PackedCase((5, 6), hidden=512, capacity=64)
    with pytest.raises(ValueError, match="num_rdma_bytes of the Buffer") as error:
        buffer.low_latency_dispatch(
            case.x(rank), case.topk_idx(rank), case.capacity, case.num_experts, use_fp8=False
        )
    check_cases(rank, buffer, [PackedCase((3, 4))], ["bf16"])
    return str(error.value)


def test_a_call_that_does_not_fit_raises_on_every_rank() -> None:
    buffers = Buffers(2, window_bytes=1 << 18)
    errors = buffers.call(too_large)
    assert "at least 1052672, got 262144" in errors[0]


@pytest.mark.parametrize("hidden", [128, 256, 512, 7168])
@pytest.mark.parametrize("num_experts", [8, 256])
def test_the_size_hint_is_enough(hidden: int, num_experts: int) -> None:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(128, hidden, 8, num_experts)
    window = Window(num_bytes)
    for operation in (DISPATCH, COMBINE):
        for recipe in (None, *RECIPES.values()):
            code = 0 if recipe is None else recipe.code
            if recipe is None or hidden % 512 == 0 or recipe.scales != "packed_ue8m0":
                assert not window.refusal(LowLatencyCall(operation, 128, hidden, num_experts, code))


def far_values(rank: int, buffer: Buffer) -> None:
    """Casts of NaN, infinity and zero are those of `fp8.quantize`; a window is used twice."""
    case = PackedCase((6, 7), hidden=1024)
    x, idx = case.x(rank).double(), case.topk_idx(rank)
    x *= torch.exp2(torch.arange(case.hidden) % 37 - 18)
    x = x.bfloat16()
    x[1, 100], x[2, 200], x[3] = torch.nan, -torch.inf, 0
    for kind, recipe in RECIPES.items():
        if recipe is None:
            continue
        recv, count, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, case.capacity, case.num_experts, **FLAGS[kind]
        )
        data, scales = fp8.quantize(x, recipe)
        assert isinstance(recv, tuple)
        for expert in range(case.experts_per_rank):
            begin, rows = divmod(int(handle.packed_recv_layout_range[expert, rank]), 1 << 32)
            tokens = handle.packed_recv_src_info[expert, begin : begin + rows].long()
            got = [part[expert, begin : begin + rows].contiguous() for part in recv]
            assert torch.equal(bits(got[0]), bits(data[tokens]))
            assert torch.equal(bits(got[1]), bits(scales[tokens].contiguous()))
        assert int(count.sum()) > 0


def test_rows_are_cast_as_they_are_sent() -> None:
    buffers = Buffers(2)
    buffers.call(far_values)
    no_report(buffers)


def bad_handles(rank: int, buffer: Buffer) -> None:
    """A layout that dispatch cannot have written raises on both ranks; so does a false expert."""
    case = PackedCase((4, 4), idx_dtype=torch.int32)
    idx, weights = case.topk_idx(rank), case.weights(rank)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        case.x(rank), idx, case.capacity, case.num_experts, use_fp8=False
    )
    assert isinstance(recv, torch.Tensor)
    rows = experts_rows(case, rank, recv)
    for value in (9, -1 << 32, 16 << 32 | 1):
        wrong = handle.packed_recv_layout_range.clone()
        if rank == 1:
            wrong[1, 0] = value
        with pytest.raises(ValueError, match="layout_range to be as dispatch wrote it"):
            buffer.low_latency_combine(
                rows, idx, weights, handle._replace(packed_recv_layout_range=wrong)
            )
    wrong_idx = idx.clone()
    wrong_idx[2, 1] = 99 if rank == 0 else idx[2, 1]
    with pytest.raises(ValueError, match=r"got 99 for token 2"):
        buffer.low_latency_combine(rows, wrong_idx, weights, handle)
    out, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
    assert torch.equal(out, expected_combined(case, rank))


def test_what_a_kernel_finds_wrong_raises_on_every_rank() -> None:
    buffers = Buffers(2)
    buffers.call(bad_handles)
    no_report(buffers)


def many_tokens(rank: int, buffer: Buffer) -> None:
    """More rows than warps, rows of several steps, and every cast."""
    many = PackedCase((150, 3), num_topk=8, experts_per_rank=6, capacity=150, hidden=512)
    wide = PackedCase((3, 3), experts_per_rank=40, hidden=5632, capacity=3)
    check_cases(rank, buffer, [many, wide], list(RECIPES))
    bad = many.topk_idx(rank)
    bad[2, 1] = many.num_experts
    with pytest.raises(ValueError, match="for token 2"):
        buffer.low_latency_dispatch(many.x(rank), bad, many.capacity, many.num_experts)
