"""Where every row goes, as pure tensor math: the reference for every kernel.

T tokens, K top-k, E experts, R ranks, L = E / R experts per rank. Expert e lives on rank e // L.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Counts(NamedTuple):
    """What one rank tells the others about its routing.

    Attributes:
        num_tokens_per_rank: `[R]` int32, tokens with at least one expert on that rank.
        num_tokens_per_expert: `[E]` int32, slots that name that expert.
        is_token_in_rank: `[T, R]` bool.
    """

    num_tokens_per_rank: Tensor
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


class Routes(NamedTuple):
    """Addresses of one rank's rows; see `DispatchHandle` for the three tensors' meaning."""

    rank: Tensor
    row: Tensor
    slot: Tensor


def count_tokens(topk_idx: Tensor, num_experts: int, num_ranks: int) -> Counts:
    """Count where this rank's tokens go.

    Local. Args: `topk_idx`: `[T, K]` int32 or int64 in `[-1, num_experts)`.
    """
    is_used = topk_idx >= 0
    experts = topk_idx[is_used].to(torch.int64)
    num_tokens_per_expert = torch.bincount(experts, minlength=num_experts)
    ranks = topk_idx.to(torch.int64) // (num_experts // num_ranks)
    is_token_in_rank = occurs_in_row(ranks.masked_fill(~is_used, -1), num_ranks)
    return Counts(
        is_token_in_rank.sum(0, dtype=torch.int32),
        num_tokens_per_expert.to(torch.int32),
        is_token_in_rank,
    )


def occurs_in_row(keys: Tensor, num_keys: int) -> Tensor:
    """Mark which keys each row holds.

    Args:
        keys: `[T, K]` integers in `[-1, num_keys)`, -1 for none.
        num_keys: number of different keys.

    Returns:
        `[T, num_keys]` bool.
    """
    # What is none falls into a column that is cut off again.
    marks = torch.zeros(len(keys), num_keys + 1, dtype=torch.bool, device=keys.device)
    marks.scatter_(1, keys.to(torch.int64) % (num_keys + 1), True)
    return marks[:, :num_keys].contiguous()


def round_up(count: Tensor, alignment: int) -> Tensor:
    """Round up to a multiple of `alignment`."""
    return (count + alignment - 1) // alignment * alignment


def expert_starts(num_tokens_per_expert: Tensor, num_ranks: int, alignment: int) -> Tensor:
    """First row of each expert's block on its own rank.

    Args:
        num_tokens_per_expert: `[R, E]`, the counts of every source rank.
        num_ranks: R.
        alignment: each block's rows are a multiple of it.

    Returns:
        `[E]` int64.
    """
    blocks = round_up(num_tokens_per_expert.sum(0, dtype=torch.int64), alignment).view(
        num_ranks, -1
    )
    return (blocks.cumsum(1) - blocks).view(-1)


def index_within(keys: Tensor, num_keys: int) -> Tensor:
    """Position of each element among the equal ones before it; -1 where the key is negative.

    Args:
        keys: `[N]` integers in `[-1, num_keys)`.
        num_keys: number of different keys.
    """
    order = keys.argsort(stable=True)
    counts = torch.bincount(keys + 1, minlength=num_keys + 1)
    starts = counts.cumsum(0) - counts
    within = torch.empty_like(order)
    within[order] = torch.arange(len(keys), device=keys.device) - starts[keys[order] + 1]
    return within.masked_fill(keys < 0, -1)


def expanded_routes(
    topk_idx: Tensor, rank: int, num_tokens_per_expert: Tensor, alignment: int
) -> Routes:
    """Address every (token, slot) in its expert's block.

    Rows of a block are in (source rank, token, slot) order.

    Args:
        topk_idx: `[T, K]` in `[-1, E)`.
        rank: this rank.
        num_tokens_per_expert: `[R, E]`, the counts of every source rank.
        alignment: see `expert_starts`.
    """
    num_ranks, num_experts = num_tokens_per_expert.shape
    bases = expert_starts(num_tokens_per_expert, num_ranks, alignment)
    bases = bases + num_tokens_per_expert[:rank].sum(0, dtype=torch.int64)
    experts = topk_idx.reshape(-1).to(torch.int64)
    rows = bases[experts.clamp(min=0)] + index_within(experts, num_experts)
    is_used = experts >= 0
    return _sorted_by_rank(
        (experts // (num_experts // num_ranks)).view(topk_idx.shape),
        rows.view(topk_idx.shape),
        is_used.view(topk_idx.shape),
    )


def deduplicated_routes(topk_idx: Tensor, rank: int, counts: Counts, matrix: Tensor) -> Routes:
    """Address every token once per destination rank.

    Rows at a rank are in (source rank, token) order.

    Args:
        topk_idx: `[T, K]` in `[-1, E)`.
        rank: this rank.
        counts: of this rank.
        matrix: `[R, R]`, `num_tokens_per_rank` of every source rank.
    """
    num_ranks, num_experts = len(matrix), len(counts.num_tokens_per_expert)
    is_used = topk_idx >= 0
    ranks = topk_idx.to(torch.int64) // (num_experts // num_ranks)
    # A slot carries the row when no earlier slot of its token goes to the same rank.
    same = ranks[:, :, None] == ranks[:, None, :]
    is_first = is_used & ~same.tril(-1).any(-1)
    bases = matrix[:rank].sum(0, dtype=torch.int64)
    index = counts.is_token_in_rank.cumsum(0) - 1
    rows = (bases + index).gather(1, ranks.clamp(min=0))
    return _sorted_by_rank(ranks, rows, is_first)


def _sorted_by_rank(ranks: Tensor, rows: Tensor, is_used: Tensor) -> Routes:
    """Bring each token's used slots to the front in ascending (rank, slot) order."""
    last = torch.iinfo(torch.int32).max
    order = ranks.masked_fill(~is_used, last).sort(dim=1, stable=True).indices
    is_used = is_used.gather(1, order)

    def front(values: Tensor) -> Tensor:
        return values.masked_fill(~is_used, -1).to(torch.int32)

    return Routes(front(ranks.gather(1, order)), front(rows.gather(1, order)), front(order))
