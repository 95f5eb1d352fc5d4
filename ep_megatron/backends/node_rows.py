"""What is launched for rows that change nodes: laid out, forwarded, summed on their way back.

Nothing here waits on the host. The kernels are in csrc/cuda/cross.cu, dispatch.cu and combine.cu.
T tokens, K top-k, N nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Call, Rows
from ep_megatron.backends.crossing import Exchange, Pile, Record
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_calls import Send, Sum
from ep_megatron.backends.device_links import SUM_DTYPES, address_of
from ep_megatron.backends.node_ends import ITEM_BYTES, ROUTE_PLANES, Ends, Fresh, Place, plans
from ep_megatron.config import MAX_CHUNKS
from ep_megatron.handle import DispatchHandle, NodeHop

_SCALES, _WEIGHTS, _PLAN = 1, 2, 3  # parts of a block, behind the rows of a dispatch


@dataclass(frozen=True)
class Sending:
    """A dispatch between nodes: what leaves, and what is forwarded."""

    send: Send  # inside this node
    ends: Ends
    fresh: Fresh | None

    @staticmethod
    def of(device: Device, rows: Rows, hop: NodeHop, ends: Ends, fresh: Fresh | None) -> "Sending":
        """Describe it; `fresh` where other nodes do not know the routing."""
        call = Call.of("cached dispatch", rows, hop.inner)
        idx_dtype = None if fresh is None else fresh.idx_dtype
        send = Send.of(device, call, rows, hop.inner, ends.routes, idx_dtype=idx_dtype)
        return Sending(replace(send, topk_idx=ends.idx), ends, fresh)

    @property
    def record(self) -> Record:
        """What crosses of a token: its row, scales, weights, and in a first dispatch its plan."""
        layout, weights = self.send.layout, self.send.weights
        num_topk = self.send.call.num_topk
        plan = 0 if self.fresh is None else self._planes * num_topk * ITEM_BYTES
        return Record(
            layout.x.num_bytes,
            (
                0 if layout.scales is None else layout.scales.num_bytes,
                0 if weights is None else num_topk * weights.dtype.itemsize,
                plan,
            ),
        )

    @property
    def _planes(self) -> int:
        return ROUTE_PLANES + (self.ends.idx is not None)

    def leave(self, place: Place, exchange: Exchange, hop: NodeHop) -> None:
        """Lay out rows, cast if they are, and what goes beside them, in the outbox."""
        send, num_tokens, num_nodes = self.send, len(self.send.rows.x), place.nodes.num_hosts
        piles = exchange.outbox
        starts = [
            place.by_node(0, {rank: pile.starts[part] for rank, pile in piles.items()})
            for part in range(1 + _PLAN)
        ]
        if piles:
            rows = _cuda.DispatchArgs(
                x=send.x.address,
                scales=address_of(send.scales),
                routes=self.ends.by_node.address,
                route_plane=num_tokens * num_nodes,
                num_tokens=num_tokens,
                alignment=1,
                num_topk=num_nodes,
                row_bytes=send.call.hidden * send.x.dtype.itemsize,
                out_row_bytes=exchange.record.row,
                scale_bytes=exchange.record.beside[0],
                experts_per_rank=1,
                to_x=starts[0],
                to_scales=starts[_SCALES],
            )
            place.device.launch(send.launch(rows, place.num_sms))
        if self.fresh is not None or (piles and send.weights is not None):
            beside = self._beside(place, starts, hop.num_to_node[place.rank])
            place.device.launch(_cuda.plan_cross_lay(beside, place.num_sms))

    def _beside(
        self, place: Place, starts: Sequence[Sequence[int]], num_to: Sequence[int]
    ) -> _cuda.CrossLayArgs:
        """Return what lays out what goes beside rows, at `starts` by part and node."""
        send, call, fresh = self.send, self.send.call, self.fresh
        num_tokens = len(send.rows.x)
        count = [num_tokens if node == place.node else n for node, n in enumerate(num_to)]
        to_routes = list(starts[_PLAN])
        to_routes[place.node] = self.ends.routes.address
        plane = call.num_topk * ITEM_BYTES
        to_idx = [
            at and at + ROUTE_PLANES * n * plane for at, n in zip(to_routes, count, strict=True)
        ]
        topk_idx = None if fresh is None else fresh.topk_idx
        return _cuda.CrossLayArgs(
            by_node=self.ends.by_node.address,
            routes=0 if fresh is None else fresh.routes.address,
            topk_idx=address_of(topk_idx),
            weights=address_of(send.weights),
            num_tokens=num_tokens,
            num_topk=call.num_topk,
            num_nodes=place.nodes.num_hosts,
            node=place.node,
            is_int64=topk_idx is not None and topk_idx.dtype == torch.int64,
            weight_bytes=0 if send.weights is None else send.weights.dtype.itemsize,
            experts_per_rank=call.num_experts // len(place.nodes.members[place.node]),
            to_routes=to_routes,
            to_idx=to_idx,
            to_weights=starts[_WEIGHTS],
            num_to=count,
            node_of=list(place.nodes.host_of),
            index_of=list(place.nodes.index_of),
        )

    def forward(self, place: Place, exchange: Exchange, args: _cuda.DispatchArgs) -> None:
        """Put own tokens at their places, then every chunk of others' that has come.

        Args:
            place: where to launch.
            exchange: whose rows have been put, by all ranks.
            args: what one launch would move all own tokens by.
        """
        device, send, record = place.device, self.send, exchange.record
        device.launch(send.launch(args, place.num_sms))
        exchange.wait_for_beside()
        if self.fresh is not None:
            for pile, plan in self._piles(exchange):
                copy = _cuda.StageArgs(
                    rows=pile.starts[_PLAN],
                    to_rows=plan,
                    num_row_bytes=pile.starts[_PLAN + 1] - pile.starts[_PLAN],
                )
                device.launch(_cuda.plan_stage(copy, place.num_sms))
        args.row_bytes, args.alignment = record.row, 1  # cast; padding is cleared
        entry, part_bytes = send.call.num_topk * ITEM_BYTES, (record.row, *record.beside)
        for chunk in range(exchange.num_chunks):
            exchange.wait_for_rows(chunk)
            for pile, plan in self._piles(exchange):
                if chunk >= len(pile.chunks):
                    continue
                first = pile.chunks[chunk].start
                args.x, args.scales, args.weights, _ = (
                    start + first * size if size else 0
                    for start, size in zip(pile.starts, part_bytes, strict=False)
                )
                args.routes = plan + first * entry
                args.route_plane = pile.num_rows * send.call.num_topk
                if self.ends.idx is not None:
                    args.topk_idx = args.routes + ROUTE_PLANES * pile.num_rows * entry
                args.num_tokens = len(pile.chunks[chunk])
                device.launch(_cuda.plan_dispatch(args, place.num_sms))

    def _piles(self, exchange: Exchange) -> Iterator[tuple[Pile, int]]:
        """Yield what has come from each rank, and where its plan is kept."""
        return plans(
            exchange.inbox, self.ends.forwarded.address, self._planes, self.send.call.num_topk
        )


@dataclass(frozen=True)
class Returning:
    """A combine between nodes: sums that return, and the sum over nodes."""

    record: Record  # of a token's sum and weights
    num_topk: int
    expand: bool
    weights_dtype: torch.dtype | None

    @staticmethod
    def of(rows: Rows, inner: DispatchHandle) -> "Returning":
        """Describe it."""
        dtype = None if rows.topk_weights is None else rows.topk_weights.dtype
        weight_bytes = 0 if dtype is None else inner.num_topk * dtype.itemsize
        row_bytes = rows.x.shape[1] * rows.x.element_size()
        return Returning(Record(row_bytes, (weight_bytes,)), inner.num_topk, inner.expand, dtype)

    def leave(self, place: Place, exchange: Exchange, ends: Ends, added: Sum, state: int) -> None:
        """Sum what is forwarded, each chunk to be put as soon as it is there; then own tokens."""
        args, entry = added.args(state), self.num_topk * ITEM_BYTES
        row, (weight,) = self.record.row, self.record.beside
        planes = ROUTE_PLANES + (ends.idx is not None)
        for chunk in range(MAX_CHUNKS):
            forwarded = plans(exchange.outbox, ends.forwarded.address, planes, self.num_topk)
            for (rank, pile), (_, plan) in zip(exchange.outbox.items(), forwarded, strict=True):
                if chunk >= len(pile.chunks):
                    continue
                first = pile.chunks[chunk].start
                args.routes = plan + first * entry
                args.route_plane = pile.num_rows * self.num_topk
                args.num_tokens = len(pile.chunks[chunk])
                args.out = pile.starts[0] + first * row
                args.out_weights = pile.starts[1] + first * weight
                place.device.launch(added.launch(args, place.num_sms))
                exchange.put_rows(rank, chunk)
        exchange.put_beside()
        place.device.launch(added.plan(state, place.num_sms))

    def add(
        self,
        place: Place,
        exchange: Exchange,
        ends: Ends,
        own: Sum,
        biases: Sequence[Tensor],
        into: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Add the nodes' rows of each token, node after node, behind the biases; round once.

        It is the combine of rows that each node would have one of. All chunks are waited for: this
        sum reads memory of this GPU alone, which takes a few percent of the time they cross in.
        """
        device, num_tokens = place.device, own.out.shape[0]
        given: list[Memory | None] = [*(device.input(bias) for bias in biases), None, None]
        out = device.output(own.out.dtype, own.out.shape, into[0])
        sums = {rank: pile.starts[0] for rank, pile in exchange.inbox.items()}
        args = _cuda.CombineArgs(
            routes=ends.by_node.address,
            route_plane=num_tokens * place.nodes.num_hosts,
            num_tokens=num_tokens,
            num_topk=place.nodes.num_hosts,
            row_bytes=self.record.row,
            bias_0=address_of(given[0]),
            bias_1=address_of(given[1]),
            out=out.address,
            from_x=place.by_node(own.out.address, sums),
        )
        weights = None
        if self.weights_dtype is not None:
            weights = device.output(self.weights_dtype, (num_tokens, self.num_topk), into[1])
        with device.on_stream():
            exchange.wait_for_all()
            device.launch(_cuda.plan_combine(args, SUM_DTYPES[out.dtype], place.num_sms))
            if weights is not None:
                self._add_weights(place, exchange, ends, own, weights)
        return device.tensor(out), None if weights is None else device.tensor(weights)

    def _add_weights(
        self, place: Place, exchange: Exchange, ends: Ends, own: Sum, out: Memory
    ) -> None:
        came = {rank: pile.starts[1] for rank, pile in exchange.inbox.items()}
        args = _cuda.CrossWeightsArgs(
            by_node=ends.by_node.address,
            out=out.address,
            num_tokens=out.shape[0],
            num_topk=self.num_topk,
            num_nodes=place.nodes.num_hosts,
            weight_bytes=out.dtype.itemsize,
            expand=self.expand,
            from_weights=place.by_node(address_of(own.out_weights), came),
        )
        place.device.launch(_cuda.plan_cross_weights(args, place.num_sms))
