"""Two copies of every stage, as bidirectional DualPipe has them: one gradient for both.

Chunk 0 of pipeline rank r and chunk 1 of rank `P - 1 - r` hold the same stage; each has seen half
of the micro-batches.
"""

from typing import Any

import torch
import torch.distributed as dist

from ep_megatron.pipeline.p2p import swap


def reduce_copies(group: dist.ProcessGroup, chunks: list[Any], timeout: float) -> None:
    """Give both copies of each stage the sum of their gradients and of their routers' counts.

    Collective over the pipeline ranks. The sum has two terms, so both copies get the same bits.

    Args:
        group: the pipeline ranks.
        chunks: this rank's two GPT models.
        timeout: seconds to wait for the rank with the other copies.

    Raises:
        RuntimeError: naming that rank, if it is late or gone.
        ValueError: for a router that keeps more than counts (global_aux_loss).
    """
    first, second = chunks
    _check_routers(chunks)
    sums = [[_summed(p) for p in chunk.parameters() if p.requires_grad] for chunk in chunks]
    counts = [
        [buffer for name, buffer in chunk.named_buffers() if name.endswith("tokens_per_expert")]
        for chunk in (first, second)
    ]
    mine = [*sums[0], *counts[0]]
    others = [*sums[1], *counts[1]]
    theirs_of_mine = [torch.empty_like(tensor) for tensor in mine]
    theirs_of_others = [torch.empty_like(tensor) for tensor in others]
    swap(group, mine, theirs_of_others, timeout)
    swap(group, others, theirs_of_mine, timeout)
    for tensor, other in zip([*mine, *others], [*theirs_of_mine, *theirs_of_others], strict=True):
        tensor.add_(other)


def _summed(parameter: Any) -> torch.Tensor:
    gradient: torch.Tensor | None = getattr(parameter, "main_grad", None)
    if gradient is not None:
        return gradient
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad: torch.Tensor = parameter.grad
    return grad


def _check_routers(chunks: list[Any]) -> None:
    for chunk in chunks:
        kind = chunk.config.moe_router_load_balancing_type
        if "global_aux_loss" in ([kind] if isinstance(kind, str) else kind):
            raise ValueError(
                "pipeline: expected moe_router_load_balancing_type of dualpipe not to be "
                "global_aux_loss, got it; each copy of a router sees half of the tokens"
            )


def report_of_both_ends(group: dist.ProcessGroup, reported: list[Any]) -> list[Any]:
    """Return on the last pipeline rank what both ends reported, in micro-batch order.

    Collective over the pipeline ranks; elsewhere an empty list is returned.
    """
    ranks = dist.get_process_group_ranks(group)
    first, last, me = ranks[0], ranks[-1], dist.get_rank()
    if me == first:
        dist.send_object_list([reported], last, group)
        return []
    if me != last:
        return []
    other: list[Any] = [None]
    dist.recv_object_list(other, first, group)
    return [*reported, *other[0]]
