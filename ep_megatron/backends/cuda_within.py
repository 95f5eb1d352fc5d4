"""Calls between GPUs in which no host waits: rows are bounded, numbers stay on the device.

Every rank has one block for such calls, as large as the largest of them needs. Peers write received
rows there, at places that are the same on all ranks, and a kernel copies them on into the caller's
tensors; a combine stages its rows there. So a call needs nothing from the host, its launches may be
made again by a graph, and its tensors are torch's own. A call that needs a larger block meets on
the host first, on all ranks alike.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import NUM_CALL_FIELDS, OPERATIONS, Call, Routing, Rows
from ep_megatron.backends.casting import as_asked
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_arena import NO_BLOCK, NO_PLACE, Block, DeviceArena, align
from ep_megatron.backends.device_calls import Send, Sum
from ep_megatron.backends.device_links import address_of, stage
from ep_megatron.backends.device_meeting import DeviceMeeting
from ep_megatron.backends.device_rows import Part, Sizes
from ep_megatron.handle import DeviceHandle, DevicePlan, num_numbers, too_many_rows

_WORD_BYTES = 4
_ROWS_AT = _WORD_BYTES  # in the numbers of a handle, behind its status


class CallsWithin:
    """The calls of one rank, which come in turn with the others of its backend.

    Args:
        device: this rank's.
        meeting: the ranks.
        arena: where the block is.
        num_sms: most blocks of a kernel.
    """

    def __init__(
        self, device: Device, meeting: DeviceMeeting, arena: DeviceArena, num_sms: int
    ) -> None:
        self._device, self._meeting, self._arena = device, meeting, arena
        self._num_sms = num_sms
        self._block = NO_BLOCK
        self._is_in_a_graph = False  # the block, for good

    def dispatch(self, call: Call, rows: Rows, routing: Routing) -> tuple[Rows, DeviceHandle]:
        """See `SyncFreeBackend.dispatch_within`."""
        device, meeting, topk_idx = self._device, self._meeting, routing.topk_idx
        routes = device.output(torch.int32, (3, *topk_idx.shape))
        numbers = device.output(torch.int32, (num_numbers(routing.num_experts, meeting.num_ranks),))
        idx_dtype = None if routing.expand else topk_idx.dtype
        send = Send.of(device, call, rows, routing, routes, idx_dtype=idx_dtype)
        assert send.topk_idx is not None
        scan = meeting.scan(send.topk_idx.address, call, len(topk_idx), routes.address)
        capacity = routing.num_worst_tokens
        self.make_room("dispatch", call, send.layout.starts(capacity)[-1])
        with device.on_stream():
            meeting.post("dispatch", call, self._block, scan=scan, numbers=numbers.address)
            arrived = self._move(send, capacity, numbers.address, self._whole(send))
        received, links = self.received(send, arrived)
        plan = DevicePlan(
            plan_id=meeting.ticket,
            expert_alignment=routing.expert_alignment,
            numbers=device.tensor(numbers),
            routes=device.tensor(routes),
            links=links,
        )
        handle = DeviceHandle(
            topk_idx if routing.expand else device.copy(topk_idx),
            routing.num_experts,
            (meeting.rank, meeting.num_ranks),
            capacity,
            routing.expand,
            plan,
            self.raise_failure,
        )
        return received, handle

    def dispatch_again(self, call: Call, rows: Rows, handle: DeviceHandle) -> Rows:
        """See `SyncFreeBackend.dispatch_again_within`."""
        device, capacity = self._device, handle.num_worst_tokens
        routes, numbers = device.input(handle.routes), device.input(handle.numbers)
        send = Send.of(device, call, rows, handle, routes)
        self.make_room("cached dispatch", call, send.layout.starts(capacity)[-1])
        with device.on_stream():
            arrived = self.dispatch_parts(send, capacity, numbers.address, self._whole(send))
        return self.received(send, arrived)[0]

    def dispatch_parts(
        self,
        send: Send,
        capacity: int,
        numbers: int,
        move: Callable[[_cuda.DispatchArgs], None],
        gate: int = 0,
    ) -> list[Memory | None]:
        """Launch a dispatch along known routes, inside `on_stream`; return what `received` takes.

        Args:
            send: what arrives, and what this rank sends itself.
            capacity: rows that there is room for.
            numbers: address of those of the handle.
            move: launches what moves rows, given what one launch would send this rank's by.
            gate: see `DeviceMeeting.post`.
        """
        self._meeting.post(send.operation, send.call, self._block, gate=gate)
        return self._move(send, capacity, numbers, move)

    def combine(
        self,
        rows: Rows,
        handle: DeviceHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None],
        *,
        reduces: bool,
    ) -> None:
        """See `SyncFreeBackend.combine_within`."""
        device = self._device
        numbers = device.input(handle.numbers)
        added = Sum.of(device, rows, handle, biases, combined, reduces=reduces)
        self.make_room("combine", added.call, bytes_of(added))
        with device.on_stream():
            self.combine_parts(
                added,
                numbers.address,
                lambda state: device.launch(added.plan(state, self._num_sms)),
            )
        added.tensors(device)

    def combine_parts(
        self, added: Sum, numbers: int, move: Callable[[int], None], gate: int = 0
    ) -> None:
        """Launch a combine, inside `on_stream`; see `dispatch_parts`.

        `move` launches what reads and sums, given the address of what says where all rows are.
        """
        device, block = self._device, self._block
        start = self._arena.address(self._meeting.rank, block.place)
        there = numbers + _ROWS_AT
        stage(device, added.x, added.weights, start, added.links, self._num_sms, there)
        offer = Block(block.place, int(added.links is not None))
        weights_place = block.place + _weights_at(added) if added.weights else NO_PLACE
        self._meeting.post("combine", added.call, offer, weights_place=weights_place, gate=gate)
        move(self._meeting.state)
        self._meeting.arrive(waits=True)  # then the block is free for the next call

    def raise_failure(self) -> None:
        """Raise, once, what the first call that failed since the last look failed in. Local."""
        report = self._meeting.take_failure()
        if report is not None:
            raise failure_of(self._meeting, report)

    def make_room(self, operation: str, call: Call, num_bytes: int) -> None:
        """Let the block have `num_bytes`. Collective where it is smaller, which is so on all ranks.

        Raises:
            ValueError: on every rank, if ranks disagree in the call.
            RuntimeError: on every rank, if one has no room; or while a graph is captured.
        """
        if self._block.num_bytes < num_bytes:
            with self._device.on_stream():
                report = self._meeting.meet(operation, call, kind=_cuda.NEEDS_ROOM)
                self._meeting.agree(operation, report)
            larger = self._arena.allocate(num_bytes)
            try:
                _, grown = self._arena.grow(operation, num_bytes if larger is None else 0)
            except RuntimeError:
                self._arena.free(larger or NO_BLOCK)
                raise
            if not self._is_in_a_graph:
                self._arena.free(self._block)
            self._block, self._is_in_a_graph = larger or grown, False
        self._is_in_a_graph = self._is_in_a_graph or self._device.is_capturing()

    def _whole(self, send: Send) -> Callable[[_cuda.DispatchArgs], None]:
        """Return what moves all rows by one launch."""
        return lambda args: self._device.launch(send.launch(args, self._num_sms))

    def _move(
        self,
        send: Send,
        capacity: int,
        numbers: int,
        move: Callable[[_cuda.DispatchArgs], None],
    ) -> list[Memory | None]:
        """Send rows to the blocks and take what comes; return its parts in the layout's order."""
        device, meeting, layout, call = self._device, self._meeting, send.layout, send.call
        starts, num_ranks = layout.starts(capacity), meeting.num_ranks
        valid = numbers + _WORD_BYTES * (_cuda.EXPERT_NUMBERS + call.num_experts // num_ranks)
        ranks = meeting.rank, num_ranks
        state = meeting.state
        move(send.args([starts] * num_ranks, valid, ranks, state))
        meeting.arrive(waits=True)
        parts = layout.x, layout.scales, layout.weights, layout.idx, layout.links
        outs = [
            None if part is None else device.output(part.dtype, (capacity, *part.shape))
            for part in parts
        ]
        block = self._arena.address(meeting.rank, self._block.place)
        at = [0 if part is None else block + at for part, at in zip(parts, starts, strict=False)]
        x, scales, weights, idx, links = outs
        args = _cuda.TakeArgs(
            state=state,
            num_rows=numbers + _ROWS_AT,
            capacity=capacity,
            from_x=at[0],
            from_scales=at[1],
            from_weights=at[2],
            from_idx=at[3],
            links=at[4],
            x=address_of(x),
            scales=address_of(scales),
            weights=address_of(weights),
            idx=address_of(idx),
            to_links=address_of(links),
            row_bytes=layout.x.num_bytes,
            scale_bytes=_row_bytes(layout.scales),
            weight_bytes=_row_bytes(layout.weights),
            idx_bytes=_row_bytes(layout.idx),
        )
        device.launch(_cuda.plan_take(args, self._num_sms))
        return outs

    def received(self, send: Send, outs: list[Memory | None]) -> tuple[Rows, Tensor | None]:
        """Return what came as tensors, after `on_stream`, and the links between rows."""
        x, scales, weights, idx, links = (
            None if out is None else self._device.tensor(out) for out in outs
        )
        assert x is not None
        return as_asked(Rows(x, scales, weights, idx), send.rows), links


def failure_of(meeting: DeviceMeeting, report: _cuda.Report) -> Exception:
    """Return what all ranks raise of a call that failed while no host was waiting."""
    call = Call(*report.words[meeting.rank].call[:NUM_CALL_FIELDS])
    operation = OPERATIONS[call.operation]
    if report.status == _cuda.TOO_MANY_ROWS:
        return too_many_rows(call.num_worst_tokens, Sizes.of(report, call, meeting.rank).num_rows)
    try:
        meeting.agree(operation, report)
    except ValueError as error:
        return error
    return RuntimeError(
        f"{operation}: expected all ranks to make the same calls before, got one without room; "
        "make calls in the same order on all ranks"
    )


def bytes_of(added: Sum) -> int:
    """Return the bytes that the rows and weights of a combine take."""
    return _weights_at(added) + (0 if added.weights is None else added.weights.num_bytes)


def _weights_at(added: Sum) -> int:
    return align(added.x.num_bytes, 64)


def _row_bytes(part: Part | None) -> int:
    return 0 if part is None else part.num_bytes
