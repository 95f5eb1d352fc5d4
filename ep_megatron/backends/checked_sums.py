"""Debugging: the rows of a combine come back one by one as well, and so do hashes of them.

The rows of a token are numbered in the order in which they are added. All rows of one number come
back in a combine of their own, the others being -0.0, to which every number may be added; there
they are compared with their hashes, and their sum with what the combine of all has brought. T
tokens, K top-k, H hidden, N rows received.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron.backends.base import Backend, Rows
from ep_megatron.backends.expert_major import sum_of
from ep_megatron.backends.row_hashes import hash_rows, is_same
from ep_megatron.handle import DispatchHandle

_HALF = 32  # bits of a hash that one float64 takes


@dataclass(frozen=True)
class SumOrder:
    """How a backend adds the rows of a token.

    Attributes:
        groups: ranks whose rows are added up before the sums of groups are, both ascending.
        is_rounded: whether the sum of a group is rounded to the dtype of the rows.
    """

    groups: tuple[tuple[int, ...], ...]
    is_rounded: bool = False

    @staticmethod
    def by_rank(num_ranks: int) -> "SumOrder":
        """Return rank after rank."""
        return SumOrder(tuple((rank,) for rank in range(num_ranks)))


def check_sums(
    inner: Backend,
    order: SumOrder,
    x: Tensor,
    handle: DispatchHandle,
    combined: tuple[Tensor, Sequence[Tensor]],
) -> None:
    """Raise a RuntimeError that names the first row, or sum, of this rank's tokens that is wrong.

    Collective: K + 2 calls.

    Args:
        inner: moves the rows.
        order: of its sums.
        x: `[N, H]`, as it was given to combine.
        handle: likewise.
        combined: what came of it, and the biases.
    """
    if handle.num_topk == 0:
        return
    order_here = _order_of_rows(inner, handle)
    hashes = _hashes_of_tokens(inner, x, order_here, handle)
    parts = []
    nothing = x.new_full((), -0.0)
    for number in range(handle.num_topk):
        alone = torch.where((order_here == number)[:, None], x, nothing)
        parts.append(inner.combine(Rows(alone), handle)[0])
    # Whoever has found something raises behind the last call that all ranks make.
    came = torch.stack([hash_rows(_plain(part)) for part in parts], 1)
    is_row = handle.route_rank >= 0
    wrong = (is_row & (came != hashes)).nonzero().tolist()
    if wrong:
        token, number = wrong[0]
        rank, row = (int(route[token, number]) for route in handle.routes[:2])
        raise RuntimeError(
            f"combine: expected row {row} of rank {rank} to come to rank {inner.rank} (token "
            f"{token}) as it was sent, got other bytes; {len(wrong)} of {int(is_row.sum())} rows "
            "came changed"
        )
    total, biases = combined
    is_sum = is_same(total, _sum(order, parts, handle, biases)).all(1)
    if is_sum.all():
        return
    token = int((~is_sum).nonzero()[0, 0])
    ranks = sorted({rank for rank in handle.route_rank[token].tolist() if rank >= 0})
    raise RuntimeError(
        f"combine: expected token {token} on rank {inner.rank} to be the sum of its rows from "
        f"rank {', '.join(map(str, ranks))}, got other bytes; {int((~is_sum).sum())} of "
        f"{len(is_sum)} sums are wrong"
    )


def _order_of_rows(inner: Backend, handle: DispatchHandle) -> Tensor:
    """Return `[N]`: which of its token's rows, in the order of the sum, a row here is, or -1."""
    ranks, num_topk = handle.route_rank, handle.num_topk
    numbers = torch.arange(1, num_topk + 1, dtype=torch.float64, device=ranks.device)
    if handle.expand:
        slots = handle.route_slot.long().masked_fill(ranks < 0, num_topk)
        told = numbers.new_zeros(len(ranks), num_topk + 1)
        told = told.scatter(1, slots, numbers.expand(len(ranks), -1))[:, :num_topk]
    else:
        assert handle.topk_idx is not None
        rank_of_slot = handle.topk_idx // handle.num_local_experts
        is_there = (ranks[:, None] == rank_of_slot[:, :, None]) & (ranks[:, None] >= 0)
        told = (is_there * numbers).amax(2)
    nothing = torch.zeros(len(ranks), 2, dtype=torch.int64, device=ranks.device)
    came = inner.dispatch_again(Rows(nothing, topk_weights=told.contiguous()), handle).topk_weights
    assert came is not None
    return (came if handle.expand else came.amax(1)).long() - 1


def _hashes_of_tokens(
    inner: Backend, x: Tensor, order_here: Tensor, handle: DispatchHandle
) -> Tensor:
    """Return int64 `[T, K]`, the hashes of each token's rows where they were sent."""
    hashes = hash_rows(_plain(x))
    halves = torch.stack([hashes & (1 << _HALF) - 1, hashes >> _HALF], 1).double()
    rows = halves.new_zeros(len(x), handle.num_topk + 1, 2)
    rows.scatter_(1, order_here[:, None, None].expand(-1, 1, 2) + 1, halves[:, None])
    rows = rows[:, 1:].reshape(len(x), 2 * handle.num_topk)  # rows numbered -1 are padding
    came = inner.combine(Rows(rows.contiguous()), handle)[0].view(-1, handle.num_topk, 2).long()
    return came[:, :, 0] + (came[:, :, 1] << _HALF)


def _plain(x: Tensor) -> Tensor:
    """Return rows in which zeros have no sign and a NaN is like any other, as a sum leaves them."""
    return torch.where(x.isnan(), torch.nan, x + 0.0)


def _sum(
    order: SumOrder, parts: Sequence[Tensor], handle: DispatchHandle, biases: Sequence[Tensor]
) -> Tensor:
    """Return `[T, H]`, the sums of single rows, as `Backend.combine` has them."""
    ranks, dtype = handle.route_rank, parts[0].dtype
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    total = sum_of(biases, handle.num_tokens, parts[0], sum_dtype)
    for members in order.groups:
        of_group = torch.full_like(total, -0.0)
        for rank in members:
            of_rank = torch.full_like(total, -0.0)
            for number, part in enumerate(parts):
                is_mine = ranks[:, number] == rank
                of_rank[is_mine] += part[is_mine].to(sum_dtype)
            of_group += of_rank
        if order.is_rounded:
            of_group = of_group.to(dtype).to(sum_dtype)
        total += of_group
    if not biases:
        total = total.masked_fill(ranks[:, :1] < 0, 0)
    return total.to(dtype)
