"""The memory of low-latency calls between GPUs, and the launches that a half is made of.

The kernels are in csrc/cuda/low_latency.cu and low_latency_flags.cu, and for ranks that are out of
reach in csrc/nvshmem/send.cu; who writes and reads what in csrc/cuda/packed_protocol.h.
"""

from collections.abc import Sequence

from ep_megatron import _cuda
from ep_megatron.backends.device import Device, HostMemory, Memory
from ep_megatron.backends.device_rows import recipe_of
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.network import Network
from ep_megatron.backends.packed import DISPATCH, LowLatencyCall
from ep_megatron.backends.packed_order import Turn
from ep_megatron.backends.packed_window import Place, SlotBytes, Window
from ep_megatron.backends.reach import Reach
from ep_megatron.config import BufferConfig

_HOST_GRACE = 5.0  # seconds the host gives its GPU beyond the deadlines that the kernels keep
_TICKET_MASK = 0xFFFFFFFF


class PackedKernels:
    """Of one rank. Collective constructor; see `PackedCuda` for its arguments.

    Attributes:
        window: where rows are.
        timeout: seconds that kernels wait for other ranks.
        has_far_ranks: whether some ranks are out of reach.
        failure: the report of replays that failed, its first word 0 if none has.
    """

    def __init__(
        self,
        meeting: Meeting,
        device: Device,
        config: BufferConfig,
        window_bytes: int,
        *,
        enable_shrink: bool,
        far: tuple[Network, Sequence[int]] | None,
    ) -> None:
        self._rank, self._num_ranks = meeting.rank, meeting.num_ranks
        self._device, self.timeout, self._masks_late = device, config.timeout, enable_shrink
        self._num_sms = min(config.num_sms, device.num_sms)
        self._reach, self.has_far_ranks = Reach(device, far), far is not None
        self.window = Window(window_bytes, is_far=far is not None)
        self._controls = self._reach.share(meeting, _cuda.PACKED_CONTROL_BYTES)
        self._windows = self._reach.share(meeting, max(self.window.num_bytes, 1))
        self._state = device.allocate(_cuda.PACKED_STATE_BYTES)
        self._report = device.allocate_host(_cuda.PACKED_REPORT_BYTES)
        self.failure: HostMemory = device.allocate_host(_cuda.PACKED_REPORT_BYTES)
        self._ticket = 0

    def rows_at(self, place: Place) -> int:
        """Return the address of a place for rows here."""
        return self._windows[self._rank] + place.offset

    def args(
        self, turn: Turn, call: LowLatencyCall, slots: Memory | None, *, rows_at: int = 0
    ) -> _cuda.PackedArgs:
        """Describe a half: what all of its kernels need."""
        args = self.bare_args(turn, call.operation)
        args.set_head(call=list(call), error="", rows=rows_at)
        args.num_experts, args.hidden = call.num_experts, call.hidden
        args.max_tokens, args.num_topk = call.num_max_dispatch_tokens_per_rank, 1
        if slots is not None:
            args.topk_idx, args.is_int64 = slots.address, slots.dtype.itemsize == 8
            args.num_tokens, args.num_topk = slots.shape
        if call.operation == DISPATCH:
            size = SlotBytes.of(call)
            args.x_bytes, args.scale_bytes, args.slot_bytes = size.x, size.scales, size.slot
            args.block_bytes = size.block
            if call.recipe is not None:
                args.recipe = recipe_of(call.recipe)
        return args

    def bare_args(self, turn: Turn | None, operation: int) -> _cuda.PackedArgs:
        """Describe a launch of a call that moves nothing, or of none."""
        window, is_captured = self.window, turn is not None and turn.graph != 0
        return _cuda.PackedArgs(
            control=self._controls,
            window=self._windows,
            state=self._state,
            report=(self.failure if is_captured else self._report).device_address,
            ticket=1,  # of a failure; others get theirs as they are asked for
            is_awaited=not is_captured,
            timeout_ns=int(self.timeout * 1e9),
            window_bytes=window.num_bytes,
            slots=window.slots_at,
            outbox=window.outbox_at,
            inbox=window.inbox_at,
            place_bytes=window.place_bytes,
            part_bytes=window.place_bytes // self._num_ranks // 16 * 16,
            rank=self._rank,
            num_ranks=self._num_ranks,
            call=-1 if turn is None else turn.index,
            rows_place=-1,
            masks_late=self._masks_late,
            operation=operation,
            mask_rank=-1,
        )

    def begin(self, args: _cuda.PackedArgs, place: Place | None = None) -> None:
        """Count a call, once what it writes is read by nobody; or wait for that alone.

        Args:
            args: of the call, or of none.
            place: where rows are to be.
        """
        args.rows_place = -1 if place is None else place.index
        self.launch(_cuda.PackedStep.begin, args)

    def post(self, args: _cuda.PackedArgs) -> None:
        """Tell all ranks what was sent; what goes to those out of reach is sent here."""
        self.launch(_cuda.PackedStep.post, args)
        self._launch_far(_cuda.PackedStep.send, args)

    def receive(self, args: _cuda.PackedArgs, step: _cuda.PackedStep | None) -> None:
        """Meet, and move rows by `step`; `tell` or `ask` must follow."""
        self.launch(_cuda.PackedStep.meet, args)
        if step is not None:
            self.launch(step, args)

    def launch(self, step: _cuda.PackedStep, args: _cuda.PackedArgs) -> None:
        """Launch a kernel."""
        self._device.launch(_cuda.plan_packed(step, args, self._num_sms))

    def tell(self, args: _cuda.PackedArgs, step: _cuda.PackedStep) -> None:
        """Launch finish, or mask, and what tells ranks out of reach of it."""
        self.launch(step, args)
        self._launch_far(_cuda.PackedStep.tell, args)

    def ask(
        self, operation: str, args: _cuda.PackedArgs, step: _cuda.PackedStep
    ) -> tuple[int, Sequence[_cuda.PackedWord]]:
        """Do so and wait for the report; return its status and what every rank said.

        Raises:
            RuntimeError: if this rank's GPU does not answer.
        """
        self._ticket = args.ticket = self._ticket + 1 & _TICKET_MASK
        self.tell(args, step)
        patience = 3 * self.timeout + _HOST_GRACE  # begin and meet may wait before
        if not self._device.wait_for_word(self._report, self._ticket, patience):
            raise RuntimeError(
                f"{operation}: rank {self._rank} expected its own GPU to answer within "
                f"{patience:g} s, got nothing; does another kernel block ours? Make a new Buffer"
            )
        _, status, words = _cuda.read_packed_report(self._report.read(), self._num_ranks)
        return status, words

    def _launch_far(self, step: _cuda.PackedStep, args: _cuda.PackedArgs) -> None:
        self._reach.launch_far(_cuda.plan_packed(step, args, self._num_sms))
