"""The low-latency verbs on every backend: layouts, sums, hooks, buffers in turn, bad input."""

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.streams import EventOverlap
from tests.packed_cases import PackedCase, check_packed, expected_combined, expert_output
from tests.ranks import run_on_ranks

BACKENDS = ("process_group", "shared_memory")
RECIPES = {
    "bf16": None,
    "fp8": Fp8Recipe(),
    "round": Fp8Recipe(scales="ue8m0"),
    "ue8m0": Fp8Recipe(scales="packed_ue8m0"),
}
FLAGS: dict[str, dict[str, Any]] = {
    "bf16": {"use_fp8": False},
    "fp8": {},
    "round": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}
CASES = {
    "one rank": PackedCase((5,)),
    "two ranks": PackedCase((8, 3), hidden=512),
    "three ranks": PackedCase((5, 8, 1), num_topk=4, experts_per_rank=1),
    "int32": PackedCase((4, 4), idx_dtype=torch.int32, experts_per_rank=3),
    "no tokens here": PackedCase((0, 6)),
    "no tokens": PackedCase((0, 0)),
    "one expert": PackedCase((8, 8, 8), style="one_expert"),
    "an expert twice": PackedCase((3, 3), style="repeated"),
    "holes": PackedCase((7, 7, 2), style="holes", num_topk=5, experts_per_rank=3),
    **{
        f"top {k}": PackedCase((4, 5), num_topk=k, experts_per_rank=4, capacity=8)
        for k in (1, 2, 5, 6, 7, 8)
    },
    **{
        f"{ranks} ranks": PackedCase(tuple(range(1, ranks + 1)), num_topk=2)
        for ranks in (4, 5, 6, 7, 8)
    },
}


@functools.cache
def buffer_of(backend: str) -> Buffer:
    assert dist.group.WORLD is not None
    config = BufferConfig(backend=backend, timeout=60)
    return Buffer(dist.group.WORLD, low_latency_mode=True, config=config)


def experts_rows(case: PackedCase, rank: int, x: Tensor) -> Tensor:
    first = rank * case.experts_per_rank
    return torch.stack([expert_output(rows, first + e) for e, rows in enumerate(x)])


def check_all(rank: int, backend: str, cases: list[PackedCase], kinds: list[str]) -> None:
    check_cases(rank, buffer_of(backend), cases, kinds)


def check_cases(rank: int, buffer: Buffer, cases: list[PackedCase], kinds: list[str]) -> None:
    """Dispatch and combine of every case, compared with loops over the definition."""
    for step, case in enumerate(cases):
        for kind in kinds:
            if kind == "ue8m0" and case.hidden % 512:
                continue
            idx = case.topk_idx(rank, step)
            recv, count, handle, _, hook = buffer.low_latency_dispatch(
                case.x(rank, step), idx, case.capacity, case.num_experts, **FLAGS[kind]
            )
            assert hook is None
            check_packed(case, rank, recv, count, handle, RECIPES[kind], step)
            if kind != "bf16":
                continue
            assert isinstance(recv, Tensor)
            out, _, _ = buffer.low_latency_combine(
                experts_rows(case, rank, recv), idx, case.weights(rank, step), handle
            )
            expected = expected_combined(case, rank, step)
            assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_ranks", sorted({case.num_ranks for case in CASES.values()}))
def test_rows_and_sums_are_those_of_the_definition(backend: str, num_ranks: int) -> None:
    cases = [case for case in CASES.values() if case.num_ranks == num_ranks]
    run_on_ranks(num_ranks, check_all, backend, cases, list(RECIPES))


def check_hooks(rank: int, backend: str) -> None:
    check_hooks_of(rank, buffer_of(backend))


