"""What a rank's kernels know of rows that change nodes: which nodes, and where they end up there.

T tokens, K top-k, N nodes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ep_megatron.backends.base import Routing
from ep_megatron.backends.crossing import PART_ALIGNMENT, Pile
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_arena import align
from ep_megatron.handle import NodeHop
from ep_megatron.hosts import Hosts

ITEM_BYTES = 4  # of routes, and of expert ids between nodes
ROUTE_PLANES = 3


@dataclass(frozen=True)
class Place:
    """Where launches are made: a rank's device, its place among nodes, and most blocks."""

    device: Device
    nodes: Hosts
    rank: int
    num_sms: int

    @property
    def node(self) -> int:
        """This rank's."""
        return self.nodes.host_of[self.rank]

    def by_node(self, own: int, blocks: dict[int, int]) -> list[int]:
        """Return an address per node: its gateway's of `blocks`, 0 where there is none."""
        gateways = [self.nodes.gateway(self.rank, node) for node in range(self.nodes.num_hosts)]
        addresses = [blocks.get(gateway, 0) for gateway in gateways]
        addresses[self.node] = own
        return addresses

    def own_and_far(self, own: int, far: int) -> list[int]:
        """Return a number per node: `own` of this one, `far` of all others."""
        return [own if node == self.node else far for node in range(self.nodes.num_hosts)]


@dataclass(frozen=True)
class Ends:
    """Where the rows of a routing end up in this node, as its kernels read it.

    Attributes:
        by_node: see `NodeHop`.
        routes: `[3, T, K]` of this rank's tokens, between the node's ranks.
        idx: `[T, K]` int32 among the node's experts, None where weights say themselves whose they
            are.
        forwarded: see `NodeHop`.
        own: routes and idx in one, where they are still to be filled.
    """

    by_node: Memory
    routes: Memory
    idx: Memory | None
    forwarded: Memory
    own: Memory | None = None

    @staticmethod
    def of(device: Device, hop: NodeHop) -> "Ends":
        """Return those of an earlier dispatch."""
        idx = hop.inner.topk_idx
        return Ends(
            by_node=device.input(hop.by_node),
            routes=device.input(hop.inner.routes),
            idx=None if idx is None else device.input(idx),
            forwarded=device.input(hop.forwarded),
        )

    def kept(self, device: Device, hop: NodeHop) -> NodeHop:
        """Return a hop with what a fresh dispatch has filled, after `on_stream`."""
        assert self.own is not None
        own = device.tensor(self.own)
        inner = replace(
            hop.inner,
            routes=own[:ROUTE_PLANES],
            topk_idx=None if self.idx is None else own[ROUTE_PLANES],
        )
        by_node, forwarded = device.tensor(self.by_node), device.tensor(self.forwarded)
        return replace(hop, inner=inner, by_node=by_node, forwarded=forwarded)


@dataclass(frozen=True)
class Fresh:
    """What a rank knows at its first dispatch of a routing, and other nodes do not yet.

    Attributes:
        by_node: see `NodeHop`.
        routes: `[3, T, K]` between all ranks.
        topk_idx: `[T, K]`, only by rank.
        own: `[3 or 4, T, K]`, to be filled: see `Ends`.
        forwarded: to be filled, see `NodeHop`.
        idx_dtype: of the ids that arrive, only by rank.
    """

    by_node: Memory
    routes: Memory
    topk_idx: Memory | None
    own: Memory
    forwarded: Memory
    idx_dtype: torch.dtype | None

    @staticmethod
    def of(
        device: Device,
        routing: Routing,
        topk_idx: Memory,
        found: tuple[Memory, Memory],
        num_forwarded: Sequence[int],
    ) -> "Fresh":
        """Make room for what is to be filled.

        Args:
            device: this rank's.
            routing: of this rank.
            topk_idx: of it.
            found: `routes` and `by_node`.
            num_forwarded: tokens, by source.
        """
        num_tokens, num_topk = routing.topk_idx.shape
        planes = ROUTE_PLANES + (not routing.expand)
        num_bytes = sum(_plan_bytes(planes, n, num_topk) for n in num_forwarded)
        return Fresh(
            by_node=found[1],
            routes=found[0],
            topk_idx=None if routing.expand else topk_idx,
            own=device.output(torch.int32, (planes, num_tokens, num_topk)),
            forwarded=device.output(torch.int32, (num_bytes // ITEM_BYTES,)),
            idx_dtype=None if routing.expand else routing.topk_idx.dtype,
        )

    def ends(self) -> Ends:
        """Return what will be known of the rows' ends."""
        shape, idx = self.own.shape[1:], None
        if self.topk_idx is not None:
            at = self.own.address + ROUTE_PLANES * shape[0] * shape[1] * ITEM_BYTES
            idx = Memory(at, torch.int32, shape, self.own.owner)
        return Ends(self.by_node, self.own, idx, self.forwarded, self.own)


def _plan_bytes(planes: int, num_rows: int, num_topk: int) -> int:
    return align(planes * num_rows * num_topk * ITEM_BYTES, PART_ALIGNMENT)


def plans(
    piles: Mapping[int, Pile], at: int, planes: int, num_topk: int
) -> Iterator[tuple[Pile, int]]:
    """Yield the rows of each rank that is forwarded for, and where their plan is kept."""
    for pile in piles.values():
        yield pile, at
        at += _plan_bytes(planes, pile.num_rows, num_topk)
