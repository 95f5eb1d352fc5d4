"""Low-latency calls on real GPUs do what their definition says, bit for bit. See README.md."""

import functools
import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig
from tests.packed_cases import PackedCase, check_packed, expected_combined
from tests.ranks import run_on_ranks
from tests.test_low_latency import CASES, FLAGS, RECIPES, experts_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and driver"),
]


@functools.cache
def buffer_of(rank: int, layout: str) -> Buffer:
    """Return a Buffer of ranks on one host, or on those that `layout` names, a letter each."""
    assert dist.group.WORLD is not None
    torch.cuda.set_device(rank % torch.cuda.device_count())
    host_id = layout[rank] if layout else None
    config = BufferConfig(backend="cuda", timeout=30, host_id=host_id)
    return Buffer(dist.group.WORLD, 0, 64 << 20, low_latency_mode=True, config=config)


def on_cpu(found: Any) -> Any:
    """Return tensors, and those in tuples, in host memory."""
    if isinstance(found, tuple):
        return tuple(map(on_cpu, found))
    return found.cpu() if isinstance(found, Tensor) else found


def check(rank: int, cases: list[PackedCase], with_hook: bool, layout: str = "") -> None:
    buffer = buffer_of(rank, layout)
    for step, case in enumerate(cases):
        idx = case.topk_idx(rank, step).cuda()
        for kind, recipe in RECIPES.items():
            if kind == "ue8m0" and case.hidden % 512:
                continue
            recv, count, handle, _, hook = buffer.low_latency_dispatch(
                case.x(rank, step).cuda(),
                idx,
                case.capacity,
                case.num_experts,
                return_recv_hook=with_hook,
                **FLAGS[kind],
            )
            if hook is not None:
                hook()
            rows_here, counts, values = on_cpu((recv, count, tuple(handle)))
            check_packed(case, rank, rows_here, counts, values, recipe, step)
            if kind != "bf16":
                continue
            rows = experts_rows(case, rank, rows_here).cuda()
            weights = case.weights(rank, step).cuda()
            expected = expected_combined(case, rank, step)
            for zero_copy in (False, True):
                if zero_copy:
                    buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
                out, _, hook = buffer.low_latency_combine(
                    rows, idx, weights, handle, zero_copy=zero_copy, return_recv_hook=with_hook
                )
                if hook is not None:
                    hook()
                assert torch.equal(out.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("with_hook", [False, True], ids=["at once", "hook"])
@pytest.mark.parametrize("num_ranks", sorted({case.num_ranks for case in CASES.values()}))
def test_rows_and_sums_are_those_of_the_definition(num_ranks: int, with_hook: bool) -> None:
    cases = [case for case in CASES.values() if case.num_ranks == num_ranks]
    run_on_ranks(num_ranks, check, cases, with_hook)


@pytest.mark.parametrize("with_hook", [False, True], ids=["at once", "hook"])
@pytest.mark.parametrize("layout", ["AB", "AABB"])
def test_rows_cross_by_nvshmem(layout: str, with_hook: bool) -> None:
    """The GPUs of one machine play two hosts; a process is in one NVSHMEM world."""
    if torch.cuda.device_count() < len(layout):
        pytest.skip(f"needs {len(layout)} CUDA GPUs")
    if importlib.util.find_spec("ep_megatron._nvshmem") is None:
        pytest.skip("built without NVSHMEM")
    case = PackedCase((6, 0, 8, 3)[: len(layout)], num_topk=4, hidden=512)
    run_on_ranks(len(layout), check, [case], with_hook, layout)


def check_replays(rank: int, case: PackedCase, zero_copy: bool, layout: str = "") -> None:
    """A dispatch, experts and a combine in a graph, replayed with other tokens."""
    buffer = buffer_of(rank, layout)
    x, idx, weights = (
        tensor.cuda() for tensor in (case.x(rank), case.topk_idx(rank), case.weights(rank))
    )

    def step() -> tuple[Any, Tensor]:
        recv, count, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, case.capacity, case.num_experts, use_fp8=False
        )
        assert isinstance(recv, Tensor)
        rows = experts_rows(case, rank, recv)
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
        out, _, _ = buffer.low_latency_combine(rows, idx, weights, handle, zero_copy=zero_copy)
        return (recv, count, tuple(handle)), out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for before a capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given, out = step()
    for number in range(5):
        x.copy_(case.x(rank, number))
        idx.copy_(case.topk_idx(rank, number))
        weights.copy_(case.weights(rank, number))
        graph.replay()
        buffer.low_latency_check()
        recv, count, handle = on_cpu(given)
        check_packed(case, rank, recv, count, handle, None, number)
        assert torch.equal(out.cpu(), expected_combined(case, rank, number))
        if number % 2:
            assert torch.equal(step()[1], out)


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_calls_are_replayed_with_other_tokens(num_ranks: int, zero_copy: bool) -> None:
    run_on_ranks(num_ranks, check_replays, PackedCase(tuple(range(num_ranks))), zero_copy)
