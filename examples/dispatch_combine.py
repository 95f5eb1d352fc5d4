"""Dispatch tokens to their experts and combine the outputs, without a model.

torchrun --nproc-per-node 2 examples/dispatch_combine.py
python examples/dispatch_combine.py                       # starts two processes itself
"""

import os
import sys

import torch
import torch.distributed as dist

from ep_megatron.autograd import fused_combine, fused_dispatch
from ep_megatron.buffer import Buffer
from ep_megatron.train.launch import is_worker, run_processes

NUM_TOKENS, HIDDEN, NUM_EXPERTS, TOPK = 6, 64, 4, 2


def main() -> None:
    dist.init_process_group("gloo")
    rank, buffer = dist.get_rank(), Buffer(dist.group.WORLD)

    # A router would choose the experts and their weights; here they are random.
    torch.manual_seed(rank)
    x = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    scores = torch.rand(NUM_TOKENS, NUM_EXPERTS).softmax(dim=-1)
    weights, experts = scores.topk(TOPK)

    rows, _, row_weights, handle = fused_dispatch(
        x, experts, weights, NUM_EXPERTS, buffer, expand=True
    )
    # The rows lie expert by expert. This rank's experts multiply by 1 + their global number.
    counts = handle.num_recv_tokens_per_expert
    first = rank * len(counts)
    outputs = torch.cat(
        [(1 + first + i) * block for i, block in enumerate(rows.split(list(counts)))]
    )
    y = fused_combine(outputs * row_weights[:, None], handle, buffer)
    y.sum().backward()

    factor = (weights * (1 + experts)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(y, factor * x)
    torch.testing.assert_close(x.grad, factor.expand_as(x))
    print(f"rank {rank} ({buffer.backend}): rows per expert {counts}, output and gradient correct")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main() if is_worker() else run_processes(2, [os.path.abspath(__file__)]))
