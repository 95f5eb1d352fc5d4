"""Calls between nodes of GPUs in which no host waits: what crosses is bounded, and where it is on
its way is known to the device alone.

All ranks meet on the device and find where every pile of tokens crosses, or that too many do. The
rest is that of `cuda_nodes` and `cuda_within`: tokens go to their gateways with their addresses,
and on into blocks of fixed size in the node; sums return to the places that their tokens left from,
so one array has those of all other nodes. T tokens, K top-k, N nodes, P places between nodes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import NUM_CALL_FIELDS, Call, Routing, Rows
from ep_megatron.backends.crossing_within import ROUTES, ROWS, SCALES, WEIGHTS, Areas
from ep_megatron.backends.crossing_within import CrossingWithin as Crossing
from ep_megatron.backends.cuda_within import CallsWithin, bytes_of, failure_of
from ep_megatron.backends.device import Memory
from ep_megatron.backends.device_arena import NO_BLOCK
from ep_megatron.backends.device_calls import Send, Sum
from ep_megatron.backends.device_links import SUM_DTYPES, address_of
from ep_megatron.backends.device_meeting import DeviceMeeting
from ep_megatron.backends.device_rows import Sizes
from ep_megatron.backends.meeting import check_working
from ep_megatron.backends.node_ends import ITEM_BYTES, ROUTE_PLANES, Place
from ep_megatron.backends.node_ways import Way
from ep_megatron.handle import DeviceHandle, DevicePlan, num_numbers


class NodesWithin:
    """The calls of one rank, which come in turn with the others of its backend.

    Args:
        place: where to launch.
        everyone: all ranks.
        inside: the calls in this node.
        crossing: between nodes.
    """

    def __init__(
        self, place: Place, everyone: DeviceMeeting, inside: CallsWithin, crossing: Crossing
    ) -> None:
        self._place, self._device, self._everyone = place, place.device, everyone
        self._inside, self._crossing = inside, crossing
        self._inside_bytes = 0
        self._broken = ""

    def dispatch(self, call: Call, rows: Rows, routing: Routing) -> tuple[Rows, DeviceHandle]:
        """See `SyncFreeBackend.dispatch_within`."""
        device, everyone, topk_idx = self._device, self._everyone, routing.topk_idx
        capacity, nodes = routing.num_worst_tokens, self._place.nodes
        way, scan = Way.new(self._place, everyone, call, routing)
        fresh = way.fresh
        assert fresh is not None
        size = num_numbers(routing.num_experts, everyone.num_ranks)
        numbers = device.output(torch.int32, (size,))
        send = self._send(call, rows, routing, way)
        areas = self._areas(send, way)
        self._make_room("dispatch", call, send.layout.starts(capacity)[-1], areas)
        with device.on_stream():
            everyone.post(
                "dispatch",
                call,
                NO_BLOCK,
                scan=scan,
                numbers=numbers.address,
                piles=(way.piles.address, nodes),
            )
            arrived = self._move(send, way, areas, (capacity, numbers.address))
        received, links = self._inside.received(send, arrived)
        plan = DevicePlan(
            plan_id=everyone.ticket,
            expert_alignment=routing.expert_alignment,
            numbers=device.tensor(numbers),
            routes=device.tensor(fresh.routes),
            links=links,
            hop=way.hop(device),
        )
        handle = DeviceHandle(
            topk_idx if routing.expand else device.copy(topk_idx),
            routing.num_experts,
            (everyone.rank, everyone.num_ranks),
            capacity,
            routing.expand,
            plan,
            self.raise_failure,
        )
        return received, handle

    def dispatch_again(self, call: Call, rows: Rows, handle: DeviceHandle) -> Rows:
        """See `SyncFreeBackend.dispatch_again_within`."""
        device, capacity, way = self._device, handle.num_worst_tokens, Way.of(self._device, handle)
        numbers = device.input(handle.numbers)
        send = self._send(call, rows, handle, way)
        areas = self._areas(send, way)
        self._make_room("cached dispatch", call, send.layout.starts(capacity)[-1], areas)
        with device.on_stream():
            self._everyone.post("cached dispatch", call, NO_BLOCK)
            arrived = self._move(send, way, areas, (capacity, numbers.address))
        return self._inside.received(send, arrived)[0]

    def combine(
        self,
        rows: Rows,
        handle: DeviceHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None],
        *,
        reduces: bool,
    ) -> None:
        """See `SyncFreeBackend.combine_within`; the sums are those of `Backend.combine`."""
        device, crossing, way = self._device, self._crossing, Way.of(self._device, handle)
        numbers = device.input(handle.numbers)
        own = Sum.of(device, rows, handle, (), (None, None), reduces=reduces)
        own = replace(own, routes=way.ends.routes)
        given: list[Memory | None] = [*(device.input(bias) for bias in biases), None, None]
        out = device.output(own.out.dtype, own.out.shape, combined[0])
        weights = None
        if own.out_weights is not None:
            weights = device.output(own.out_weights.dtype, own.out_weights.shape, combined[1])
        item = 0 if weights is None else weights.dtype.itemsize
        areas = Areas(
            way.num_places,
            (out.shape[1] * out.dtype.itemsize, 0, own.call.num_topk * item),
        )
        self._make_room("combine", own.call, bytes_of(own), areas)
        with device.on_stream():
            self._everyone.post("combine", own.call, NO_BLOCK)
            self._inside.combine_parts(
                own,
                numbers.address,
                lambda state: self._sum(own, way, areas, state),
                gate=self._everyone.state,
            )
            crossing.wait(areas.present, way.sent)
            self._add(own, way, areas, given, (out, weights))
        device.tensor(out)
        if weights is not None:
            device.tensor(weights)

    def raise_failure(self) -> None:
        """Raise, once, what the first call that failed since the last look failed in. Local."""
        nodes, rank = self._place.nodes, self._everyone.rank
        report = self._everyone.take_failure(nodes.num_hosts)
        if report is None:
            return
        call = Call(*report.words[rank].call[:NUM_CALL_FIELDS])
        capacity = call.num_worst_tokens
        if report.status != _cuda.TOO_MANY_ROWS or (
            max(Sizes.of(report, call, rank).num_rows) > capacity
        ):
            raise failure_of(self._everyone, report)
        sent, came = [0] * len(report.words), [0] * len(report.words)
        for source, counts in enumerate(report.per_node):
            for node, count in enumerate(counts):
                if node != nodes.host_of[source]:
                    sent[source] += count
                    came[nodes.gateway(source, node)] += count
        what, most = max(("sent by", sent), ("passed on by", came), key=lambda each: max(each[1]))
        raise ValueError(
            f"dispatch: expected at most num_worst_tokens = {capacity} tokens between nodes to be "
            f"{what} a rank, got {max(most)} on rank {most.index(max(most))}; raise it"
        )

    def check(self, operation: str) -> None:
        """Raise if memory could not grow on all nodes alike."""
        check_working(operation, self._broken)

    # -- what is known beforehand -----------------------------------------------------------------

    def _send(self, call: Call, rows: Rows, by: Routing | DeviceHandle, way: Way) -> Send:
        """Describe a dispatch inside this node, between its ranks numbered from 0."""
        nodes = self._place.nodes
        num_local = call.num_experts // self._everyone.num_ranks
        call = call._replace(num_experts=num_local * len(nodes.members[self._place.node]))
        idx_dtype = None if way.fresh is None else way.fresh.idx_dtype
        send = Send.of(self._device, call, rows, by, way.ends.routes, idx_dtype=idx_dtype)
        return replace(send, topk_idx=way.ends.idx)

    def _areas(self, send: Send, way: Way) -> Areas:
        layout, weights, num_topk = send.layout, send.weights, send.call.num_topk
        planes = 0 if way.fresh is None else way.ends.forwarded.shape[0]
        return Areas(
            way.num_places,
            (
                layout.x.num_bytes,
                0 if layout.scales is None else layout.scales.num_bytes,
                0 if weights is None else num_topk * weights.dtype.itemsize,
                *[num_topk * ITEM_BYTES] * planes,
            ),
        )

    def _make_room(self, operation: str, call: Call, num_bytes: int, areas: Areas) -> None:
        """Let block and crossing have room. Collective where they have none: so on all ranks.

        Raises:
            ValueError: on every rank, if ranks disagree in the call.
            RuntimeError: if there is no room; or while a graph is captured.
        """
        if num_bytes > self._inside_bytes or not self._crossing.has_room(areas):
            with self._device.on_stream():
                report = self._everyone.meet(operation, call, kind=_cuda.NEEDS_ROOM)
                self._everyone.agree(operation, report)
            try:
                self._inside.make_room(operation, call, num_bytes)
                self._crossing.make_room(operation, areas)
            except (ValueError, RuntimeError) as error:
                self._broken = f"memory did not grow on all nodes: {error}"
                raise
            self._inside_bytes = max(num_bytes, self._inside_bytes)
        self._inside.make_room(operation, call, num_bytes)

    # -- what is launched -------------------------------------------------------------------------

    def _move(
        self, send: Send, way: Way, areas: Areas, size: tuple[int, int]
    ) -> list[Memory | None]:
        """Send rows to their gateways, forward those of others; return what arrives.

        `size`: the capacity, and the address of the handle's numbers.
        """
        self._leave(send, way, areas)
        self._crossing.put(areas, way.sent)
        return self._inside.dispatch_parts(
            send,
            *size,
            lambda args: self._forward(send, way, areas, args),
            gate=self._everyone.state,
        )

    def _leave(self, send: Send, way: Way, areas: Areas) -> None:
        """Lay out rows, cast if they are, and what goes beside them, in the outbox."""
        place, call, fresh, ends = self._place, send.call, way.fresh, way.ends
        num_tokens, num_nodes = len(send.rows.x), place.nodes.num_hosts
        outbox = self._crossing.outbox(areas)
        rows = _cuda.DispatchArgs(
            x=send.x.address,
            scales=address_of(send.scales),
            routes=ends.by_node.address,
            route_plane=num_tokens * num_nodes,
            num_tokens=num_tokens,
            alignment=1,
            num_topk=num_nodes,
            row_bytes=call.hidden * send.x.dtype.itemsize,
            out_row_bytes=areas.place_bytes[ROWS],
            scale_bytes=areas.place_bytes[SCALES],
            experts_per_rank=1,
            to_x=place.own_and_far(0, outbox[ROWS]),
            to_scales=place.own_and_far(0, outbox[SCALES]),
        )
        self._device.launch(send.launch(rows, place.num_sms))
        if fresh is None and send.weights is None:
            return
        topk_idx = None if fresh is None else fresh.topk_idx
        beside = _cuda.CrossLayArgs(
            by_node=ends.by_node.address,
            routes=0 if fresh is None else fresh.routes.address,
            topk_idx=address_of(topk_idx),
            weights=address_of(send.weights),
            num_tokens=num_tokens,
            num_topk=call.num_topk,
            num_nodes=num_nodes,
            node=place.node,
            is_int64=topk_idx is not None and topk_idx.dtype == torch.int64,
            weight_bytes=0 if send.weights is None else send.weights.dtype.itemsize,
            experts_per_rank=call.num_experts // len(place.nodes.members[place.node]),
            to_routes=place.own_and_far(ends.routes.address, outbox[ROUTES]),
            to_idx=place.own_and_far(address_of(ends.idx), outbox[ROUTES + ROUTE_PLANES]),
            to_weights=place.own_and_far(0, outbox[WEIGHTS]),
            num_to=place.own_and_far(num_tokens, way.num_places),
            node_of=list(place.nodes.host_of),
            index_of=list(place.nodes.index_of),
        )
        self._device.launch(_cuda.plan_cross_lay(beside, place.num_sms))

    def _forward(self, send: Send, way: Way, areas: Areas, args: _cuda.DispatchArgs) -> None:
        """Put own tokens at their places, then the pile of every rank as it has come."""
        device, crossing, num_sms = self._device, self._crossing, self._place.num_sms
        device.launch(send.launch(args, num_sms))
        inbox, forwarded = crossing.inbox(areas), way.ends.forwarded
        if beside := [part for part in areas.present if part != ROWS]:
            crossing.wait(beside, way.came)
        if way.fresh is not None:
            copy = _cuda.StageArgs(
                rows=inbox[ROUTES], to_rows=forwarded.address, num_row_bytes=forwarded.num_bytes
            )
            device.launch(_cuda.plan_stage(copy, num_sms))
        args.row_bytes, args.alignment = areas.place_bytes[ROWS], 1  # cast; padding is cleared
        args.x, args.scales, args.weights = inbox[ROWS], inbox[SCALES], inbox[WEIGHTS]
        args.routes, args.topk_idx = forwarded.address, way.idx
        args.num_tokens, args.route_plane = way.num_places, way.num_places * send.call.num_topk
        for source in self._place.nodes.served_by(self._everyone.rank):
            crossing.wait([ROWS], way.came, source)
            args.pile = way.came + source * _cuda.CROSS_PILE_BYTES
            device.launch(_cuda.plan_dispatch(args, num_sms))

    def _sum(self, own: Sum, way: Way, areas: Areas, state: int) -> None:
        """Sum what this rank forwards, which then returns, and its own tokens."""
        device, num_sms = self._device, self._place.num_sms
        args, outbox = own.args(state), self._crossing.outbox(areas)
        args.routes, args.route_plane = (
            way.ends.forwarded.address,
            way.num_places * own.call.num_topk,
        )
        args.num_tokens, args.out, args.out_weights = way.num_places, outbox[ROWS], outbox[WEIGHTS]
        for source in self._place.nodes.served_by(self._everyone.rank):
            args.pile = way.came + source * _cuda.CROSS_PILE_BYTES
            device.launch(own.launch(args, num_sms))
        self._crossing.put(areas, way.came)
        device.launch(own.plan(state, num_sms))

    def _add(
        self,
        own: Sum,
        way: Way,
        areas: Areas,
        biases: Sequence[Memory | None],
        into: tuple[Memory, Memory | None],
    ) -> None:
        """Add the nodes' rows of each token, and what they have of its weights."""
        place, (out, weights), by_node = self._place, into, way.ends.by_node.address
        num_nodes, num_tokens = place.nodes.num_hosts, out.shape[0]
        inbox = self._crossing.inbox(areas)
        args = _cuda.CombineArgs(
            routes=by_node,
            route_plane=num_tokens * num_nodes,
            num_tokens=num_tokens,
            num_topk=num_nodes,
            row_bytes=areas.place_bytes[ROWS],
            bias_0=address_of(biases[0]),
            bias_1=address_of(biases[1]),
            out=out.address,
            from_x=place.own_and_far(own.out.address, inbox[ROWS]),
        )
        self._device.launch(_cuda.plan_combine(args, SUM_DTYPES[out.dtype], place.num_sms))
        if weights is None:
            return
        of_weights = _cuda.CrossWeightsArgs(
            by_node=by_node,
            out=weights.address,
            num_tokens=num_tokens,
            num_topk=own.call.num_topk,
            num_nodes=num_nodes,
            weight_bytes=weights.dtype.itemsize,
            expand=own.call.expand,
            from_weights=place.own_and_far(address_of(own.out_weights), inbox[WEIGHTS]),
        )
        self._device.launch(_cuda.plan_cross_weights(of_weights, place.num_sms))
