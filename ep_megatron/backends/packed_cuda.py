"""Low-latency calls between GPUs: by each other's memory, or by a network that kernels put into.

Every rank has one window, of a size that is fixed when the Buffer is made. R ranks, E experts,
C the most tokens of a rank, H hidden.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.device import Device, check_not_capturing
from ep_megatron.backends.meeting import Meeting, check_working
from ep_megatron.backends.network import Network
from ep_megatron.backends.packed import (
    COMBINE,
    LOW_LATENCY_OPERATIONS,
    LowLatencyCall,
    LowLatencyHandle,
    Packed,
    Waits,
)
from ep_megatron.backends.packed_kernels import PackedKernels
from ep_megatron.backends.packed_order import CallOrder, Turn
from ep_megatron.backends.packed_report import did_not_come, raise_disagreement, raise_failure
from ep_megatron.backends.packed_window import Place
from ep_megatron.config import BufferConfig

_OUTSIDE = "make this call before the capture, or between replays"


class PackedCuda:
    """See `LowLatencyBackend`, and `ReplayedBackend`. Collective constructor.

    A receiving half waits on the host for one word of its GPU, to raise what ranks disagree in. A
    sending half waits for nothing; values of `topk_idx` that cannot be are found by a kernel, and
    raise from the receiving half, on every rank. While a CUDA graph is captured no host waits: what
    replays fail in is kept for `check_replays`.

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
        self._device = device
        sizes = meeting.gather_text("Buffer", str(window_bytes))
        if len(set(sizes)) > 1:
            raise RuntimeError(
                "Buffer: expected num_rdma_bytes to be the same on all ranks, got "
                + ", ".join(f"{size} on rank {rank}" for rank, size in enumerate(sizes))
            )
        self._kernels = PackedKernels(
            meeting, device, config, window_bytes, enable_shrink=enable_shrink, far=far
        )
        self._window = self._kernels.window
        self._order = CallOrder(device.graph_id)
        self._broken = ""
        # Places that combines are given. Never freed while the window lives.
        num_bytes = self._window.place_bytes
        self._buffers = [
            device.views(self._kernels.rows_at(place), num_bytes, lambda: None)
            for place in self._window.places
        ]

    # -- sending halves ---------------------------------------------------------------------------

    def send_dispatch(self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor) -> int:
        """See `LowLatencyBackend.send_dispatch`. Bad values raise from `receive_dispatch`."""
        turn = self._begin(call.name)
        self._check_limits(turn, call, topk_idx)
        rows, slots = self._device.input(x), self._device.input(topk_idx)
        with self._device.on_stream():
            args = self._kernels.args(turn, call, slots)
            args.x = rows.address
            self._kernels.begin(args)
            self._kernels.launch(_cuda.PackedStep.push, args)
            self._kernels.post(args)
        self._order.keep(turn, (rows, slots))
        return turn.number

    def send_combine(
        self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor, handle: LowLatencyHandle
    ) -> int:
        """See `LowLatencyBackend.send_combine`."""
        turn = self._begin(call.name)
        self._check_limits(turn, call, topk_idx)
        slots = self._device.input(topk_idx)
        layout = self._device.input(handle.packed_recv_layout_range)
        place, rows = self._window.taken_place(x.data_ptr()), None
        if place is not None:
            self._device.arena_address(x)
        else:
            rows, place = self._device.input(x), self._free_place(turn, call.name)
        with self._device.on_stream():
            args = self._kernels.args(turn, call, slots, rows_at=place.offset)
            args.layout_range = layout.address
            self._kernels.begin(args, place)
            if rows is not None or self._kernels.has_far_ranks:
                args.x = self._kernels.rows_at(place) if rows is None else rows.address
                self._kernels.launch(_cuda.PackedStep.stage, args)
            self._kernels.post(args)
        place.last_call = turn.number
        self._order.keep(turn, (slots, layout, rows))
        return turn.number

    def fail(self, operation: str, error: str) -> None:
        """See `LowLatencyBackend.fail`. Others do not hear of what happens in a capture."""
        if not self.is_capturing():
            self._refuse(self._begin(operation), operation, error)

    # -- receiving halves -------------------------------------------------------------------------

    def receive_dispatch(self, number: int, call: LowLatencyCall, packed: Packed) -> None:
        """See `LowLatencyBackend.receive_dispatch`."""
        scales = None if packed.scales is None else packed.scales.transpose(1, 2)
        tensors = packed.x, packed.count, packed.src_info, packed.layout_range, scales
        outs = [None if t is None else self._device.output(t.dtype, t.shape, t) for t in tensors]
        x, count, src_info, layout, out_scales = outs
        turn = self._order.receive(call.name, number)
        args = self._kernels.args(turn, call, None)
        for name, out in (
            ("out", x),
            ("out_count", count),
            ("out_tokens", src_info),
            ("layout_range", layout),
            ("out_scales", out_scales),
        ):
            setattr(args, name, 0 if out is None else out.address)
        self._receive(turn, call, args, _cuda.PackedStep.take, packed.waited)
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
        turn = self._order.receive(call.name, number)
        weights, slots = self._device.input(topk_weights), self._device.input(topk_idx)
        aligned = out if out.data_ptr() % 16 == 0 else torch.empty_like(out)
        summed = self._device.output(out.dtype, out.shape, aligned)
        args = self._kernels.args(turn, call, slots)
        args.weights, args.out = weights.address, summed.address
        self._receive(turn, call, args, _cuda.PackedStep.sum, waits.waited)
        self._device.tensor(summed)
        if aligned is not out:
            out.copy_(aligned)

    def clean(self, call: LowLatencyCall) -> None:
        """See `LowLatencyBackend.clean`."""
        check_not_capturing(self._device, call.name, _OUTSIDE)
        turn = self._begin(call.name)
        args = self._kernels.args(turn, call, None)
        with self._device.on_stream():
            self._kernels.begin(args)
            self._kernels.post(args)
        waited = torch.zeros(self.num_ranks, dtype=torch.int64)
        self._receive(turn, call, args, None, waited)

    # -- graphs -----------------------------------------------------------------------------------

    def is_capturing(self) -> bool:
        """See `ReplayedBackend.is_capturing`."""
        return self._device.is_capturing()

    def check_replays(self) -> None:
        """See `ReplayedBackend.check_replays`."""
        name = "low_latency_check"
        check_working(name, self._broken)
        self._ask_masks(name)  # behind what the stream has before
        self._raise_failure()

    # -- buffers and masks ------------------------------------------------------------------------

    def combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.combine_buffer`. Part of this rank's window."""
        name = "get_next_low_latency_combine_buffer"
        rows = self.num_ranks * handle.num_max_dispatch_tokens_per_rank
        shape = (handle.num_experts // self.num_ranks, rows, handle.hidden)
        graph = self._device.graph_id()
        buffer = self._window.next_buffer(shape, graph)
        if buffer is not None:
            return buffer
        if refusal := self._window.refusal(LowLatencyCall(COMBINE, *handle[2:])):
            raise ValueError(f"{name}: {refusal}")
        place = self._window.free_place(self._order.under_way, for_caller=True)
        if place is None:
            raise ValueError(
                f"{name}: expected the hook of the combine before last to have run, got one "
                "whose rows may still be read"
            )
        with self._device.on_stream():
            self._kernels.begin(self._kernels.bare_args(None, 0), place)
        memory = self._buffers[place.index][: 2 * math.prod(shape)]
        buffer = memory.view(torch.bfloat16).view(shape)
        self._window.set_next_buffer(place, buffer, graph)
        return buffer

    def take_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.take_combine_buffer`."""
        graph = self._device.graph_id()
        if self._window.next_graph(graph) != graph:
            raise ValueError(
                "low_latency_combine: expected its buffer to be asked for where the combine is "
                "made, got one that a CUDA graph waits for and the combine is elsewhere, or the "
                "other way round; call get_next_low_latency_combine_buffer in the same capture"
            )
        self.combine_buffer(handle)
        return self._window.take_next_buffer()

    def mask(self, rank: int, is_masked: bool) -> None:
        """See `LowLatencyBackend.mask`."""
        self._ask_masks("low_latency_update_mask_buffer", rank, is_masked)

    def masks(self) -> list[int]:
        """See `LowLatencyBackend.masks`."""
        return self._ask_masks("low_latency_query_mask_buffer")

    def limit_threads(self, num_threads: int) -> None:
        """See `LowLatencyBackend.limit_threads`. No thread of the host moves rows."""

    def interrupt(self) -> None:
        """See `LowLatencyBackend.interrupt`. A kernel keeps its deadline; the next call raises."""
        self._broken = self._broken or "a call was interrupted"

    def close(self) -> None:
        """See `LowLatencyBackend.close`. The device is its owner's to close."""
        self._broken = self._broken or "it was destroyed"

    # -- all calls --------------------------------------------------------------------------------

    def _begin(self, name: str) -> Turn:
        check_working(name, self._broken)
        return self._order.begin(name)

    def _check_limits(self, turn: Turn, call: LowLatencyCall, topk_idx: Tensor) -> None:
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
            self._refuse(turn, call.name, errors[0])
            raise ValueError(f"{call.name}: {errors[0]}")

    def _refuse(self, turn: Turn, operation: str, error: str) -> None:
        """Tell the others why this rank does not take part in a call that it has begun."""
        if turn.graph:
            return
        kernels = self._kernels
        args = kernels.bare_args(turn, LOW_LATENCY_OPERATIONS.index(operation))
        args.set_head(call=[], error=error, rows=0)
        args.is_alone, args.operation = 1, len(LOW_LATENCY_OPERATIONS) - 1
        with self._device.on_stream():
            kernels.begin(args)
            kernels.post(args)
            self._ask(operation, args, _cuda.PackedStep.finish)

    def _receive(
        self,
        turn: Turn,
        call: LowLatencyCall,
        args: _cuda.PackedArgs,
        step: _cuda.PackedStep | None,
        waited: Tensor,
    ) -> None:
        """Meet, move rows by `step`, and raise what the ranks disagree in."""
        if turn.graph:
            with self._device.on_stream():
                self._kernels.receive(args, step)
                self._kernels.tell(args, _cuda.PackedStep.finish)
            return
        status = _cuda.PACKED_AGAIN
        while status == _cuda.PACKED_AGAIN:  # without those who have masked this rank
            with self._device.on_stream():
                self._kernels.receive(args, step)
                status, words = self._ask(call.name, args, _cuda.PackedStep.finish)
            waited += torch.tensor([word.waited for word in words])
        if status == _cuda.PACKED_TIMED_OUT:
            self._broken = f"ranks did not come to low-latency call {turn.number}"
            raise did_not_come(call.name, words, self.rank, self._kernels.timeout)
        raise_disagreement(call.name, status, words)
        self._raise_failure()  # of replays before; the ranks stay in step, for all made this call

    def _raise_failure(self) -> None:
        """Raise, once, what the first replayed call that failed since the last look failed in."""
        failure = self._kernels.failure
        if not int.from_bytes(failure.read()[:4], "little"):
            return
        operation, status, words = _cuda.read_packed_report(failure.read(), self.num_ranks)
        failure.write(bytes(4))
        if status == _cuda.PACKED_TIMED_OUT:
            self._broken = self._broken or "ranks did not come to a replayed call"
        name = LOW_LATENCY_OPERATIONS[operation]
        raise_failure(name, status, words, self.rank, self._kernels.timeout)

    def _ask(
        self, operation: str, args: _cuda.PackedArgs, step: _cuda.PackedStep
    ) -> tuple[int, Sequence[_cuda.PackedWord]]:
        """Launch a kernel that reports, and wait for its word."""
        try:
            return self._kernels.ask(operation, args, step)
        except BaseException as exception:
            self._broken = f"{operation} ended by {str(exception) or type(exception).__name__}"
            raise

    def _ask_masks(self, operation: str, rank: int = -1, is_masked: bool = False) -> list[int]:
        """Mask a rank or none; return who is masked."""
        check_not_capturing(self._device, operation, _OUTSIDE)
        args = self._kernels.bare_args(None, 0)
        args.mask_rank, args.mask_value = rank, is_masked
        with self._device.on_stream():
            _, words = self._ask(operation, args, _cuda.PackedStep.mask)
        return [int(word.is_masked and peer != self.rank) for peer, word in enumerate(words)]

    def _free_place(self, turn: Turn, name: str) -> Place:
        """Return where a combine's rows may be staged, or raise on every rank."""
        place = self._window.free_place(self._order.under_way)
        if place is None:
            error = (
                "expected a free place for its rows, got none beside the zero-copy buffer; run "
                "the hooks of earlier combines first"
            )
            self._refuse(turn, name, error)
            raise ValueError(f"{name}: {error}")
        return place
