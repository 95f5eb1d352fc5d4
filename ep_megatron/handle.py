"""What one dispatch leaves for its combine and for both backward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class HostHop:
    """How the rows of one routing change hosts, seen from this rank.

    Attributes:
        inner: the way inside this host, between its ranks numbered from 0: the rows of this rank's
            own tokens, then those it forwards for ranks of other hosts, by source rank, then token.
        tokens_per_host: for each host, the ascending numbers `[n]` int64 of this rank's tokens that
            have an expert there.
        row_in_host: `[T, hosts]` int32: which row of a host's sums is the token's, or -1; on this
            host the token's own number.
        is_slot_in_host: `[T, K, hosts]` bool: which slots name an expert of the host.
        num_forwarded: (source rank, rows) of each rank that this one forwards for, ascending.
    """

    inner: "DispatchHandle"
    tokens_per_host: tuple[Tensor, ...]
    row_in_host: Tensor
    is_slot_in_host: Tensor
    num_forwarded: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeHop:
    """How the rows of one routing change nodes of GPUs, seen from this rank: on the device.

    T tokens, K top-k, N nodes.

    Attributes:
        inner: the way of this rank's own tokens inside this node, between its ranks numbered from
            0; `num_rows_per_rank` counts what others forward to them, too.
        by_node: `[3, T, N]` int32: the nodes that a token goes to, ascending, then -1; its place
            among this rank's tokens for that node (on this node its number); its slots there, a
            bit each. As csrc/cuda/cross.h has it.
        forwarded: for each rank that this one forwards for, one after the other in ascending order:
            `[3, n, K]` int32 routes inside this node, and where its expert ids are needed too `[n,
            K]` of them; each padded to 64 bytes.
        num_to_node: for each rank, how many of its tokens go to each node.
    """

    inner: "DispatchHandle"
    by_node: Tensor
    forwarded: Tensor
    num_to_node: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class DispatchHandle:
    """The exact address of every row of one routing, seen from this rank.

    A value: nothing of it is kept by the Buffer, so any number of handles may be in use, in any
    order, as long as all ranks use those of the same dispatch together. Shape letters:
    T tokens, K top-k, R ranks, L local experts, M rows as received (one per token and rank).

    Attributes:
        plan_id: number of the dispatch that made the handle; the same on all ranks.
        rank: this rank in the group of `num_ranks`.
        num_tokens: T, this rank's tokens.
        num_topk: K.
        num_experts: experts on all ranks; expert e lives on rank `e // (num_experts / num_ranks)`.
        expand: whether rows arrive expert-major, one per (token, local expert).
        expert_alignment: rows of each expert's block are padded to a multiple of it.
        routes: `[3, T, K]` int32: destination rank of each of a token's rows, its row there, and
            the column of `topk_idx` it came from; in ascending (rank, column) order, then -1.
            Without `expand` a destination rank occurs once per token.
        num_rows_per_rank: R numbers, the rows each rank receives, padding included.
        num_tokens_per_rank: R numbers, this rank's tokens that go to each rank, each counted once.
        num_recv_tokens_per_rank: R numbers, tokens that come from each rank, each counted once.
        num_recv_tokens_per_expert: L numbers, rows per local expert rounded up to
            `expert_alignment` (DeepEP's meaning; with `expand` the rows of each block).
        num_valid_tokens_per_expert: L numbers, the same before rounding.
        topk_idx: `[T, K]`, a copy, only without `expand`: which slots' weights go where.
        recv_row: `[M, K]` int64, only from a backend where rows travel once per rank: the
            expert-major row of each received (token, slot), or -1.
        links: `[N, 2]` int32 for N expert-major rows, only from backend `cuda` and where a token
            may have several of them on a rank: the first of a row's token (-1 for padding) and the
            one behind it (-1 for none), in slot order.
        hop: only from a backend where rows travel once per host.
    """

    plan_id: int
    rank: int
    num_ranks: int
    num_tokens: int
    num_topk: int
    num_experts: int
    expand: bool
    expert_alignment: int
    routes: Tensor
    num_rows_per_rank: tuple[int, ...]
    num_tokens_per_rank: tuple[int, ...]
    num_recv_tokens_per_rank: tuple[int, ...]
    num_recv_tokens_per_expert: tuple[int, ...]
    num_valid_tokens_per_expert: tuple[int, ...]
    topk_idx: Tensor | None = None
    recv_row: Tensor | None = None
    links: Tensor | None = None
    hop: HostHop | NodeHop | None = None

    @property
    def route_rank(self) -> Tensor:
        """`[T, K]` int32, see `routes`."""
        return self.routes[0]

    @property
    def route_row(self) -> Tensor:
        """`[T, K]` int32, see `routes`."""
        return self.routes[1]

    @property
    def route_slot(self) -> Tensor:
        """`[T, K]` int32, see `routes`."""
        return self.routes[2]

    @property
    def num_recv_rows(self) -> int:
        """Rows this rank receives, padding included."""
        return self.num_rows_per_rank[self.rank]

    @property
    def num_local_experts(self) -> int:
        """Experts on each rank."""
        return self.num_experts // self.num_ranks


# What the first of a CapacityHandle's numbers says; ReportStatus in csrc/cuda/protocol.h.
COMPLETE, TOO_MANY_ROWS = 1, 4
_NUM_NUMBERS_BEFORE_EXPERTS = 2  # that status, and the rows


class CapacityHandle:
    """The handle of a dispatch with `num_worst_tokens`: known before any count is.

    Its tensors are filled once the dispatch's event is complete, like the rows. To be used
    with calls of the same Buffer, which run behind the dispatch.

    Attributes:
        rank: see `DispatchHandle`, as all that has no description here.
        num_worst_tokens: rows of every tensor that arrives, and that `combine` takes.
        numbers: `[2 + 2L + R]` int32: how the dispatch ended, and what is below; all in one.
        num_recv_rows_tensor: `[1]` int32, the rows that are there; those behind mean nothing.
        num_recv_tokens_per_expert: `[L]` int32, rows per local expert, rounded up.
        num_valid_tokens_per_expert: `[L]` int32, the same before rounding.
        num_recv_tokens_per_rank: `[R]` int32, tokens that came from each rank.
    """

    def __init__(
        self,
        topk_idx: Tensor,
        num_experts: int,
        ranks: tuple[int, int],
        num_worst_tokens: int,
        expand: bool,
        numbers: Tensor | None = None,
    ) -> None:
        self.rank, self.num_ranks = ranks
        self.num_tokens, self.num_topk = topk_idx.shape
        self.num_experts, self.num_worst_tokens = num_experts, num_worst_tokens
        self.expand = expand
        if numbers is None:
            size = num_numbers(num_experts, self.num_ranks)
            numbers = topk_idx.new_zeros(size, dtype=torch.int32)
        per_expert = num_experts // self.num_ranks
        sizes = (1, 1, per_expert, per_expert, self.num_ranks)
        self.numbers, parts = numbers, numbers.split(sizes)
        self._status, self.num_recv_rows_tensor, self.num_recv_tokens_per_expert = parts[:3]
        self.num_valid_tokens_per_expert, self.num_recv_tokens_per_rank = parts[3:]
        self._settled: DispatchHandle | None = None

    @property
    def num_recv_rows(self) -> int:
        """Rows of tensors, `num_worst_tokens`."""
        return self.num_worst_tokens

    @property
    def has_overflowed(self) -> Tensor:
        """`[1]` bool, whether more rows than `num_worst_tokens` came to some rank."""
        is_too_many: Tensor = self._status == TOO_MANY_ROWS
        return is_too_many

    def check(self) -> None:
        """Wait for the dispatch, and raise if it failed. Local, the same on all ranks.

        Raises:
            ValueError: if it did.
        """
        self.settled()

    def settle(self, handle: DispatchHandle) -> None:
        """Take over the numbers of the dispatch; raise if they exceed the capacity.

        Raises:
            ValueError: on every rank alike, as all know all numbers.
        """
        if max(handle.num_rows_per_rank) > self.num_worst_tokens:
            self._status.fill_(TOO_MANY_ROWS)
            raise too_many_rows(self.num_worst_tokens, handle.num_rows_per_rank)
        self.num_recv_rows_tensor.fill_(handle.num_recv_rows)
        for name in (
            "num_recv_tokens_per_expert",
            "num_valid_tokens_per_expert",
            "num_recv_tokens_per_rank",
        ):
            getattr(self, name).copy_(torch.tensor(getattr(handle, name), dtype=torch.int32))
        self._status.fill_(COMPLETE)
        self._settled = handle

    def settled(self) -> DispatchHandle:
        """Return the exact handle, once the dispatch is complete.

        Raises:
            ValueError: if it is not, or failed.
        """
        if self._settled is None:
            raise _incomplete()
        return self._settled


@dataclass(frozen=True, eq=False, kw_only=True)
class DeviceHop:
    """How rows change nodes where no host knows how many do; see `NodeHop`.

    P places of the memory between nodes. Tensors are int32.

    Attributes:
        by_node: `[3, T, N]`; a token's place is one of the P, on its own node its number.
        routes: `[3, T, K]` of this rank's tokens, between the ranks of its node; where rows go by
            rank `[4, T, K]`, with the expert ids there.
        forwarded: `[3, P, K]` or `[4, P, K]`, likewise for what this rank forwards.
        piles: whose tokens are where: CrossPlan in csrc/cuda/protocol.h.
    """

    by_node: Tensor
    routes: Tensor
    forwarded: Tensor
    piles: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class DevicePlan:
    """What kernels leave of a dispatch that no host has waited for.

    Attributes:
        plan_id: number of the dispatch that made the handle, as hosts count; the same on all ranks.
        expert_alignment: see `DispatchHandle`.
        numbers: see `CapacityHandle`.
        routes: see `DispatchHandle`; all -1 if the dispatch failed.
        links: likewise, with N the capacity; rows that did not come have none.
        hop: how rows change nodes, if ranks are on several.
    """

    plan_id: int
    expert_alignment: int
    numbers: Tensor
    routes: Tensor
    links: Tensor | None
    hop: DeviceHop | None = None


class DeviceHandle(CapacityHandle):
    """The handle of a dispatch that no host has waited for: its numbers are on the device alone.

    It has what `DevicePlan` and `DispatchHandle` have under the same names.
    """

    def __init__(
        self,
        topk_idx: Tensor,
        num_experts: int,
        ranks: tuple[int, int],
        num_worst_tokens: int,
        expand: bool,
        plan: DevicePlan,
        raise_failure: Callable[[], None],
    ) -> None:
        super().__init__(topk_idx, num_experts, ranks, num_worst_tokens, expand, plan.numbers)
        self.plan_id, self.expert_alignment = plan.plan_id, plan.expert_alignment
        self.routes, self.links, self.hop = plan.routes, plan.links, plan.hop
        self.topk_idx = None if expand else topk_idx
        self._raise_failure = raise_failure

    def check(self) -> None:
        """Wait on the host for the dispatch, and raise if it failed. Local, but alike on all ranks.

        Raises:
            ValueError: what a dispatch that the host waits for raises, once; then that it failed.
            RuntimeError: if a rank did not come in time.
        """
        if int(self._status) != COMPLETE:
            self._raise_failure()
            raise _incomplete()


AnyHandle = DispatchHandle | CapacityHandle


def exact(handle: AnyHandle) -> DispatchHandle:
    """Return a handle with all numbers; see `CapacityHandle.settled`."""
    return handle if isinstance(handle, DispatchHandle) else handle.settled()


def num_numbers(num_experts: int, num_ranks: int) -> int:
    """Return how many numbers a `CapacityHandle` has."""
    return _NUM_NUMBERS_BEFORE_EXPERTS + 2 * (num_experts // num_ranks) + num_ranks


def too_many_rows(num_worst_tokens: int, num_rows_per_rank: Sequence[int]) -> ValueError:
    """Return the error of a dispatch that brings more rows than there is room for."""
    most = max(num_rows_per_rank)
    return ValueError(
        f"dispatch: expected at most num_worst_tokens = {num_worst_tokens} rows on a "
        f"rank, got {most} on rank {num_rows_per_rank.index(most)}; raise it"
    )


def _incomplete() -> ValueError:
    return ValueError("expected handle to be of a complete dispatch, got one that failed")
