"""Two hops planned at once: which tokens go to which host, and where every row ends up there.

A token goes once to each host that has one of its experts: to the gateway, the rank of the same
index there, which puts it at its final addresses. Every rank has the counts of all, so a gateway
works out the addresses of what it forwards from the expert ids alone, as the source would:
restricted to the experts of one host, the plan of a source is the plan of that host.

T tokens, K top-k, E experts, R ranks, L experts per rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ep_megatron import _cpu
from ep_megatron.arguments import SUM_DTYPES
from ep_megatron.backends.base import Routing
from ep_megatron.handle import DispatchHandle, HostHop
from ep_megatron.hosts import Hosts
from ep_megatron.layout import round_up

WIRE_IDX_DTYPE = torch.int16  # of expert ids between hosts: at most 16384 experts


@dataclass(frozen=True, eq=False)
class Counts:
    """What a rank knows of all ranks' routing. R_h and E_h: ranks and experts of its host.

    Attributes:
        told: `[R, R_h + E_h + 1]` int32, by source: tokens to each rank of this host, slots to each
            of its experts, tokens to the host at all.
        folded: `[3, R + E]` int32, tokens to each rank and slots to each expert: of all ranks
            before this one, its own, of all behind it. No more is needed to place its rows.
    """

    told: Tensor
    folded: Tensor


@dataclass(frozen=True, eq=False)
class HostPlan:
    """One rank's routing, before and after the counts of all ranks are known.

    Attributes:
        hosts: which ranks share a host.
        rank: this rank.
        routing: of this rank's tokens, in range.
    """

    hosts: Hosts
    rank: int
    routing: Routing

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.hosts.host_of)

    @property
    def host(self) -> int:
        """This rank's host."""
        return self.hosts.host_of[self.rank]

    @cached_property
    def is_slot_in_host(self) -> Tensor:
        """`[T, K, hosts]` bool."""
        experts = torch.arange(self.routing.num_experts)
        ranks = experts // (self.routing.num_experts // self.num_ranks)
        host_of_expert = torch.tensor([*self.hosts.host_of])[ranks]
        # The last entry is what an unused slot, -1, finds.
        hosts = torch.cat([host_of_expert, torch.tensor([-1])])[self.routing.topk_idx.long()]
        return hosts[:, :, None] == torch.arange(self.hosts.num_hosts)

    @cached_property
    def is_token_in_host(self) -> Tensor:
        """`[T, hosts]` bool."""
        return self.is_slot_in_host.any(1)

    @cached_property
    def tokens_per_host(self) -> tuple[Tensor, ...]:
        """For each host, the ascending numbers of the tokens that go there."""
        return tuple(column.nonzero()[:, 0] for column in self.is_token_in_host.T)

    @cached_property
    def counts(self) -> Tensor:
        """This rank's tokens per rank, slots per expert, tokens per host: `[R + E + hosts]` int32.

        All ranks' make `all_counts`.
        """
        num_experts = self.routing.num_experts
        counts = torch.zeros(self.num_ranks + num_experts + self.hosts.num_hosts, dtype=torch.int32)
        per_rank, per_expert, per_host = self.split(counts)
        _cpu.count_tokens(
            *_routing_numbers(self.routing, self.num_ranks),
            per_rank.data_ptr(),
            per_expert.data_ptr(),
        )
        per_host.copy_(self.is_token_in_host.sum(0))
        return counts

    def split(self, counts: Tensor) -> tuple[Tensor, ...]:
        """Split `[..., R + E + hosts]` into tokens per rank, slots per expert, tokens per host."""
        sizes = [self.num_ranks, self.routing.num_experts, self.hosts.num_hosts]
        return tuple(torch.split(counts, sizes, -1))

    def _columns(self, host: int) -> Tensor:
        """Return where the ranks and experts of a host are in `[R + E]`."""
        members = torch.tensor(self.hosts.members[host])
        experts = torch.arange(self.routing.num_experts).view(self.num_ranks, -1)[members]
        return torch.cat([members, self.num_ranks + experts.flatten()])

    def num_places(self, host: int) -> int:
        """Return how many ranks and experts a host has."""
        experts_per_rank = self.routing.num_experts // self.num_ranks
        return len(self.hosts.members[host]) * (1 + experts_per_rank)

    def all_counts(self, everyone: Tensor) -> Counts:
        """Return what follows from the `counts` of all ranks, `[R, R + E + hosts]`."""
        num_places = self.num_ranks + self.routing.num_experts
        columns = torch.cat([self._columns(self.host), torch.tensor([num_places + self.host])])
        return Counts(everyone[:, columns], _fold(everyone[:, :num_places], self.rank))

    def telling(self, host: int) -> Tensor:
        """Return what the ranks of a host must know: a row of their `Counts.told`."""
        own = self.counts
        num_here = own[self.num_ranks + self.routing.num_experts + host]
        return torch.cat([own[self._columns(host)], num_here[None]])

    def answer(self, told: Tensor, source: int) -> Tensor:
        """Return what a rank must know of this host, of the counts before and behind its own.

        Args:
            told: see `Counts`.
            source: that rank, which this one forwards for.

        Returns:
            `[2, R_h + E_h]` int32.
        """
        return _fold(told[:, :-1], source)[::2]

    def counts_of_answers(self, told: Tensor, answers: Sequence[Tensor]) -> Counts:
        """Return what follows from the `telling` of all ranks and the `answer` of every host.

        Args:
            told: see `Counts`.
            answers: of every host's gateway, this host's own among them.
        """
        num_places = self.num_ranks + self.routing.num_experts
        folded = torch.empty(3, num_places, dtype=torch.int32)
        folded[1] = self.counts[:num_places]
        for host, answer in enumerate(answers):
            folded[::2, self._columns(host)] = answer
        return Counts(told, folded)

    def inner_idx(self, host: int, dtype: torch.dtype) -> Tensor:
        """Number the experts of the tokens that go to `host` within it: `[n, K]`, or -1."""
        num_experts = self.routing.num_experts
        per_rank = num_experts // self.num_ranks
        table = torch.full((num_experts + 1,), -1, dtype=dtype)
        for index, rank in enumerate(self.hosts.members[host]):
            experts = torch.arange(index * per_rank, (index + 1) * per_rank, dtype=dtype)
            table[rank * per_rank : (rank + 1) * per_rank] = experts
        return table[self.routing.topk_idx[self.tokens_per_host[host]].long()]

    def handle(self, plan_id: int, counts: Counts) -> DispatchHandle:
        """Return the handle without its hop: everything in it is what other backends put there."""
        routing, num_ranks = self.routing, self.num_ranks
        matrix, per_expert = counts.folded[:, :num_ranks], counts.folded[:, num_ranks:]
        matrix, per_expert = matrix.contiguous(), per_expert.contiguous()
        valid = per_expert.sum(0).view(num_ranks, -1)
        blocks = round_up(valid, routing.expert_alignment)
        routes = torch.empty(3, *routing.topk_idx.shape, dtype=torch.int32)
        _make_routes(routing, matrix, per_expert, _OWN, routes)
        index = self.hosts.members[self.host].index(self.rank)
        return DispatchHandle(
            plan_id=plan_id,
            rank=self.rank,
            num_ranks=num_ranks,
            num_tokens=len(routing.topk_idx),
            num_topk=routing.topk_idx.shape[1],
            num_experts=routing.num_experts,
            expand=routing.expand,
            expert_alignment=routing.expert_alignment,
            routes=routes,
            num_rows_per_rank=tuple((blocks.sum(1) if routing.expand else matrix.sum(0)).tolist()),
            num_tokens_per_rank=tuple(matrix[_OWN].tolist()),
            num_recv_tokens_per_rank=tuple(counts.told[:, index].tolist()),
            num_recv_tokens_per_expert=tuple(blocks[self.rank].tolist()),
            num_valid_tokens_per_expert=tuple(valid[self.rank].tolist()),
            topk_idx=None if routing.expand else routing.topk_idx.clone(),
        )

    def num_forwarded(self, counts: Counts) -> tuple[tuple[int, int], ...]:
        """Return (source rank, rows) of all that this rank forwards, ascending."""
        here = counts.told[:, -1].tolist()
        return tuple((source, here[source]) for source in self.hosts.served_by(self.rank))

    def _inside(self, counts: Counts) -> tuple[list[int], Tensor, Tensor]:
        """Return this host's ranks, and the counts of all ranks `[R, ...]` for it alone."""
        members = list(self.hosts.members[self.host])
        matrix, per_expert = counts.told[:, : len(members)], counts.told[:, len(members) : -1]
        return members, matrix.contiguous(), per_expert.contiguous()

    def settle(self, hop: HostHop, counts: Counts, forwarded_idx: Sequence[Tensor]) -> None:
        """Fill in what a hop needs to know of forwarded rows, once their experts have come.

        Args:
            hop: of this plan.
            counts: of all ranks.
            forwarded_idx: `[n, K]` of each rank that this one forwards for, see `inner_idx`.
        """
        _, matrix, per_expert = self._inside(counts)
        own_idx = torch.full_like(self.routing.topk_idx, -1)
        tokens = self.tokens_per_host[self.host]
        own_idx[tokens] = self.inner_idx(self.host, self.routing.topk_idx.dtype)
        topk_idx = torch.cat([own_idx, *forwarded_idx])
        first = 0
        for source, num_tokens in ((self.rank, len(own_idx)), *hop.num_forwarded):
            part = slice(first, first := first + num_tokens)
            num_experts = hop.inner.num_experts
            inner = replace(self.routing, topk_idx=topk_idx[part], num_experts=num_experts)
            _make_routes(inner, matrix, per_expert, source, hop.inner.routes[:, part])
        if hop.inner.topk_idx is not None:
            hop.inner.topk_idx.copy_(topk_idx)

    def hop(self, handle: DispatchHandle, counts: Counts) -> HostHop:
        """Plan the second hop, but for what `settle` fills in: routes and experts inside the host.

        Args:
            handle: of this rank's routing.
            counts: of all ranks.
        """
        members, matrix, per_expert = self._inside(counts)
        num_forwarded = self.num_forwarded(counts)
        num_tokens = handle.num_tokens + sum(count for _, count in num_forwarded)
        like = self.routing.topk_idx
        through = [[rank, *self.hosts.served_by(rank)] for rank in members]
        index = members.index(self.rank)
        row_in_host = self.is_token_in_host.cumsum(0, dtype=torch.int32) - 1
        row_in_host[:, self.host] = torch.arange(handle.num_tokens)
        return HostHop(
            inner=replace(
                handle,
                rank=index,
                num_ranks=len(members),
                num_tokens=num_tokens,
                num_experts=per_expert.shape[1],
                routes=torch.empty(3, num_tokens, like.shape[1], dtype=torch.int32),
                num_rows_per_rank=tuple(handle.num_rows_per_rank[rank] for rank in members),
                num_tokens_per_rank=tuple(matrix[through[index]].sum(0).tolist()),
                num_recv_tokens_per_rank=tuple(
                    int(matrix[sources, index].sum()) for sources in through
                ),
                topk_idx=None if handle.expand else like.new_empty(num_tokens, like.shape[1]),
            ),
            tokens_per_host=self.tokens_per_host,
            row_in_host=row_in_host.masked_fill(~self.is_token_in_host, -1),
            is_slot_in_host=self.is_slot_in_host,
            num_forwarded=num_forwarded,
        )


