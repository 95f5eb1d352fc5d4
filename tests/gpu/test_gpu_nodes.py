"""Dispatch and combine over NVSHMEM give the bits of the `hierarchical` backend. See README.md.

On one machine the GPUs play two hosts: NVSHMEM then moves rows over NVLink, by the same calls.
"""

import importlib.util

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from tests.ranks import run_on_ranks
from tests.routing import Case

NUM_RANKS = 4
CASE = Case("nodes", (50, 0, 70, 30), num_topk=4, experts_per_rank=2, hidden=1024, alignment=4)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs four CUDA GPUs"),
    pytest.mark.skipif(
        importlib.util.find_spec("ep_megatron._nvshmem") is None, reason="built without NVSHMEM"
    ),
]


def check(rank: int, layout: str) -> None:
    assert dist.group.WORLD is not None
    torch.cuda.set_device(rank)
    results = []
    for backend, device in (("cuda", "cuda"), ("hierarchical", "cpu")):
        config = BufferConfig(backend=backend, timeout=60, host_id=layout[rank])
        buffer = Buffer(dist.group.WORLD, config=config)
        found = []
        for expand in (False, True):
            x, _, weights, _, handle, _ = buffer.dispatch(
                CASE.x(rank, torch.bfloat16).to(device),
                topk_idx=CASE.topk_idx(rank).to(device),
                topk_weights=CASE.weights(rank).to(device),
                num_experts=CASE.num_experts,
                expand=expand,
                expert_alignment=CASE.alignment,
            )
            assert isinstance(x, torch.Tensor)
            summed, summed_weights, _ = buffer.combine(x * 3, handle, topk_weights=weights)
            found += [x, weights, summed, summed_weights]
        results.append([None if one is None else one.cpu() for one in found])
        dist.barrier()
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


@pytest.mark.parametrize("layout", ["AABB", "ABBA"])
def test_rows_cross_by_nvshmem(layout: str) -> None:
    run_on_ranks(NUM_RANKS, check, layout)
