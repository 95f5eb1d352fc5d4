"""The way of rows that change nodes where no host knows how many do, as kernels read it.

T tokens, K top-k, N nodes, P places between nodes.
"""

from dataclasses import dataclass

import torch

from ep_megatron import _cuda
from ep_megatron.backends.base import Call, Routing
from ep_megatron.backends.crossing_within import Areas
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_meeting import DeviceMeeting
from ep_megatron.backends.node_ends import ITEM_BYTES, ROUTE_PLANES, Ends, Fresh, Place
from ep_megatron.handle import DeviceHandle, DeviceHop


@dataclass(frozen=True)
class Way:
    """That of one routing.

    Attributes:
        ends: see `Ends`; `forwarded` is that of `DeviceHop`.
        piles: see `DeviceHop`.
        fresh: where other nodes do not know the routing.
    """

    ends: Ends
    piles: Memory
    fresh: Fresh | None = None

    @staticmethod
    def new(
        place: Place, everyone: DeviceMeeting, call: Call, routing: Routing
    ) -> tuple["Way", _cuda.ScanArgs]:
        """Make room for the way of a routing; return what plans it, too."""
        device, nodes, topk_idx = place.device, place.nodes, routing.topk_idx
        num_tokens, num_topk = topk_idx.shape
        num_places = Areas.places(routing.num_worst_tokens, everyone.num_ranks)
        given = device.input(topk_idx)
        planes = ROUTE_PLANES + (not routing.expand)
        fresh = Fresh(
            by_node=device.output(torch.int32, (3, num_tokens, nodes.num_hosts)),
            routes=device.output(torch.int32, (3, num_tokens, num_topk)),
            topk_idx=None if routing.expand else given,
            own=device.output(torch.int32, (planes, num_tokens, num_topk)),
            forwarded=device.output(torch.int32, (planes, num_places, num_topk)),
            idx_dtype=None if routing.expand else topk_idx.dtype,
        )
        piles = device.output(torch.int32, (_cuda.CROSS_PLAN_BYTES // ITEM_BYTES,))
        scan = everyone.scan(given.address, call, num_tokens, fresh.routes.address)
        scan.num_nodes, scan.node = nodes.num_hosts, place.node
        scan.node_of, scan.by_node = list(nodes.host_of), fresh.by_node.address
        scan.node_starts = piles.address + _cuda.CROSS_NODE_STARTS_AT
        return Way(fresh.ends(), piles, fresh), scan

    @staticmethod
    def of(device: Device, handle: DeviceHandle) -> "Way":
        """Return that of an earlier dispatch."""
        hop = handle.hop
        assert hop is not None
        own = device.input(hop.routes)
        idx = None
        if own.shape[0] > ROUTE_PLANES:
            at = own.address + own.num_bytes // own.shape[0] * ROUTE_PLANES
            idx = Memory(at, own.dtype, own.shape[1:], own)
        ends = Ends(device.input(hop.by_node), own, idx, device.input(hop.forwarded))
        return Way(ends, device.input(hop.piles))

    def hop(self, device: Device) -> DeviceHop:
        """Return what a fresh dispatch leaves for later calls, after `on_stream`."""
        assert self.fresh is not None
        return DeviceHop(
            by_node=device.tensor(self.fresh.by_node),
            routes=device.tensor(self.fresh.own),
            forwarded=device.tensor(self.fresh.forwarded),
            piles=device.tensor(self.piles),
        )

    @property
    def sent(self) -> int:
        """Address of the piles by gateway."""
        return self.piles.address

    @property
    def came(self) -> int:
        """Address of the piles by source."""
        return self.piles.address + _cuda.CROSS_CAME_AT

    @property
    def num_places(self) -> int:
        """P."""
        return self.ends.forwarded.shape[1]

    @property
    def idx(self) -> int:
        """Address of the expert ids of what is forwarded; 0 where rows go by expert."""
        forwarded = self.ends.forwarded
        if forwarded.shape[0] == ROUTE_PLANES:
            return 0
        return forwarded.address + forwarded.num_bytes // forwarded.shape[0] * ROUTE_PLANES