_OWN = 1  # of the three rows of `Counts.folded`


def _fold(counts: Tensor, rank: int) -> Tensor:
    """Return `[3, C]` of `[R, C]`: the sum of the rows before a rank's, its own, of those behind.

    Sums stay below 2^31, which is more rows than a rank may have: the host then stops the call.
    """
    before, behind = counts[:rank].sum(0), counts[rank + 1 :].sum(0)
    folded = torch.stack([before, counts[rank].long(), behind])
    return folded.clamp(max=torch.iinfo(torch.int32).max).int()


def _make_routes(
    routing: Routing, matrix: Tensor, per_expert: Tensor, source: int, routes: Tensor
) -> None:
    """Fill `routes [3, T, K]`; `matrix [S, R]` and `per_expert [S, E]` are contiguous."""
    _cpu.make_routes(
        *_routing_numbers(routing, matrix.shape[1]),
        (matrix.data_ptr(), per_expert.data_ptr(), len(matrix)),
        source,
        (routes[0].data_ptr(), routes[1].data_ptr(), routes[2].data_ptr()),
    )


def _routing_numbers(
    routing: Routing, num_ranks: int
) -> tuple[int, int, tuple[int, int, int, int, bool, int]]:
    topk_idx = routing.topk_idx
    sizes = (
        *topk_idx.shape,
        routing.num_experts,
        num_ranks,
        routing.expand,
        routing.expert_alignment,
    )
    return topk_idx.data_ptr(), topk_idx.element_size(), sizes


