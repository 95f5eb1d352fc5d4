"""Dispatch and combine on GPUs, with DeepEP beside them where it is installed.

    torchrun --nproc-per-node 8 -m tests.gpu.bench [--num-tokens 4096] [--hidden 7168] ...

or on several nodes, as README.md says.

One process per GPU. Implementations take turns in one run; each line is the median and the range
over rounds of the slowest rank's time, by CUDA events. This file has not run on hardware yet.
"""

import argparse
import importlib
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig

Call = Callable[[], object]


def why_not() -> str:
    """Return why nothing can be measured here, or nothing."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU and driver, found none"
    if "LOCAL_RANK" not in os.environ:
        return "needs torchrun, which sets LOCAL_RANK"
    local_ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if local_ranks > gpus:
        return f"needs a GPU per process, found {gpus} for {local_ranks}"
    return ""


def ours(x: Tensor, topk_idx: Tensor, weights: Tensor, num_experts: int) -> dict[str, Call]:
    """Return our calls: a fresh dispatch by rank and by expert, and their combines."""
    buffer = Buffer(dist.group.WORLD, config=BufferConfig(backend="cuda", timeout=30))
    calls: dict[str, Call] = {}
    for expand, order in ((False, "by rank"), (True, "by expert")):
        options: dict[str, Any] = {
            "topk_idx": topk_idx,
            "topk_weights": weights,
            "num_experts": num_experts,
            "expand": expand,
        }
        rows, _, _, _, handle, _ = buffer.dispatch(x, **options)
        assert isinstance(rows, Tensor)
        assert handle is not None
        y = rows.clone()
        calls[f"ep_megatron dispatch {order}"] = partial(buffer.dispatch, x, **options)
        calls[f"ep_megatron combine {order}"] = partial(buffer.combine, y, handle)
    return calls


def theirs(x: Tensor, topk_idx: Tensor, weights: Tensor, num_experts: int) -> dict[str, Call]:
    """Return the same calls of DeepEP's `Buffer`, rows by rank; none where it is not installed."""
    try:
        deep_ep: Any = importlib.import_module("deep_ep")
    except ImportError:
        return {}
    num_ranks, hidden_bytes = dist.get_world_size(), x.shape[1] * x.element_size()
    configs = (
        deep_ep.Buffer.get_dispatch_config(num_ranks),
        deep_ep.Buffer.get_combine_config(num_ranks),
    )
    sizes = [config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) for config in configs]
    rdma_sizes = [0]
    if num_ranks > int(os.environ["LOCAL_WORLD_SIZE"]):
        rdma_sizes = [c.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) for c in configs]
    buffer = deep_ep.Buffer(dist.group.WORLD, max(sizes), max(rdma_sizes))

    def dispatch() -> Any:
        layout = buffer.get_dispatch_layout(topk_idx, num_experts)
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = layout
        return buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=weights,
        )

    rows, _, _, _, handle, _ = dispatch()
    y = rows.clone()
    return {
        "DeepEP layout + dispatch by rank": dispatch,
        "DeepEP combine by rank": partial(buffer.combine, y, handle),
    }


def milliseconds(call: Call) -> float:
    """Return how long the slowest rank took."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    slowest = torch.tensor(begin.elapsed_time(end), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time dispatch and combine on GPUs.")
    parser.add_argument("--num-tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--num-topk", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"bench: {reason}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    rank, device = dist.get_rank(), "cuda"
    rng = torch.Generator().manual_seed(rank)
    scores = torch.rand(args.num_tokens, args.num_experts, generator=rng)
    topk_idx = scores.topk(args.num_topk).indices.to(device)
    x = torch.randn(args.num_tokens, args.hidden, generator=rng).bfloat16().to(device)
    weights = torch.rand(args.num_tokens, args.num_topk, generator=rng).to(device)
    inputs = (x, topk_idx, weights, args.num_experts)
    calls = {**ours(*inputs), **theirs(*inputs)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(args.rounds + 3):
        for name, call in calls.items():
            taken = milliseconds(call)
            if at >= 3:  # the first ones warm up
                times[name].append(taken)
    if rank == 0:
        print(f"{dist.get_world_size()} ranks on {torch.cuda.get_device_name()}, {vars(args)}")
        for name, all_times in times.items():
            print(
                f"{name:36s} {statistics.median(all_times):8.3f} ms "
                f"({min(all_times):.3f} to {max(all_times):.3f})"
            )
        if len(calls) == 4:
            print("DeepEP is not installed here")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