def check_hooks_of(rank: int, buffer: Buffer) -> None:
    """The sending halves of two calls run before any receiving half; hooks in either order."""
    case = PackedCase((6, 7))
    sent: list[Any] = []
    for step in range(2):
        x, idx = case.x(rank, step), case.topk_idx(rank, step)
        recv, count, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, case.capacity, case.num_experts, use_fp8=False, return_recv_hook=True
        )
        x.fill_(99)  # read already
        idx.fill_(0)
        assert hook is not None
        assert not count.any()  # nothing is there before the hook
        sent.append((recv, count, handle, hook))
    with pytest.raises(ValueError, match="at most two calls"):
        buffer.low_latency_dispatch(
            case.x(rank), case.topk_idx(rank), case.capacity, case.num_experts
        )
    for step in (1, 0):
        recv, count, handle, hook = sent[step]
        hook()
        check_packed(case, rank, recv, count, handle, None, step)
    count.fill_(-1)
    sent[0][3]()  # a second time: nothing happens
    assert (count == -1).all()
    recv, _, handle, _ = sent[0]
    rows = experts_rows(case, rank, recv)
    out = torch.empty(case.num_tokens[rank], case.hidden, dtype=torch.bfloat16)
    same, event, hook = buffer.low_latency_combine(
        rows, case.topk_idx(rank), case.weights(rank), handle, return_recv_hook=True, out=out
    )
    assert same is out
    assert event.event is None
    rows.fill_(99)
    assert hook is not None
    hook()
    assert torch.equal(out, expected_combined(case, rank))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks(backend: str) -> None:
    run_on_ranks(2, check_hooks, backend)


def check_sent_early(rank: int, backend: str) -> float:
    """A rank that is busy after its sending half does not hold up the others' receiving half."""
    buffer, case = buffer_of(backend), PackedCase((4, 4))
    dist.barrier()
    _, _, _, _, hook = buffer.low_latency_dispatch(
        case.x(rank), case.topk_idx(rank), case.capacity, case.num_experts, return_recv_hook=True
    )
    dist.barrier()
    if rank == 0:
        time.sleep(1.5)
    start = time.monotonic()
    assert hook is not None
    hook()
    return time.monotonic() - start


def test_the_sending_half_runs_at_once() -> None:
    # Not over the process group, whose rows wait for the receiver.
    assert max(run_on_ranks(2, check_sent_early, "shared_memory")) < 1.0


def check_steps(rank: int, backend: str, num_steps: int) -> None:
    check_steps_of(rank, buffer_of(backend), num_steps)


def check_steps_of(rank: int, buffer: Buffer, num_steps: int) -> None:
    """Many steps with ranks out of step, asynchronous or with hooks, zero-copy or not."""
    case = PackedCase((8, 5, 7), num_topk=4)
    skew, choice = random.Random(rank), random.Random(7)
    stats = torch.zeros(case.experts_per_rank, dtype=torch.int32)
    waited = torch.zeros(case.num_ranks, dtype=torch.int64)
    total = torch.zeros(case.experts_per_rank, dtype=torch.int64)
    for step in range(num_steps):
        mode, is_zero_copy = choice.choice(["sync", "async", "hook"]), choice.random() < 0.5
        how: dict[str, Any] = {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}
        idx, weights = case.topk_idx(rank, step), case.weights(rank, step)
        if skew.random() < 0.3:
            time.sleep(skew.random() * 0.01)
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            case.x(rank, step),
            idx,
            case.capacity,
            case.num_experts,
            stats,
            waited,
            use_fp8=False,
            **how,
        )
        finish(mode, event, hook)
        check_packed(case, rank, recv, count, handle, None, step)
        total += count
        assert isinstance(recv, Tensor)
        rows = experts_rows(case, rank, recv)
        if is_zero_copy:
            place = buffer.get_next_low_latency_combine_buffer(handle)
            assert place.shape == rows.shape
            place.copy_(rows)
            rows = torch.full_like(rows, torch.nan)
        out, event, hook = buffer.low_latency_combine(
            rows,
            idx,
            weights,
            handle,
            zero_copy=is_zero_copy,
            combine_wait_recv_cost_stats=waited,
            **how,
        )
        finish(mode, event, hook)
        assert torch.equal(out, expected_combined(case, rank, step)), (step, mode, is_zero_copy)
    assert torch.equal(stats.long(), total)
    assert waited[rank] == 0
    assert waited.sum() > 0


def finish(mode: str, event: EventOverlap, hook: Callable[[], None] | None) -> None:
    if mode == "async":
        event.current_stream_wait()
    if mode == "hook":
        assert hook is not None
        hook()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_out_of_step(backend: str) -> None:
    run_on_ranks(3, check_steps, backend, 40)