def add_parts(
    parts: Sequence[Tensor], hop: HostHop, biases: Sequence[Tensor], total: Tensor
) -> None:
    """Add biases and the hosts' sums of each token, host after host, into `total [T, H]`."""
    first, second, *_ = [*(bias.data_ptr() for bias in biases), 0, 0]
    _cpu.sum_parts(
        (SUM_DTYPES.index(total.dtype), total.shape[1], len(total)),
        [part.data_ptr() for part in parts],
        hop.row_in_host.data_ptr(),
        (first, second),
        total.data_ptr(),
    )


def sum_weights(parts: Sequence[Tensor], hop: HostHop, handle: DispatchHandle) -> Tensor:
    """Add the hosts' weights of each token, `[T, K]`; expert-major ones come from one host each."""
    like = parts[0]
    total = like.new_full((handle.num_tokens, handle.num_topk), 0.0 if handle.expand else -0.0)
    for host, (part, tokens) in enumerate(zip(parts, hop.tokens_per_host, strict=True)):
        rows = part[hop.row_in_host[tokens, host].long()]
        if handle.expand:
            is_here = hop.is_slot_in_host[tokens, :, host]
            total[tokens] = torch.where(is_here, rows, total[tokens])
        else:
            total[tokens] += rows
    return total if handle.expand else total.masked_fill(handle.route_rank[:, :1] < 0, 0)
