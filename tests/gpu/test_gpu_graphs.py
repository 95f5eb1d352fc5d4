"""Dispatch, experts and combine in a CUDA graph of real GPUs. See README.md."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig
from ep_megatron.handle import CapacityHandle
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and driver"),
]
CASE = Case("graph", (40, 25), num_topk=4, hidden=512, alignment=4)
STYLES = ("random", "nothing", "first_rank", "holes", "repeated")


@functools.cache
def buffer_of(backend: str) -> Buffer:
    assert dist.group.WORLD is not None
    return Buffer(dist.group.WORLD, config=BufferConfig(backend=backend, timeout=30))


def layer(
    buffer: Buffer, inputs: list[Tensor], expand: bool, capacity: int
) -> tuple[Tensor, Tensor | None, CapacityHandle]:
    x, idx, weights = inputs
    rows, _, row_weights, _, handle, _ = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_experts=CASE.num_experts,
        expand=expand,
        expert_alignment=CASE.alignment,
        num_worst_tokens=capacity,
    )
    assert isinstance(handle, CapacityHandle)
    assert isinstance(rows, Tensor)
    out, out_weights, _ = buffer.combine(rows * 3, handle, topk_weights=row_weights)
    return out, out_weights, handle


def check_replays(rank: int, expand: bool) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    ours, reference = buffer_of("cuda"), buffer_of("process_group")
    inputs = [CASE.x(rank, torch.bfloat16), CASE.topk_idx(rank), CASE.weights(rank)]
    still = [tensor.cuda() for tensor in inputs]
    capacity = sum(CASE.num_tokens) * CASE.num_topk + CASE.alignment * CASE.experts_per_rank
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for before a capture
        layer(ours, still, expand, capacity)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, out_weights, handle = layer(ours, still, expand, capacity)
    for at, style in enumerate(STYLES):
        case = replace(CASE, style=style)
        inputs = [case.x(rank, torch.bfloat16) * (at + 1), case.topk_idx(rank), inputs[2]]
        for tensor, value in zip(still, inputs, strict=True):
            tensor.copy_(value)
        graph.replay()
        handle.check()
        wanted, wanted_weights, _ = layer(reference, inputs, expand, capacity)
        assert torch.equal(bits(out.cpu()), bits(wanted))
        assert out_weights is not None
        assert wanted_weights is not None
        assert torch.equal(bits(out_weights.cpu()), bits(wanted_weights))
        ours.dispatch(still[0], topk_idx=still[1], num_experts=CASE.num_experts)


@pytest.mark.parametrize("expand", [False, True], ids=["by_rank", "by_expert"])
def test_a_layer_is_replayed_with_other_routings(expand: bool) -> None:
    run_on_ranks(CASE.num_ranks, check_replays, expand)


def check_refused(rank: int) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    x, idx = CASE.x(rank, torch.bfloat16).cuda(), CASE.topk_idx(rank).cuda()
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match="while a CUDA graph is captured"),
    ):
        buffer_of("cuda").dispatch(x, topk_idx=idx, num_experts=CASE.num_experts)
    buffer_of("cuda").dispatch(x, topk_idx=idx, num_experts=CASE.num_experts)


def test_what_waits_on_the_host_is_refused_in_a_capture() -> None:
    run_on_ranks(CASE.num_ranks, check_refused)