def dispatch_wholly(
    buffer: Buffer, x: Tensor, idx: Tensor, sizes: tuple[int, int], with_hook: bool
) -> None:
    _, _, _, _, hook = buffer.low_latency_dispatch(
        x, idx, *sizes, use_fp8=False, return_recv_hook=with_hook
    )
    if hook is not None:
        hook()


def check_bad_input(rank: int, backend: str) -> None:
    check_bad_input_of(rank, buffer_of(backend))


def check_bad_input_of(rank: int, buffer: Buffer) -> None:
    """What is wrong on rank 1 raises on both ranks, also from hooks; the next call works."""
    case = PackedCase((4, 4))
    x, idx, weights = case.x(rank), case.topk_idx(rank), case.weights(rank)
    is_wrong = rank == 1
    big = torch.zeros(case.capacity + 1, case.hidden, dtype=torch.bfloat16)
    calls = [
        ("at most num_max", (big, idx.new_zeros(len(big), 3)), (case.capacity, case.num_experts)),
        ("bfloat16", (x.float(), idx), (case.capacity, case.num_experts)),
        ("multiple of 128", (x[:, :64], idx), (case.capacity, case.num_experts)),
        ("topk_idx", (x, idx + case.num_experts), (case.capacity, case.num_experts)),
        ("topk_idx", (x, idx[:3]), (case.capacity, case.num_experts)),
        ("named at most 8", (x, idx.new_zeros(4, 3)), (case.capacity, case.num_experts)),
        ("num_max_dispatch_tokens_per_rank .*16 on rank 1", (x, idx), (16, case.num_experts)),
        ("num_experts .*8 on rank 1", (x, idx), (case.capacity, 8)),
        ("hidden .*256 on rank 1", (torch.cat([x, x], 1), idx), (case.capacity, case.num_experts)),
    ]
    for with_hook in (False, True):
        for match, tensors, sizes in calls:
            right = (x, idx), (case.capacity, case.num_experts)
            args, numbers = (tensors, sizes) if is_wrong else right
            with pytest.raises(ValueError, match=match):
                dispatch_wholly(buffer, *args, numbers, with_hook)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, case.capacity, case.num_experts, use_fp8=False
    )
    check_packed(case, rank, recv, count, handle, None)
    assert isinstance(recv, Tensor)
    rows = experts_rows(case, rank, recv)
    with pytest.raises(ValueError, match="topk_weights"):
        buffer.low_latency_combine(rows, idx, weights.double() if is_wrong else weights, handle)
    with pytest.raises(ValueError, match="bfloat16"):
        buffer.low_latency_combine(rows[:, :1] if is_wrong else rows, idx, weights, handle)
    with pytest.raises(ValueError, match=r"use_logfmt .*(True on rank 1|on a GPU)"):
        buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=is_wrong)
    with pytest.raises(ValueError, match="use_logfmt to be False"):
        buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=True, zero_copy=is_wrong)
    other = idx.clone()
    if is_wrong:
        other[0, 0] = -1
        with pytest.raises(ValueError, match="topk_idx to be that of the dispatch"):
            buffer.low_latency_combine(rows, other, weights, handle)
    else:
        buffer.low_latency_combine(rows, other, weights, handle)
    out, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
    assert torch.equal(out, expected_combined(case, rank))
    with pytest.raises(ValueError, match=r"hidden .*256 on rank 1"):
        buffer.clean_low_latency_buffer(case.capacity, 256 if is_wrong else 128, case.num_experts)
    buffer.clean_low_latency_buffer(case.capacity, case.hidden, case.num_experts)
    with pytest.raises(ValueError, match="async_finish"):
        buffer.low_latency_dispatch(
            x, idx, case.capacity, case.num_experts, async_finish=True, return_recv_hook=True
        )
    with pytest.raises(ValueError, match="enable_shrink"):
        buffer.low_latency_clean_mask_buffer()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_raises_everywhere_and_the_next_call_works(backend: str) -> None:
    run_on_ranks(2, check_bad_input, backend)
