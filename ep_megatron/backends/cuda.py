"""Dispatch and combine between GPUs that reach each other's memory, by kernels of our own.

The protocol is in docs/design.md, the kernels in docs/kernels.md. The notify kernel tells the host
what all ranks want; the host then launches with exact addresses, and waits for nothing else. What a
call returns is written by the time that the caller's stream comes to it.
"""

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Announce, Call, Received, Routing, Rows
from ep_megatron.backends.casting import as_asked, copy_rows
from ep_megatron.backends.cuda_within import CallsWithin
from ep_megatron.backends.device import Device
from ep_megatron.backends.device_arena import NO_BLOCK, NO_PLACE, Block, DeviceArena, align
from ep_megatron.backends.device_calls import Send, Sum
from ep_megatron.backends.device_links import expand, stage
from ep_megatron.backends.device_meeting import DeviceMeeting
from ep_megatron.backends.device_rows import Sizes, handle_of, limit_error
from ep_megatron.backends.meeting import Meeting
from ep_megatron.config import MIB, BufferConfig
from ep_megatron.handle import AnyHandle, DeviceHandle, DispatchHandle

# Sums of such rows are of their dtype: nothing is lost when they are made in two steps.
_EXACT_DTYPES = (torch.float32, torch.float64)
_NO_LIMIT = 1 << 47  # bytes; what the GPU has is the limit


