"""Low-latency calls between GPUs: by each other's memory, or by a network that kernels put into.

Every rank has one window, of a size that is fixed when the Buffer is made. The kernels are in
csrc/cuda/low_latency.cu and low_latency_flags.cu, and for ranks that are out of reach in
csrc/nvshmem/send.cu; who writes and reads what in csrc/cuda/packed_protocol.h. R ranks, E experts,
C the most tokens of a rank, H hidden.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.device import Device, Memory, check_not_capturing
from ep_megatron.backends.device_rows import recipe_of
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.network import Network
from ep_megatron.backends.packed import (
    COMBINE,
    DISPATCH,
    LOW_LATENCY_OPERATIONS,
    LowLatencyCall,
    LowLatencyHandle,
    Packed,
    Waits,
    too_many_pending,
)
from ep_megatron.backends.packed_report import raise_disagreement
from ep_megatron.backends.packed_window import Place, SlotBytes, Window
from ep_megatron.backends.reach import Reach
from ep_megatron.config import BufferConfig

_HOST_GRACE = 5.0  # seconds the host gives its GPU beyond the deadlines that the kernels keep
_EPOCH_MASK = 0xFFFFFFFF


class PackedCuda:
    """See `LowLatencyBackend`. Collective constructor.

    A receiving half waits on the host for one word of its GPU, to raise what ranks disagree in. A
    sending half waits for nothing; values of `topk_idx` that cannot be are found by a kernel, and
    raise from the receiving half, on every rank.

    Args:
        meeting: the ranks; used by the constructor alone.
        device: this rank's.
        config: limits; see `BufferConfig`.
        window_bytes: of every rank's window; what DeepEP's size hint says is enough.
        enable_shrink: whether a rank that is late is masked instead of an error.
        far: see `Reach`.

    Raises:
        RuntimeError: on every rank, if one cannot share its memory or has another `window_bytes`.
    """

    def __init__(
        self,
        meeting: Meeting,
        device: Device,
        config: BufferConfig,
        window_bytes: int,
        *,
        enable_shrink: bool,
        far: tuple[Network, Sequence[int]] | None = None,
    ) -> None:
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self.device_type = device.device_type
        self._device, self._timeout, self._masks_late = device, config.timeout, enable_shrink
        self._num_sms = min(config.num_sms, device.num_sms)
        sizes = meeting.gather_text("Buffer", str(window_bytes))
        if len(set(sizes)) > 1:
            raise RuntimeError(
                "Buffer: expected num_rdma_bytes to be the same on all ranks, got "
                + ", ".join(f"{size} on rank {rank}" for rank, size in enumerate(sizes))
            )
        self._reach = Reach(device, far)
        self._window = Window(window_bytes, is_far=far is not None)
        self._controls = self._reach.share(meeting, _cuda.PACKED_CONTROL_BYTES)
        self._windows = self._reach.share(meeting, max(self._window.num_bytes, 1))
        self._state = device.allocate(_cuda.PACKED_STATE_BYTES)
        self._report = device.allocate_host(_cuda.PACKED_REPORT_BYTES)
        self._epoch, self._ticket, self._broken = 0, 0, ""
        self._pending: dict[int, tuple[Any, ...]] = {}  # what keeps a call's inputs

    # -- sending halves ---------------------------------------------------------------------------

    def send_dispatch(self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor) -> int:
        """See `LowLatencyBackend.send_dispatch`. Bad values raise from `receive_dispatch`."""
        epoch = self._begin(call.name)
        self._check_limits(epoch, call, topk_idx)
        rows, slots = self._device.input(x), self._device.input(topk_idx)
        with self._device.on_stream():
            args = self._args(epoch, call, slots)
            args.x = rows.address
            for step in (_cuda.PackedStep.begin, _cuda.PackedStep.push):
                self._launch(step, args)
            self._post(args)
        self._pending[epoch] = (rows, slots)
        return epoch

    def send_combine(
        self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor, handle: LowLatencyHandle
    ) -> int:
        """See `LowLatencyBackend.send_combine`."""
        epoch = self._begin(call.name)
        self._check_limits(epoch, call, topk_idx)
        slots = self._device.input(topk_idx)
        layout = self._device.input(handle.packed_recv_layout_range)
        place, rows = self._window.taken_place(x.data_ptr()), None
        if place is not None:
            self._device.arena_address(x)
        else:
            rows, place = self._device.input(x), self._free_place(epoch, call.name)
        with self._device.on_stream():
            args = self._args(epoch, call, slots, rows_at=place.offset)
            args.layout_range = layout.address
            self._launch(_cuda.PackedStep.begin, args)
            if rows is not None:
                self._wait_for_readers(place, epoch)
                args.x = rows.address
                self._launch(_cuda.PackedStep.stage, args)
            self._post(args)
        place.last_call = epoch
        self._pending[epoch] = (slots, layout, rows)
        return epoch

    def fail(self, operation: str, error: str) -> None:
        """See `LowLatencyBackend.fail`."""
        self._refuse(self._begin(operation), operation, error)

    # -- receiving halves -------------------------------------------------------------------------

    def receive_dispatch(self, number: int, call: LowLatencyCall, packed: Packed) -> None:
        """See `LowLatencyBackend.receive_dispatch`."""
        scales = None if packed.scales is None else packed.scales.transpose(1, 2)
        tensors = packed.x, packed.count, packed.src_info, packed.layout_range, scales
        outs = [None if t is None else self._device.output(t.dtype, t.shape, t) for t in tensors]
        x, count, src_info, layout, out_scales = outs
        args = self._args(number, call, None)
        for name, out in (
            ("out", x),
            ("out_count", count),
            ("out_tokens", src_info),
            ("layout_range", layout),
            ("out_scales", out_scales),
        ):
            setattr(args, name, 0 if out is None else out.address)
        self._receive(number, call, args, _cuda.PackedStep.take, packed.waited)
        for out in outs:
            if out is not None:
                self._device.tensor(out)

    def receive_combine(
        self,
        number: int,
        call: LowLatencyCall,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        waits: Waits,
    ) -> None:
        """See `LowLatencyBackend.receive_combine`."""
        weights, slots = self._device.input(topk_weights), self._device.input(topk_idx)
        aligned = out if out.data_ptr() % 16 == 0 else torch.empty_like(out)
        summed = self._device.output(out.dtype, out.shape, aligned)
        args = self._args(number, call, slots)
        args.weights, args.out = weights.address, summed.address
        self._receive(number, call, args, _cuda.PackedStep.sum, waits.waited)
        self._device.tensor(summed)
        if aligned is not out:
            out.copy_(aligned)

    def clean(self, call: LowLatencyCall) -> None:
        """See `LowLatencyBackend.clean`."""
        epoch = self._begin(call.name)
        args = self._args(epoch, call, None)
        with self._device.on_stream():
            self._launch(_cuda.PackedStep.begin, args)
            self._post(args)
        waited = torch.zeros(self.num_ranks, dtype=torch.int64)
        self._receive(epoch, call, args, None, waited)

    # -- buffers and masks ------------------------------------------------------------------------

    def combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.combine_buffer`. Part of this rank's window."""
        name = "get_next_low_latency_combine_buffer"
        rows = self.num_ranks * handle.num_max_dispatch_tokens_per_rank
        shape = (handle.num_experts // self.num_ranks, rows, handle.hidden)
        buffer = self._window.next_buffer(shape)
        if buffer is not None:
            return buffer
        if refusal := self._window.refusal(LowLatencyCall(COMBINE, *handle[2:])):
            raise ValueError(f"{name}: {refusal}")
        place = self._window.free_place(self._pending, for_caller=True)
        if place is None:
            raise ValueError(
                f"{name}: expected the hook of the combine before last to have run, got one "
                "whose rows may still be read"
            )
        with self._device.on_stream():
            self._wait_for_readers(place, self._epoch)
        address, num_bytes = self._windows[self.rank] + place.offset, 2 * math.prod(shape)
        memory = self._device.views(address, num_bytes, lambda: None)
        buffer = memory.view(torch.bfloat16).view(shape)
        self._window.set_next_buffer(place, buffer)
        return buffer

    def take_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.take_combine_buffer`."""
        self.combine_buffer(handle)
        return self._window.take_next_buffer()

    def mask(self, rank: int, is_masked: bool) -> None:
        """See `LowLatencyBackend.mask`."""
        self._mask(rank, is_masked)

    def masks(self) -> list[int]:
        """See `LowLatencyBackend.masks`."""
        return self._mask(-1, False)

    def limit_threads(self, num_threads: int) -> None:
        """See `LowLatencyBackend.limit_threads`. No thread of the host moves rows."""

    def interrupt(self) -> None:
        """See `LowLatencyBackend.interrupt`. A kernel keeps its deadline; the next call raises."""
        self._broken = self._broken or "a call was interrupted"

    def close(self) -> None:
        """See `LowLatencyBackend.close`. The device is its owner's to close."""
        self._broken = self._broken or "it was destroyed"

    # -- all calls --------------------------------------------------------------------------------

    def _begin(self, name: str) -> int:
        if self._broken:
            raise RuntimeError(
                f"{name}: expected a working Buffer, got one that broke down "
                f"({self._broken}); make a new Buffer"
            )
        check_not_capturing(self._device, name, "low-latency calls are not for graphs")
        if self._epoch - 1 in self._pending:
            raise too_many_pending(name)
        self._epoch += 1
        return self._epoch

    def _args(
        self, epoch: int, call: LowLatencyCall, slots: Memory | None, *, rows_at: int = 0
    ) -> _cuda.PackedArgs:
        """Describe a half: what all of its kernels need, and where the slots of its call are."""
        args = self._bare_args(epoch, call.operation)
        args.set_head(call=list(call), error="", rows=rows_at)
        args.num_experts, args.hidden = call.num_experts, call.hidden
        args.max_tokens, args.num_topk = call.num_max_dispatch_tokens_per_rank, 1
        args.inbox = self._window.inbox_at(epoch)
        if slots is not None:
            args.topk_idx, args.is_int64 = slots.address, slots.dtype == torch.int64
            args.num_tokens, args.num_topk = slots.shape
        if call.operation == DISPATCH:
            size = SlotBytes.of(call)
            args.x_bytes, args.scale_bytes, args.slot_bytes = size.x, size.scales, size.slot
            args.slots, args.block_bytes = self._window.slots_at(epoch), size.block
            args.outbox = self._window.outbox_at(epoch)
            if call.recipe is not None:
                args.recipe = recipe_of(call.recipe)
        return args

    def _bare_args(self, epoch: int, operation: int) -> _cuda.PackedArgs:
        return _cuda.PackedArgs(
            control=self._controls,
            window=self._windows,
            state=self._state,
            report=self._report.device_address,
            timeout_ns=int(self._timeout * 1e9),
            window_bytes=self._window.num_bytes,
            rank=self.rank,
            num_ranks=self.num_ranks,
            epoch=epoch & _EPOCH_MASK,  # kernels compare numbers by their difference
            masks_late=self._masks_late,
            operation=operation,
            mask_rank=-1,
        )

    def _launch(self, step: _cuda.PackedStep, args: _cuda.PackedArgs) -> None:
        self._device.launch(_cuda.plan_packed(step, args, self._num_sms))

    def _post(self, args: _cuda.PackedArgs) -> None:
        """Tell all ranks what was sent; what goes to those out of reach is sent here."""
        self._launch(_cuda.PackedStep.post, args)
        self._reach.launch_far(_cuda.plan_packed(_cuda.PackedStep.send, args, self._num_sms))

    def _check_limits(self, epoch: int, call: LowLatencyCall, topk_idx: Tensor) -> None:
        """Raise on every rank if this one's call exceeds its window or the kernels' limits."""
        limits = {
            "hidden": (call.hidden, _cuda.MAX_HIDDEN),
            "the columns of topk_idx": (topk_idx.shape[1], _cuda.MAX_TOPK),
            "num_experts": (call.num_experts, _cuda.MAX_EXPERTS),
        }
        errors = [
            f"expected {what} to be at most {most} for backend 'cuda', got {actual}"
            for what, (actual, most) in limits.items()
            if actual > most
        ]
        errors += filter(None, [self._window.refusal(call)])
        if errors:
            self._refuse(epoch, call.name, errors[0])
            raise ValueError(f"{call.name}: {errors[0]}")

    def _refuse(self, epoch: int, operation: str, error: str) -> None:
        """Tell the others why this rank does not take part in a call that it has begun."""
        args = self._bare_args(epoch, LOW_LATENCY_OPERATIONS.index(operation))
        args.set_head(call=[], error=error, rows=0)
        args.is_alone, args.operation = 1, len(LOW_LATENCY_OPERATIONS) - 1
        with self._device.on_stream():
            self._launch(_cuda.PackedStep.begin, args)
            self._post(args)
            self._finish(operation, args)

    def _receive(
        self,
        number: int,
        call: LowLatencyCall,
        args: _cuda.PackedArgs,
        step: _cuda.PackedStep | None,
        waited: Tensor,
    ) -> None:
        """Meet, move rows by `step`, and raise what the ranks disagree in."""
        self._pending.pop(number, None)
        status = _cuda.PACKED_AGAIN
        while status == _cuda.PACKED_AGAIN:  # without those who have masked this rank
            with self._device.on_stream():
                self._launch(_cuda.PackedStep.meet, args)
                if step is not None:
                    self._launch(step, args)
                status, words = self._finish(call.name, args)
            waited += torch.tensor([word.waited for word in words])
        if status == _cuda.PACKED_TIMED_OUT:
            late = ", ".join(str(rank) for rank, word in enumerate(words) if word.is_late)
            self._broken = f"rank {late} did not come"
            raise RuntimeError(
                f"{call.name}: rank {self.rank} expected all {self.num_ranks} ranks within "
                f"{self._timeout:g} s in low-latency call {number}, got no answer from rank "
                f"{late}; make a new Buffer once all ranks are back"
            )
        raise_disagreement(call.name, status, words)

    def _finish(
        self, operation: str, args: _cuda.PackedArgs
    ) -> tuple[int, Sequence[_cuda.PackedWord]]:
        return self._ask(operation, args, _cuda.PackedStep.finish)

    def _ask(
        self, operation: str, args: _cuda.PackedArgs, step: _cuda.PackedStep
    ) -> tuple[int, Sequence[_cuda.PackedWord]]:
        """Launch a kernel that reports, and wait for its word."""
        self._ticket = args.ticket = self._ticket + 1 & _EPOCH_MASK
        self._launch(step, args)
        self._reach.launch_far(_cuda.plan_packed(_cuda.PackedStep.tell, args, self._num_sms))
        patience = 3 * self._timeout + _HOST_GRACE  # begin and meet may wait before
        try:
            is_there = self._device.wait_for_word(self._report, self._ticket, patience)
        except BaseException as exception:
            self._broken = f"{operation} ended by {str(exception) or type(exception).__name__}"
            raise
        if not is_there:
            self._broken = "its own GPU did not answer"
            raise RuntimeError(
                f"{operation}: rank {self.rank} expected its own GPU to answer within "
                f"{patience:g} s, got nothing; does another kernel block ours? Make a new Buffer"
            )
        return _cuda.read_packed_report(self._report.read(), self.num_ranks)

    def _mask(self, rank: int, is_masked: bool) -> list[int]:
        args = self._bare_args(self._epoch, 0)
        args.mask_rank, args.mask_value = rank, is_masked
        with self._device.on_stream():
            _, words = self._ask("low_latency_update_mask_buffer", args, _cuda.PackedStep.mask)
        return [int(word.is_masked and peer != self.rank) for peer, word in enumerate(words)]

    def _free_place(self, epoch: int, name: str) -> Place:
        """Return where a combine's rows may be staged, or raise on every rank."""
        place = self._window.free_place(self._pending)
        if place is None:
            error = (
                "expected a free place for its rows, got none beside the zero-copy buffer; run "
                "the hooks of earlier combines first"
            )
            self._refuse(epoch, name, error)
            raise ValueError(f"{name}: {error}")
        return place

    def _wait_for_readers(self, place: Place, epoch: int) -> None:
        """Let later kernels come after all ranks have read what is at a place."""
        if place.last_call <= epoch - 2:
            return  # the call before this one has waited
        args = self._bare_args(place.last_call + 2, 0)
        self._launch(_cuda.PackedStep.begin, args)
