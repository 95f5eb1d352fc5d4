"""Expert-major rows as tensor math, where rows travel once per rank: placed, padded, summed.

M tokens received, N expert-major rows, K top-k, R ranks, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_megatron.backends.base import Rows
from ep_megatron.handle import DispatchHandle
from ep_megatron.layout import expert_starts, index_within, occurs_in_row


def place(recv_idx: Tensor, handle: DispatchHandle, received: Rows, everyone: Tensor) -> None:
    """Fill `recv_row`, and the local experts of received rows, from the tokens' experts.

    Args:
        recv_idx: `[M, K]`, experts of the tokens that have come.
        handle: whose `recv_row` is filled.
        received: whose `topk_idx`, if any, is filled.
        everyone: `[R, R + E]`, all counts.
    """
    assert handle.recv_row is not None
    first = handle.rank * handle.num_local_experts
    is_local = (recv_idx >= first) & (recv_idx < first + handle.num_local_experts)
    local_idx = (recv_idx - first).masked_fill(~is_local, -1)
    per_expert = everyone[:, handle.num_ranks :]
    starts = expert_starts(per_expert, handle.num_ranks, handle.expert_alignment)[first:]
    flat = local_idx.reshape(-1).to(torch.int64)
    within = index_within(flat, handle.num_local_experts)
    recv_row = (starts[flat.clamp(min=0)] + within).masked_fill(flat < 0, -1)
    handle.recv_row.copy_(recv_row.view(local_idx.shape))
    if received.topk_idx is not None:
        received.topk_idx.copy_(local_idx)


def local_weights(weights: Tensor, handle: DispatchHandle) -> Tensor:
    """Return `[M, K]` with 0 where an expert is elsewhere; expert-major `[N]`."""
    assert handle.recv_row is not None
    is_local = handle.recv_row >= 0
    if not handle.expand:
        return weights.masked_fill(~is_local, 0)
    expanded = weights.new_zeros(handle.num_recv_rows)
    expanded[handle.recv_row[is_local]] = weights[is_local]
    return expanded


def expand(values: Tensor, handle: DispatchHandle) -> Tensor:
    """Return `[N, ...]` expert-major, padded with zeros, where the handle asks for it."""
    if not handle.expand:
        return values
    assert handle.recv_row is not None
    source, slot = (handle.recv_row >= 0).nonzero(as_tuple=True)
    out = values.new_zeros(handle.num_recv_rows, *values.shape[1:])
    out.view(torch.uint8)[handle.recv_row[source, slot]] = values.view(torch.uint8)[source]
    return out


def sum_slots(x: Tensor, handle: DispatchHandle, sum_dtype: torch.dtype) -> Tensor:
    """Sum the expert-major rows of each received token, in slot order."""
    if not handle.expand:
        return x
    assert handle.recv_row is not None
    # Adding to -0.0 leaves every first addend as it is, -0.0 included.
    partial = x.new_full((len(handle.recv_row), x.shape[1]), -0.0, dtype=sum_dtype)
    for row in handle.recv_row.unbind(1):
        is_used = row >= 0
        partial[is_used] += x[row[is_used]].to(sum_dtype)
    return partial


def weights_of_tokens(weights: Tensor, handle: DispatchHandle) -> Tensor:
    """Return `[M, K]` weights of received tokens, whose rows may be expert-major."""
    if not handle.expand:
        return weights
    assert handle.recv_row is not None
    is_used = handle.recv_row >= 0
    rows = weights.new_full(handle.recv_row.shape, -0.0)
    rows[is_used] = weights[handle.recv_row[is_used]]
    return rows


def is_summed(handle: DispatchHandle) -> Tensor:
    """Return `[T, K]`: which combined weights have an addend at all."""
    if not handle.expand:
        return (handle.route_rank[:, :1] >= 0).expand(-1, handle.num_topk)
    return occurs_in_row(handle.route_slot, handle.num_topk)


def sum_of(biases: Sequence[Tensor], num_tokens: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[num_tokens, H]` sums of the biases, like `x` but for the dtype."""
    total = x.new_full((num_tokens, x.shape[1]), -0.0, dtype=dtype)
    for bias in biases:
        total += bias.to(dtype)
    return total