class CudaBackend:
    """See `Backend`. Collective constructor.

    Args:
        meeting: the ranks, for what is rare: setting up, and growing.
        device: this rank's; all ranks' devices reach each other's shared memory.
        config: limits; see `BufferConfig`.

    Raises:
        ValueError: more ranks than an NVLink domain has.
        RuntimeError: on every rank, if one cannot share its memory.
    """

    name = "cuda"

    def __init__(self, meeting: Meeting, device: Device, config: BufferConfig) -> None:
        if meeting.num_ranks > _cuda.MAX_RANKS:
            raise ValueError(
                f"Buffer: expected at most {_cuda.MAX_RANKS} ranks in an NVLink domain, got "
                f"{meeting.num_ranks}; make smaller groups"
            )
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self.device = self._device = device
        self._num_sms = min(config.num_sms, device.num_sms)
        self._reduces_all = config.reduce_before_combine
        max_bytes = config.max_bytes or _NO_LIMIT
        self._max_view_bytes = (
            max_bytes // 2 if config.max_view_bytes is None else config.max_view_bytes
        )
        self._arena = DeviceArena(device, meeting, max_bytes)
        slabs = self._arena.table.device_address
        self._meeting = DeviceMeeting(device, meeting, config.timeout, self._num_sms, slabs)
        self.within = CallsWithin(device, self._meeting, self._arena, self._num_sms)
        initial_bytes = min(max(config.initial_bytes, MIB), max_bytes)
        _, block = self._arena.grow("Buffer", initial_bytes)
        self._arena.free(block)
        # Read by a dispatch's kernel; written again when that has finished, two calls later.
        self._valid = [device.allocate_host(4 * _cuda.MAX_EXPERTS) for _ in range(2)]
        self._lent: list[Block] = []  # peers may read them until they have posted the next call

    # -- the three operations ---------------------------------------------------------------------

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        rows, routing = rows.contiguous(), routing.contiguous()
        call = self._begin("dispatch", rows, routing)
        num_tokens, num_topk = routing.topk_idx.shape
        routes = self._device.output(torch.int32, (3, num_tokens, num_topk))
        # A handle's indices say which weights go where; they do not travel again.
        idx_dtype = None if routing.expand else routing.topk_idx.dtype
        send = Send.of(self._device, call, rows, routing, routes, idx_dtype=idx_dtype)
        assert send.topk_idx is not None
        scan = self._meeting.scan(send.topk_idx.address, send.call, num_tokens, routes.address)
        report, sizes, block = self._send(send, scan, None, self._whole(send))
        plan_id = self._meeting.ticket
        received, links = self._receive(send, block, sizes.num_rows[self.rank])
        ranks, found = (self.rank, self.num_ranks), self._device.tensor(routes)
        handle = handle_of(report, sizes, routing, ranks, plan_id, found, links)
        if announce is not None:
            announce(received, handle)
        return received, handle

    def new_received(self, rows: Rows, handle: DispatchHandle) -> Received:
        """See `Backend.new_received`."""
        return Received(rows.new_received(handle))

    def dispatch_again(
        self, rows: Rows, handle: DispatchHandle, received: Received | None = None
    ) -> Rows:
        """See `Backend.dispatch_again`."""
        rows = rows.contiguous()
        call = self._begin("cached dispatch", rows, handle)
        routes = self._device.input(handle.routes)
        send = Send.of(self._device, call, rows, handle, routes)
        arrived = self.dispatch_parts(send, handle, self._whole(send))
        if received is None:
            return arrived
        copy_rows(received.rows, arrived)
        return received.rows

    def new_combined(self, rows: Rows, handle: AnyHandle) -> tuple[Tensor, Tensor | None]:
        """See `Backend.new_combined`."""
        return rows.new_combined(handle)

    def combine(
        self,
        rows: Rows,
        handle: DispatchHandle,
        biases: Sequence[Tensor] = (),
        combined: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        rows = rows.contiguous()
        self._begin("combine", rows, handle)
        added = self.combine_parts(rows, handle, self._all_sums, biases, combined or (None, None))
        return added.tensors(self._device)

    # -- by several launches ----------------------------------------------------------------------

    def dispatch_parts(
        self, send: Send, handle: DispatchHandle, move: Callable[[_cuda.DispatchArgs], None]
    ) -> Rows:
        """Dispatch along a handle of `num_rows_per_rank`. Collective.

        Args:
            send: what arrives, and what this rank sends itself.
            handle: of which all ranks know how many rows they receive.
            move: launches what moves rows, given what one launch would send this rank's by.
        """
        _, sizes, block = self._send(send, None, handle, move)
        return self._receive(send, block, sizes.num_rows[self.rank])[0]

    def combine_parts(
        self,
        rows: Rows,
        handle: DispatchHandle,
        move: Callable[[Sum, int], None],
        biases: Sequence[Tensor] = (),
        combined: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Sum:
        """Combine dense rows; return what was summed. Collective; see `combine`.

        `move` launches what reads and sums, given the sum of `handle`'s tokens, and the address of
        what says where all rows are.
        """
        device = self._device
        lies_at = self._arena.place_of(device.arena_address(rows.x), rows.x.nbytes)
        reduces = self._reduces_all or (rows.x.dtype in _EXACT_DTYPES and lies_at is None)
        added = Sum.of(device, rows, handle, biases, combined, reduces=reduces)
        if added.links is not None:
            lies_at = None
        with device.on_stream():
            self._offer_rows(added, lies_at)
            move(added, self._meeting.state)
            # What was staged is lent until the next call; the caller's own rows only until now.
            self._meeting.arrive(waits=lies_at is not None)
        return added

    # -- the same without a host that waits -------------------------------------------------------

    def dispatch_within(self, rows: Rows, routing: Routing) -> tuple[Rows, DeviceHandle]:
        """See `SyncFreeBackend.dispatch_within`."""
        rows, routing = rows.contiguous(), routing.contiguous()
        return self.within.dispatch(self._begin("dispatch", rows, routing), rows, routing)

    def dispatch_again_within(self, rows: Rows, handle: DeviceHandle) -> Rows:
        """See `SyncFreeBackend.dispatch_again_within`."""
        rows = rows.contiguous()
        call = self._begin("cached dispatch", rows, handle)
        return self.within.dispatch_again(call, rows, handle)

    def combine_within(
        self,
        rows: Rows,
        handle: DeviceHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None],
    ) -> None:
        """See `SyncFreeBackend.combine_within`."""
        rows = rows.contiguous()
        self._begin("combine", rows, handle)
        reduces = self.reduces_within(rows.x.dtype)
        self.within.combine(rows, handle, biases, combined, reduces=reduces)

    def reduces_within(self, dtype: torch.dtype) -> bool:
        """Return whether such a combine sums a token's rows of `dtype` where they are first."""
        return self._reduces_all or dtype in _EXACT_DTYPES

    # -- what else a backend does -----------------------------------------------------------------

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        with self._device.on_stream():
            self._meeting.fail(operation, error)
        self._take_back()

    def interrupt(self) -> None:
        """See `Backend.interrupt`. A kernel keeps its deadline; the next call gives up."""
        self._meeting.close("a call was interrupted")

    def check_arrivals(self, operation: str) -> None:
        """Raise if ranks did not arrive in an earlier call, which ended this rank's GPU. Local."""
        self._meeting.check_arrivals(operation)

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`. No thread of the host moves rows."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._meeting.close("it was destroyed")
        self._device.close()

    # -- dispatch ---------------------------------------------------------------------------------

    def _send(
        self,
        send: Send,
        scan: _cuda.ScanArgs | None,
        handle: DispatchHandle | None,
        move: Callable[[_cuda.DispatchArgs], None],
    ) -> tuple[_cuda.Report, Sizes, Block]:
        """Meet, find room, launch. Returns the block where this rank's rows arrive."""
        with self._device.on_stream():
            offered = self._arena.allocate_largest() or NO_BLOCK
            try:
                report = self._meeting.meet(send.operation, send.call, offered, scan=scan)
                self._take_back()
                self._meeting.agree(send.operation, report)
                if handle is None:
                    sizes = Sizes.of(report, send.call, self.rank)
                else:
                    sizes = Sizes(handle.num_rows_per_rank, handle.num_valid_tokens_per_expert)
                needed = [send.layout.starts(num_rows)[-1] for num_rows in sizes.num_rows]
                places, block = self._arena.settle(send.operation, report, needed, offered)
            except (ValueError, RuntimeError):
                self._arena.free(offered)
                raise
            args, starts = self._aim(send, sizes, places)
            move(args)
            self._meeting.arrive(waits=True)
            expand(self._device, send.layout, starts, sizes.num_rows[self.rank], self._num_sms)
        return report, sizes, block

    def _whole(self, send: Send) -> Callable[[_cuda.DispatchArgs], None]:
        """Return what moves all rows by one launch."""
        return lambda args: self._device.launch(send.launch(args, self._num_sms))

    def _all_sums(self, added: Sum, state: int) -> None:
        """Sum all tokens' rows by one launch."""
        self._device.launch(added.plan(state, self._num_sms))

    def _aim(
        self, send: Send, sizes: Sizes, places: Sequence[int]
    ) -> tuple[_cuda.DispatchArgs, list[int]]:
        """Return what moves all rows, and where the parts of this rank's received rows start."""
        call, targets = send.call, self._arena.addresses(places)
        starts = [
            [target + start for start in send.layout.starts(num_rows)]
            for target, num_rows in zip(targets, sizes.num_rows, strict=True)
        ]
        valid = self._valid[self._meeting.ticket % 2]
        if call.expand and call.expert_alignment > 1:
            valid.write(struct.pack(f"<{len(sizes.valid)}i", *sizes.valid))
        ranks = self.rank, self.num_ranks
        return send.args(starts, valid.device_address, ranks), starts[self.rank]

    def _receive(self, send: Send, block: Block, num_rows: int) -> tuple[Rows, Tensor | None]:
        """Look at what arrived, as tensors that keep the block; or widened, as copies.

        Returns:
            The rows, and the links between them where there are some.
        """
        must_copy = self._arena.num_bytes_in_use > self._max_view_bytes
        memory = self._device.views(
            self._arena.address(self.rank, block.place),
            send.layout.starts(num_rows)[-1],
            lambda: self._arena.free(block),
        )
        # Once widened, the FP8 rows are of no more use: what came with them must not hold them.
        is_widened = send.rows.widen_to is not None
        rows, links = send.layout.received(memory, num_rows, must_copy or is_widened)
        return as_asked(rows, send.rows), links

    # -- combine ----------------------------------------------------------------------------------

    def _offer_rows(self, added: Sum, lies_at: int | None) -> None:
        """Put rows where peers reach them, and meet; all grow together if one must.

        `lies_at`: where peers reach the rows already.
        """
        call, x, weights, links = added.call, added.x, added.weights, added.links
        copied = 0 if lies_at is not None else align(x.num_bytes, 64)
        num_bytes = copied + (0 if weights is None else weights.num_bytes)
        while True:
            block = self._arena.allocate(num_bytes) if num_bytes else NO_BLOCK
            if block is None:
                kind, offer, weights_place = _cuda.NEEDS_ROOM, NO_BLOCK, NO_PLACE
            else:
                kind, weights_place = _cuda.TAKES_PART, NO_PLACE
                offer = Block(block.place if copied else NO_PLACE, int(links is not None))
                if lies_at is not None:
                    offer = Block(lies_at, 0)
                if weights is not None and weights.num_bytes:
                    weights_place = block.place + copied
                if block.num_bytes:
                    start = self._arena.address(self.rank, block.place)
                    rows = x if copied else None
                    stage(self._device, rows, weights, start, links, self._num_sms)
            try:
                report = self._meeting.meet(
                    "combine", call, offer, weights_place=weights_place, kind=kind
                )
                self._take_back()
                all_take_part = self._meeting.agree("combine", report)
                if not all_take_part:
                    _, grown = self._arena.grow("combine", num_bytes if block is None else 0)
                    self._arena.free(grown)
            except (ValueError, RuntimeError):
                self._arena.free(block or NO_BLOCK)
                raise
            if all_take_part:
                self._lent.append(block or NO_BLOCK)
                return
            self._arena.free(block or NO_BLOCK)

    # -- both -------------------------------------------------------------------------------------

    def _begin(
        self, operation: str, rows: Rows, by: Routing | DispatchHandle | DeviceHandle
    ) -> Call:
        """Describe a call, or raise why it cannot be; the other ranks, who are in it, hear of it.

        Raises:
            ValueError: on every rank, if this one's call exceeds what the kernels are made for, or
                if an earlier call that no host waited for has failed.
            RuntimeError: if a rank did not come in time.
        """
        call = Call.of(operation, rows, by)
        try:
            self.within.raise_failure()
            if error := limit_error(call):
                raise ValueError(f"{operation}: {error}")
        except ValueError as error:
            if not self._device.is_capturing():
                self.fail(operation, str(error).removeprefix(f"{operation}: "))
            raise
        return call

    def _take_back(self) -> None:
        """Free what was lent for the last call, which every rank has finished by now."""
        for block in self._lent:
            self._arena.free(block)
        self._lent = []
