"""Dispatch and combine between nodes give the bits of the `hierarchical` backend on their CPUs.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m tests.gpu.two_nodes

on each node; without GPUs it ends with the reason. This file has not run on hardware yet.
"""

import importlib.util
import os
import sys

import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from tests.gpu.bench import why_not
from tests.routing import Case

TOKENS = (50, 0, 70, 30)  # of every four ranks


def case_of(num_ranks: int) -> Case:
    """Return what is sent between so many ranks."""
    tokens = (TOKENS * num_ranks)[:num_ranks]
    return Case("nodes", tokens, num_topk=4, experts_per_rank=2, hidden=1024, alignment=4)


def compare(rank: int, case: Case, host_id: str | None = None) -> None:
    """Make the same calls over both backends; every bit must be equal. Collective.

    Args:
        rank: this rank, whose GPU is the current one.
        case: what is sent.
        host_id: of this rank's host; None for the real one.
    """
    assert dist.group.WORLD is not None
    results = []
    for backend, device in (("cuda", "cuda"), ("hierarchical", "cpu")):
        config = BufferConfig(backend=backend, timeout=60, host_id=host_id)
        buffer = Buffer(dist.group.WORLD, config=config)
        found = []
        for expand in (False, True):
            x, _, weights, _, handle, _ = buffer.dispatch(
                case.x(rank, torch.bfloat16).to(device),
                topk_idx=case.topk_idx(rank).to(device),
                topk_weights=case.weights(rank).to(device),
                num_experts=case.num_experts,
                expand=expand,
                expert_alignment=case.alignment,
            )
            assert isinstance(x, torch.Tensor)
            summed, summed_weights, _ = buffer.combine(x * 3, handle, topk_weights=weights)
            found += [x, weights, summed, summed_weights]
        results.append([None if one is None else one.cpu() for one in found])
        dist.barrier()
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def main() -> None:
    """Compare between the nodes that torchrun has begun on."""
    reason = why_not()
    if not reason and importlib.util.find_spec("ep_megatron._nvshmem") is None:
        reason = "needs an installation that was built with NVSHMEM"
    if reason:
        sys.exit(f"two_nodes: {reason}")
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        sys.exit("two_nodes: needs ranks on several nodes, found one")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    compare(dist.get_rank(), case_of(dist.get_world_size()))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: all bits are those of the CPUs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
