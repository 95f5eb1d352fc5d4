"""Dispatch and combine between GPUs that reach each other's memory, by kernels of our own.

The protocol is in docs/design.md, the kernels in docs/kernels.md. The notify kernel tells the host
what all ranks want; the host then launches with exact addresses, and waits for nothing else. What a
call returns is written by the time that the caller's stream comes to it.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Call, Routing, Rows
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_arena import NO_BLOCK, NO_PLACE, Block, DeviceArena, align
from ep_megatron.backends.device_meeting import DeviceMeeting
from ep_megatron.backends.meeting import Meeting
from ep_megatron.config import MIB, BufferConfig
from ep_megatron.handle import DispatchHandle

_SUM_DTYPES = {
    torch.bfloat16: _cuda.DType.bfloat16,
    torch.float16: _cuda.DType.float16,
    torch.float32: _cuda.DType.float32,
    torch.float64: _cuda.DType.float64,
}
_MAX_ROWS = (1 << 31) - 1
_NO_LIMIT = 1 << 47  # bytes; what the GPU has is the limit


@dataclass(frozen=True)
class RowLayout:
    """How received rows and what belongs to them lie in a block, part after part.

    Attributes:
        x: bytes of a row; `scales` likewise, 0 where there are none.
        weights: bytes of one weight, `idx` of one expert index; 0 where there are none.
        num_columns: weights, and indices, of a row.
    """

    x: int
    scales: int
    weights: int
    idx: int
    num_columns: int

    def starts(self, num_rows: int) -> tuple[int, int, int, int]:
        """Return where scales, weights and indices of `num_rows` rows start, and the end."""
        scales = align(num_rows * self.x, 64)
        weights = scales + align(num_rows * self.scales, 64)
        idx = weights + align(num_rows * self.weights * self.num_columns, 64)
        return scales, weights, idx, idx + num_rows * self.idx * self.num_columns


@dataclass(frozen=True)
class _Send:
    """What a dispatch reads, and the layout of what arrives. None where a part is absent."""

    operation: str
    call: Call
    num_tokens: int
    x: Memory
    scales: Memory | None
    weights: Memory | None
    topk_idx: Memory | None
    routes: Memory  # written before the rows move, in a fresh dispatch
    layout: RowLayout


@dataclass(frozen=True)
class _Sizes:
    """Rows that each rank receives, and those of each of this rank's experts without padding."""

    num_rows: Sequence[int]
    valid: Sequence[int]


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
                f"{meeting.num_ranks}"
            )
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self._device = device
        self._num_sms = min(config.num_sms, device.num_sms)
        self._meeting = DeviceMeeting(device, meeting, config.timeout, self._num_sms)
        max_bytes = config.max_bytes or _NO_LIMIT
        self._max_view_bytes = (
            max_bytes // 2 if config.max_view_bytes is None else config.max_view_bytes
        )
        self._arena = DeviceArena(device, meeting, max_bytes)
        initial_bytes = min(max(config.initial_bytes, MIB), max_bytes)
        _, block = self._arena.grow("Buffer", initial_bytes)
        self._arena.free(block)
        # Read by a dispatch's kernel; written again when that has finished, two calls later.
        self._valid = [device.allocate_host(4 * _cuda.MAX_EXPERTS) for _ in range(2)]
        self._lent: list[Block] = []  # peers may read them until they have posted the next call

    # -- the three operations ---------------------------------------------------------------------

    def dispatch(self, rows: Rows, routing: Routing) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        num_tokens, num_topk = routing.topk_idx.shape
        routes = self._device.output(torch.int32, (3, num_tokens, num_topk))
        send = self._describe("dispatch", rows, routing, routes)
        assert send.topk_idx is not None
        scan = self._meeting.scan(send.topk_idx.address, send.call, num_tokens, routes.address)
        report, sizes, block = self._send(send, scan, None)
        plan_id = self._meeting.epoch
        received = self._receive(send, block, sizes.num_rows[self.rank])
        alignment = routing.expert_alignment
        handle = DispatchHandle(
            plan_id=plan_id,
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=routing.num_experts,
            expand=routing.expand,
            expert_alignment=alignment,
            routes=self._device.tensor(routes),
            num_rows_per_rank=tuple(sizes.num_rows),
            num_tokens_per_rank=tuple(report.per_rank[self.rank]),
            num_recv_tokens_per_rank=tuple(row[self.rank] for row in report.per_rank),
            num_recv_tokens_per_expert=tuple(align(n, alignment) for n in sizes.valid),
            num_valid_tokens_per_expert=tuple(sizes.valid),
            topk_idx=None if routing.expand else routing.topk_idx.clone(),
        )
        return received, handle

    def dispatch_again(self, rows: Rows, handle: DispatchHandle) -> Rows:
        """See `Backend.dispatch_again`."""
        routes = self._device.input(handle.routes)
        send = self._describe("cached dispatch", rows, handle, routes)
        _, sizes, block = self._send(send, None, handle)
        return self._receive(send, block, sizes.num_rows[self.rank])

    def combine(
        self, rows: Rows, handle: DispatchHandle, biases: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        call = Call.of("combine", rows, handle)
        self._check_limits("combine", call)
        device, shape = self._device, (handle.num_tokens, handle.num_topk)
        x, routes = device.input(rows.x), device.input(handle.routes)
        weights = self._input(rows.topk_weights)
        bias_inputs = [self._input(bias) for bias in (*biases, None, None)]
        out = device.output(rows.x.dtype, (handle.num_tokens, rows.x.shape[1]))
        out_weights = None
        if rows.topk_weights is not None:
            out_weights = device.output(rows.topk_weights.dtype, shape)
        lies_at = self._arena.place_of(device.arena_address(rows.x), rows.x.nbytes)
        with device.on_stream():
            places = self._offer_rows(call, x, weights, lies_at)
            args = _cuda.CombineArgs(
                routes=routes.address,
                num_tokens=handle.num_tokens,
                num_topk=handle.num_topk,
                row_bytes=rows.x.shape[1] * rows.x.element_size(),
                weight_bytes=_item_bytes(rows.topk_weights),
                expand=handle.expand,
                bias_0=_address(bias_inputs[0]),
                bias_1=_address(bias_inputs[1]),
                out=out.address,
                out_weights=_address(out_weights),
                from_x=self._seen_from_here([rows_place for rows_place, _ in places]),
                from_weights=self._seen_from_here([weights_place for _, weights_place in places]),
            )
            device.launch(_cuda.plan_combine(args, _SUM_DTYPES[rows.x.dtype], self._num_sms))
            # What was staged is lent until the next call; the caller's own rows only until now.
            self._meeting.arrive(waits=lies_at is not None)
        return device.tensor(out), None if out_weights is None else device.tensor(out_weights)

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        with self._device.on_stream():
            self._meeting.fail(operation, error)
        self._take_back()

    def close(self) -> None:
        """See `Backend.close`."""
        self._meeting.close()
        self._device.close()

    @property
    def num_bytes_committed(self) -> int:
        """Bytes of GPU memory that this rank has for rows."""
        return self._arena.num_bytes_committed

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of it that tensors view, or that peers may still read."""
        return self._arena.num_bytes_in_use

    # -- dispatch ---------------------------------------------------------------------------------

    def _describe(
        self, operation: str, rows: Rows, by: Routing | DispatchHandle, routes: Memory
    ) -> _Send:
        call = Call.of(operation, rows, by)
        self._check_limits(operation, call)
        is_fresh, topk_idx = isinstance(by, Routing), by.topk_idx
        # A handle's indices say which weights go where; a rank's own rows need no second look.
        return _Send(
            operation=operation,
            call=call,
            num_tokens=rows.x.shape[0],
            x=self._device.input(rows.x),
            scales=self._input(rows.scales),
            weights=self._input(rows.topk_weights),
            topk_idx=self._input(topk_idx),
            routes=routes,
            layout=RowLayout(
                x=rows.x.shape[1] * rows.x.element_size(),
                scales=0
                if rows.scales is None
                else rows.scales.shape[1] * _item_bytes(rows.scales),
                weights=_item_bytes(rows.topk_weights),
                idx=_item_bytes(topk_idx) if is_fresh and not by.expand else 0,
                num_columns=1 if by.expand else call.num_topk,
            ),
        )

    def _send(
        self, send: _Send, scan: _cuda.ScanArgs | None, handle: DispatchHandle | None
    ) -> tuple[_cuda.Report, _Sizes, Block]:
        """Meet, find room, launch. Returns the block where this rank's rows arrive."""
        with self._device.on_stream():
            offered = self._arena.allocate_largest() or NO_BLOCK
            try:
                report = self._meeting.meet(send.operation, send.call, offered, scan=scan)
                self._take_back()
                self._meeting.agree(send.operation, report)
                if handle is None:
                    sizes = self._sizes(report, send.call)
                else:
                    sizes = _Sizes(handle.num_rows_per_rank, handle.num_valid_tokens_per_expert)
                places, block = self._find_room(send, report, sizes, offered)
            except (ValueError, RuntimeError):
                self._arena.free(offered)
                raise
            self._push(send, sizes, places)
            self._meeting.arrive(waits=True)
        return report, sizes, block

    def _sizes(self, report: _cuda.Report, call: Call) -> _Sizes:
        """Work out from all ranks' counts how many rows each receives."""
        experts_per_rank = call.num_experts // self.num_ranks
        if call.expand:
            blocks = [align(n, call.expert_alignment) for n in report.per_expert]
            starts = range(0, call.num_experts, experts_per_rank)
            num_rows = [sum(blocks[start : start + experts_per_rank]) for start in starts]
        else:
            num_rows = [sum(column) for column in zip(*report.per_rank, strict=True)]
        if max(num_rows) > _MAX_ROWS:
            raise RuntimeError(
                f"dispatch: expected at most {_MAX_ROWS} rows on a rank, got {max(num_rows)}"
            )
        first = self.rank * experts_per_rank
        return _Sizes(num_rows, report.per_expert[first : first + experts_per_rank])

    def _find_room(
        self, send: _Send, report: _cuda.Report, sizes: _Sizes, offered: Block
    ) -> tuple[list[int], Block]:
        """Return where every rank's rows go, and this rank's block; all grow together if one must.

        Every rank knows from the posts who has offered too little.
        """
        needed = [send.layout.starts(num_rows)[3] for num_rows in sizes.num_rows]
        places = [word.rows_place for word in report.words]
        is_short = [need > word.rows_bytes for need, word in zip(needed, report.words, strict=True)]
        grown = NO_BLOCK
        if any(is_short):
            own = needed[self.rank] if is_short[self.rank] else 0
            new_places, grown = self._arena.grow(send.operation, own)
            places = [
                new if short else old
                for new, short, old in zip(new_places, is_short, places, strict=True)
            ]
        if not is_short[self.rank]:
            return places, self._arena.trim(offered, needed[self.rank])
        self._arena.free(offered)
        return places, grown

    def _push(self, send: _Send, sizes: _Sizes, places: Sequence[int]) -> None:
        call, layout = send.call, send.layout
        starts = [layout.starts(num_rows) for num_rows in sizes.num_rows]
        targets = self._seen_from_here(places)
        valid = self._valid[self._meeting.epoch % 2]
        if call.expand and call.expert_alignment > 1:
            valid.write(struct.pack(f"<{len(sizes.valid)}i", *sizes.valid))
        args = _cuda.DispatchArgs(
            x=send.x.address,
            scales=_address(send.scales),
            weights=_address(send.weights),
            topk_idx=_address(send.topk_idx),
            routes=send.routes.address,
            valid=valid.device_address,
            num_tokens=send.num_tokens,
            alignment=call.expert_alignment,
            num_topk=call.num_topk,
            row_bytes=layout.x,
            out_row_bytes=layout.x,
            scale_bytes=layout.scales,
            weight_bytes=layout.weights,
            idx_bytes=layout.idx,
            is_int64=send.topk_idx is not None and send.topk_idx.dtype == torch.int64,
            expand=call.expand,
            experts_per_rank=call.num_experts // self.num_ranks,
            rank=self.rank,
            to_x=targets,
            to_scales=[at + start[0] for at, start in zip(targets, starts, strict=True)],
            to_weights=[at + start[1] for at, start in zip(targets, starts, strict=True)],
            to_idx=[at + start[2] for at, start in zip(targets, starts, strict=True)],
        )
        self._device.launch(_cuda.plan_dispatch(args, self._num_sms))

    def _receive(self, send: _Send, block: Block, num_rows: int) -> Rows:
        """Look at what arrived, as tensors that keep the block."""
        scales_at, weights_at, idx_at, end = send.layout.starts(num_rows)
        must_copy = self._arena.num_bytes_in_use > self._max_view_bytes
        address = self._arena.address(self.rank, block.place)
        memory = self._device.views(address, end, lambda: self._arena.free(block))
        columns = () if send.call.expand else (send.call.num_topk,)

        def part(at: int, like: Memory, *shape: int) -> Tensor:
            num_bytes = math.prod(shape) * like.dtype.itemsize
            view = memory[at : at + num_bytes].view(like.dtype).view(shape)
            return view.clone() if must_copy else view

        return Rows(
            part(0, send.x, num_rows, send.x.shape[1]),
            send.scales and part(scales_at, send.scales, num_rows, send.scales.shape[1]),
            send.weights and part(weights_at, send.weights, num_rows, *columns),
            send.topk_idx and part(idx_at, send.topk_idx, num_rows, *columns)
            if send.layout.idx
            else None,
        )

    # -- combine ----------------------------------------------------------------------------------

    def _offer_rows(
        self, call: Call, x: Memory, weights: Memory | None, lies_at: int | None
    ) -> list[tuple[int, int]]:
        """Put rows where peers reach them, and meet; all grow together if one must.

        Returns:
            Where every rank's rows and weights are.
        """
        copied = 0 if lies_at is not None else align(x.num_bytes, 64)
        num_bytes = copied + (0 if weights is None else weights.num_bytes)
        while True:
            block = self._arena.allocate(num_bytes) if num_bytes else NO_BLOCK
            if block is None:
                kind, offer, weights_place = _cuda.NEEDS_ROOM, NO_BLOCK, NO_PLACE
            else:
                kind, weights_place = _cuda.TAKES_PART, NO_PLACE
                offer = Block(block.place if copied else NO_PLACE, 0)
                if lies_at is not None:
                    offer = Block(lies_at, 0)
                if weights is not None and weights.num_bytes:
                    weights_place = block.place + copied
                self._stage(x if copied else None, weights, block, copied)
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
                return [(word.rows_place, word.weights_place) for word in report.words]
            self._arena.free(block or NO_BLOCK)

    def _stage(
        self, x: Memory | None, weights: Memory | None, block: Block, weights_at: int
    ) -> None:
        if block.num_bytes == 0:
            return
        start = self._arena.address(self.rank, block.place)
        args = _cuda.StageArgs(
            rows=_address(x),
            to_rows=start,
            num_row_bytes=0 if x is None else x.num_bytes,
            weights=_address(weights),
            to_weights=start + weights_at,
            num_weight_bytes=0 if weights is None else weights.num_bytes,
        )
        self._device.launch(_cuda.plan_stage(args, self._num_sms))

    # -- both -------------------------------------------------------------------------------------

    def _check_limits(self, operation: str, call: Call) -> None:
        """Raise on every rank, if this one's call exceeds what the kernels are made for."""
        limits = {
            "hidden": (call.hidden, _cuda.MAX_HIDDEN),
            "the columns of topk_idx": (call.num_topk, _cuda.MAX_TOPK),
            "num_experts": (call.num_experts, _cuda.MAX_EXPERTS),
        }
        for what, (actual, most) in limits.items():
            if actual > most:
                error = f"expected {what} to be at most {most} for backend 'cuda', got {actual}"
                self.fail(operation, error)
                raise ValueError(f"{operation}: {error}")

    def _take_back(self) -> None:
        """Free what was lent for the last call, which every rank has finished by now."""
        for block in self._lent:
            self._arena.free(block)
        self._lent = []

    def _input(self, tensor: Tensor | None) -> Memory | None:
        return None if tensor is None else self._device.input(tensor)

    def _seen_from_here(self, places: Sequence[int]) -> list[int]:
        return [self._arena.address(rank, place) for rank, place in enumerate(places)]


def _address(memory: Memory | None) -> int:
    return 0 if memory is None else memory.address


def _item_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.element_size()
