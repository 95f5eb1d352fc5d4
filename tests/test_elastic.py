"""DeepEP's second API gives what the first gives, with its own arguments and handles."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer
from ep_megatron.elastic import ElasticBuffer
from ep_megatron.fp8 import quantize
from ep_megatron.handle import CapacityHandle
from ep_megatron.streams import EventOverlap
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_async import Gate, fresh, is_complete, same
from tests.test_dispatch import BACKENDS, buffer_of

CASE = Case("elastic", (40, 25), num_topk=3, hidden=128, alignment=4)
MOST = 40


def make(backend: str) -> ElasticBuffer:
    assert dist.group.WORLD is not None
    config = buffer_of(backend).config
    return ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=MOST, config=config)


def arguments(rank: int) -> dict[str, Any]:
    return {
        "x": CASE.x(rank, torch.float32),
        "topk_idx": CASE.topk_idx(rank),
        "topk_weights": CASE.weights(rank),
        "num_experts": CASE.num_experts,
        "expert_alignment": CASE.alignment,
    }


def check_as_buffer(rank: int, backend: str, do_expand: bool) -> None:
    buffer, v1 = make(backend), buffer_of(backend)
    expected = fresh(v1, CASE, rank, expand=do_expand)
    num_rows = len(expected[0])
    stats = torch.ones(CASE.experts_per_rank, dtype=torch.int32)
    ours = buffer.dispatch(
        **arguments(rank), do_expand=do_expand, cumulative_local_expert_recv_stats=stats
    )
    for mine, theirs in zip(ours[:3], expected[:3], strict=True):
        same(mine, theirs)
    handle = ours[3]
    valid = torch.tensor(expected[4].num_valid_tokens_per_expert, dtype=torch.int32)
    assert handle.num_recv_tokens_per_expert_list == expected[3]
    assert handle.num_recv_tokens == sum(expected[4].num_recv_tokens_per_rank)
    assert handle.psum_num_recv_tokens_per_scaleup_rank is not None
    assert handle.psum_num_recv_tokens_per_scaleup_rank[-1] == handle.num_recv_tokens
    assert torch.equal(stats, valid + 1)
    ends = handle.psum_num_recv_tokens_per_expert
    assert ends is not None
    aligned_starts = torch.tensor([0, *expected[3]]).cumsum(0)
    assert torch.equal(ends, (aligned_starts[:-1] + valid if do_expand else aligned_starts[1:]))

    y = torch.randn(num_rows, CASE.hidden, generator=torch.Generator().manual_seed(rank))
    sums = v1.combine(y, expected[4], expected[2], bias=CASE.x(rank, y.dtype))
    combined = buffer.combine(y, handle, expected[2], bias=CASE.x(rank, y.dtype))
    same(combined[0], sums[0])
    same(combined[1], sums[1])
    again = buffer.dispatch(CASE.x(rank, y.dtype), handle=handle, topk_weights=CASE.weights(rank))
    assert again[3] is handle
    for mine, theirs in zip(again[:3], expected[:3], strict=True):
        same(mine, theirs)
    with pytest.raises(ValueError, match="expected do_cpu_sync not to be True with a handle"):
        buffer.dispatch(CASE.x(rank, y.dtype), handle=handle, do_cpu_sync=True)


def check_without_cpu_sync(rank: int, backend: str, do_expand: bool) -> None:
    """Nothing is waited for: not for counts, and each of two events."""
    buffer, v1 = make(backend), buffer_of(backend)
    expected = fresh(v1, CASE, rank, expand=do_expand)
    num_rows = len(expected[0])
    gates = Gate(), Gate()
    stats = torch.zeros(CASE.experts_per_rank, dtype=torch.int32)
    recv_x, recv_idx, weights, handle, event = buffer.dispatch(
        **arguments(rank),
        do_expand=do_expand,
        do_cpu_sync=False,
        cumulative_local_expert_recv_stats=stats,
        async_with_compute_stream=True,
        previous_event=gates[0].event,
        previous_event_before_epilogue=EventOverlap(gates[1].event),
    )
    y = torch.randn(len(recv_x), CASE.hidden, generator=torch.Generator().manual_seed(rank))
    total = buffer.combine(y, handle, async_with_compute_stream=True)
    for gate in gates:
        assert not is_complete(event)
        gate.open()
    total[2].current_stream_wait()
    slots = 2 * MOST * (3 if do_expand else 1)
    assert len(recv_x) == (slots + 3 * 3 + 3) // 4 * 4 if do_expand else slots
    same(recv_x[:num_rows], expected[0])
    assert weights is not None
    same(weights[:num_rows], expected[2])
    assert (recv_idx is None) == do_expand
    assert isinstance(handle.inner, CapacityHandle)
    assert handle.inner.num_recv_rows_tensor.tolist() == [num_rows]
    assert handle.inner.num_recv_tokens_per_expert.tolist() == expected[3]
    assert handle.num_recv_tokens is handle.num_expanded_tokens is None
    assert handle.num_recv_tokens_per_expert_list == []
    exact = buffer.dispatch(**arguments(rank), do_expand=do_expand)[3]
    for name in (
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
    ):
        assert torch.equal(getattr(handle, name), getattr(exact, name))
    assert torch.equal(stats, exact.num_unaligned_recv_tokens_per_expert)
    same(total[0], v1.combine(y[:num_rows], expected[4])[0])
    with pytest.raises(ValueError, match="expected num_max_tokens_per_rank with do_cpu_sync=False"):
        ElasticBuffer(buffer.group, config=v1.config).dispatch(**arguments(rank), do_cpu_sync=False)


def check_the_rest(rank: int) -> None:
    buffer = make("shared_memory")
    x, scales = quantize(CASE.x(rank, torch.bfloat16))
    wanted = {**arguments(rank), "x": (x, scales)}
    (rows, sf), *_ = buffer.dispatch(**wanted, use_tma_aligned_col_major_sf=True)
    (plain, row_major), *_ = buffer.dispatch(**wanted)
    same(rows, plain)
    assert torch.equal(sf, row_major)
    assert sf.stride(0) == 1
    assert sf.stride(1) % 4 == 0
    (_, queued), _, _, handle, event = buffer.dispatch(
        **wanted, use_tma_aligned_col_major_sf=True, async_with_compute_stream=True
    )
    event.current_stream_wait()
    (_, cached), *_ = buffer.dispatch(
        wanted["x"], handle=handle, use_tma_aligned_col_major_sf=True, num_experts=CASE.num_experts
    )
    for other in (queued, cached):
        assert torch.equal(other, sf)
        assert other.stride() == sf.stride()
    assert (handle.num_sms, buffer.get_theoretical_num_sms(8, 2)) == (Buffer.num_sms,) * 2
    wrong: dict[str, Any]
    for name in ("num_experts", "expert_alignment", "num_max_tokens_per_rank"):
        wrong = {name: 999}
        with pytest.raises(ValueError, match=f"expected {name} to be None or that of the handle"):
            buffer.dispatch(wanted["x"], handle=handle, **wrong)
    assert buffer.get_logical_domain_size() == (1, 2)
    assert buffer.num_scaleup_ranks * buffer.scaleout_rank_idx + buffer.scaleup_rank_idx == rank
    assert not hasattr(buffer, "get_physical_domain_size")
    with pytest.raises(AttributeError, match="pp_send: expected a verb of dispatch and combine, g"):
        buffer.pp_send(x)
    buffer.barrier()
    assert buffer.capture().query()
    assert buffer.get_comm_stream().query()
    assert dist.group.WORLD is not None
    # 2 ranks x 8192 tokens x (14336 + 128) bytes, in whole pieces of 2 MiB.
    hint = buffer.get_buffer_size_hint(dist.group.WORLD, 8192, 7168, 8)
    assert hint == -(-2 * 8192 * (14336 + 128) // (2 << 20)) * (2 << 20)
    buffer.destroy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("do_expand", [False, True], ids=["by rank", "by expert"])
@pytest.mark.parametrize("check", [check_as_buffer, check_without_cpu_sync])
def test_elastic(check: Any, backend: str, do_expand: bool) -> None:
    run_on_ranks(2, check, backend, do_expand)


def test_the_other_methods() -> None:
    run_on_ranks(2, check_the_rest)
