"""Meetings of ranks on GPUs: a kernel posts, waits for all, and tells the host what they want.

The kernels are in csrc/cuda/notify.cu, who writes and reads what in csrc/cuda/protocol.h.
"""

from collections.abc import Sequence

import torch

from ep_megatron import _cuda
from ep_megatron.backends.base import DTYPES, Call, PeerReport, check_agreement
from ep_megatron.backends.device import Device, check_not_capturing
from ep_megatron.backends.device_arena import NO_BLOCK, NO_PLACE, Block
from ep_megatron.backends.meeting import Meeting, check_working
from ep_megatron.backends.network import Network
from ep_megatron.backends.reach import Reach
from ep_megatron.hosts import Hosts

_HOST_GRACE = 5.0  # seconds the host gives its GPU beyond the deadline that the kernels keep
# Deadlines, one after the other, that kernels before may keep where some ranks are far.
_FAR_DEADLINES = 3
_TICKET_MASK = 0xFFFFFFFF


class DeviceMeeting:
    """One rank's flags, posts and reports. Collective constructor.

    Args:
        device: this rank's.
        meeting: the ranks.
        timeout: seconds that a rank waits for the others.
        num_sms: most blocks of a kernel.
        slabs: address of the table of all ranks' memory; 0 if posts name no rows.
        far: the network, and the ranks that are not behind it; None if all ranks' devices reach
            each other's memory.

    Attributes:
        ticket: number of the last call, as the host counts; the same on all ranks.
        state: address of what notify leaves for later kernels of a call.
    """

    def __init__(
        self,
        device: Device,
        meeting: Meeting,
        timeout: float,
        num_sms: int,
        slabs: int,
        far: tuple[Network, Sequence[int]] | None = None,
    ) -> None:
        self.rank, self.num_ranks, self.num_sms = meeting.rank, meeting.num_ranks, num_sms
        self.ticket = 0
        self._device, self._timeout, self._slabs = device, timeout, slabs
        self._broken = ""
        self._reach = Reach(device, far)
        self._patience = timeout * (1 if far is None else _FAR_DEADLINES) + _HOST_GRACE
        self._controls = self._reach.share(meeting, _cuda.CONTROL_BYTES)
        num_keys = _cuda.MAX_EXPERTS + self.num_ranks + _cuda.MAX_NODES
        self._block_counts = device.allocate(4 * num_keys * num_sms)
        self._block_bad = device.allocate(4 * num_sms)
        self._key_starts = device.allocate(4 * num_keys)
        self.state = device.allocate(_cuda.CALL_STATE_BYTES)
        self._report = device.allocate_host(_cuda.REPORT_BYTES)
        self._failure = device.allocate_host(_cuda.REPORT_BYTES)  # of calls without a waiting host
        self._arrive_error = device.allocate_host(_cuda.ARRIVE_ERROR_BYTES)

    def scan(self, topk_idx: int, call: Call, num_tokens: int, routes: int) -> _cuda.ScanArgs:
        """Describe the planning of a fresh dispatch, for `meet`.

        Args:
            topk_idx: address of `[T, K]`.
            call: the dispatch.
            num_tokens: T.
            routes: address of `[3, T, K]`, to be written.
        """
        return _cuda.ScanArgs(
            topk_idx=topk_idx,
            num_tokens=num_tokens,
            num_topk=call.num_topk,
            is_int64=DTYPES[call.idx_dtype] == torch.int64,
            num_experts=call.num_experts,
            num_ranks=self.num_ranks,
            expand=call.expand,
            block_counts=self._block_counts,
            block_bad=self._block_bad,
            key_starts=self._key_starts,
            state=self.state,
            routes=routes,
        )

    def meet(
        self,
        operation: str,
        call: Call | None,
        block: Block = NO_BLOCK,
        *,
        weights_place: int = NO_PLACE,
        kind: int = _cuda.TAKES_PART,
        error: str = "",
        scan: _cuda.ScanArgs | None = None,
    ) -> _cuda.Report:
        """Post this rank's word on a call, and wait for the others'. Collective.

        When it returns, every rank has finished the call before.

        Args:
            operation: for messages.
            call: what this rank does; None beside an `error`.
            block: where rows may be written, or are.
            weights_place: where weights are, in a combine.
            kind: whether this rank takes part, or why not.
            error: why not.
            scan: of a fresh dispatch: counts are exchanged, and routes made if all agree.

        Raises:
            RuntimeError: if ranks did not come in time, or in an earlier call.
        """
        advice = "give num_worst_tokens to the dispatch, and make the same calls once before"
        check_not_capturing(self._device, operation, advice)
        args = self._begin(operation)
        args.is_awaited, args.report = True, self._report.device_address
        args.set_head(
            call=[] if call is None else list(call),
            kind=kind,
            error=error,
            rows_place=block.place,
            rows_bytes=block.num_bytes,
            weights_place=weights_place,
        )
        try:
            self._launch(args, call, scan)
            is_there = self._device.wait_for_word(self._report, self.ticket, self._patience)
            num_experts, num_nodes = (0, 0) if scan is None else (scan.num_experts, scan.num_nodes)
            data = self._report.read()
            report = _cuda.read_report(data, self.num_ranks, num_experts, num_nodes)
            self._check_progress(operation, is_there, report)
        except BaseException as exception:
            # What this rank's kernels still do is unknown from here on.
            self._broken = f"{operation} ended by {str(exception) or type(exception).__name__}"
            raise
        return report

    def post(
        self,
        operation: str,
        call: Call,
        block: Block,
        *,
        weights_place: int = NO_PLACE,
        scan: _cuda.ScanArgs | None = None,
        numbers: int = 0,
        piles: tuple[int, Hosts] | None = None,
        gate: int = 0,
    ) -> None:
        """Post this rank's word on a call in which no host waits. Collective.

        Later kernels find in `state` whether all ranks agree, and where rows are.

        Args:
            operation: for messages.
            call: what this rank does.
            block: where rows may be written, or are.
            weights_place: where weights are, in a combine.
            scan: of a fresh dispatch.
            numbers: of a fresh dispatch: address of what `CapacityHandle.numbers` will be.
            piles: of a fresh dispatch between nodes: address of what `DeviceHop.piles` will be, and
                the nodes.
            gate: `state` of a meeting of more ranks, before on the stream: these agree only if
                those do.

        Raises:
            RuntimeError: if ranks did not come in time in an earlier call.
        """
        args = self._begin(operation)
        args.report = self._failure.device_address
        args.capacity, args.numbers, args.gate = call.num_worst_tokens, numbers, gate
        if piles is not None:
            args.piles, nodes = piles
            args.node_of, args.index_of = list(nodes.host_of), list(nodes.index_of)
            args.size_of = [len(nodes.members[node]) for node in nodes.host_of]
        args.set_head(
            call=list(call),
            kind=_cuda.TAKES_PART,
            error="",
            rows_place=block.place,
            rows_bytes=block.num_bytes,
            weights_place=weights_place,
        )
        self._launch(args, call, scan)

    def take_failure(self, num_nodes: int = 0) -> _cuda.Report | None:
        """Return, once, what ranks said in the first call without a waiting host that failed.

        None if there is none as far as is known. Local. `num_nodes`: that tokens are counted by.

        Raises:
            RuntimeError: if ranks did not come in time.
        """
        if not int.from_bytes(self._failure.read()[:4], "little"):
            return None
        data = self._failure.read()
        report = _cuda.read_report(data, self.num_ranks, _cuda.MAX_EXPERTS, num_nodes)
        self._failure.write(bytes(4))
        if report.status == _cuda.TIMED_OUT:
            self._broken = self._broken or "ranks did not come in an earlier call"
            self._check_progress("dispatch or combine", True, report)
        return report

    def agree(self, operation: str, report: _cuda.Report) -> bool:
        """Raise the same ValueError on every rank, or return whether all take part."""
        if report.status == _cuda.AGREED:
            return True
        reports = []
        for word in report.words:
            error = word.error
            if word.kind == _cuda.BAD_INDEX:
                num_experts = Call(*word.call[: len(Call._fields)]).num_experts
                error = (
                    f"expected topk_idx to be in [0, {num_experts}), or -1 for an unused slot, "
                    f"got {word.error_value}"
                )
            reports.append(PeerReport(word.call, error))
        check_agreement(operation, reports)
        return False

    def fail(self, operation: str, error: str) -> None:
        """Take part in a call only to say why this rank cannot."""
        report = self.meet(operation, None, kind=_cuda.BAD_ARGUMENTS, error=error)
        try:
            self.agree(operation, report)
        except ValueError:
            return  # the others' copy of the error this rank is about to raise
        raise AssertionError("a reported error was not returned")

    def arrive(self, waits: bool) -> None:
        """Tell the others that this rank's rows of the call are written, or read.

        Args:
            waits: whether later kernels of this rank come after all ranks have said so.
        """
        args = _cuda.ArriveArgs(
            control=self._controls,
            rank=self.rank,
            num_ranks=self.num_ranks,
            state=self.state,
            waits=waits,
            timeout_ns=int(self._timeout * 1e9),
            error=self._arrive_error.device_address,
        )
        self._device.launch(_cuda.plan_arrive(args))

    def close(self, reason: str) -> None:
        """Let no further call through."""
        self._broken = self._broken or reason

    def _begin(self, operation: str) -> _cuda.NotifyArgs:
        check_working(operation, self._broken)
        self.ticket = self.ticket + 1 & _TICKET_MASK or 1
        return _cuda.NotifyArgs(
            control=self._controls,
            rank=self.rank,
            num_ranks=self.num_ranks,
            ticket=self.ticket,
            state=self.state,
            slabs=self._slabs,
            timeout_ns=int(self._timeout * 1e9),
        )

    def _launch(
        self, args: _cuda.NotifyArgs, call: Call | None, scan: _cuda.ScanArgs | None
    ) -> None:
        if scan is None:
            self._notify(args)
            return
        assert call is not None
        self._device.launch(_cuda.plan_count(scan, self.num_sms))
        num_blocks = _cuda.num_scan_blocks(scan.num_tokens, self.num_sms)
        args.set_counts(scan, num_blocks=num_blocks, alignment=call.expert_alignment)
        self._notify(args)
        self._device.launch(_cuda.plan_route(scan, self.num_sms))  # needs no word from the host

    def _notify(self, args: _cuda.NotifyArgs) -> None:
        """Post and wait for all posts; in between, cards bring this rank's to where it is far."""
        args.has_far = not all(self._controls)
        args.posts, args.meets = True, not args.has_far
        self._device.launch(_cuda.plan_notify(args))
        if args.has_far:
            self._reach.launch_far(_cuda.plan_notify_send(args))
            args.posts, args.meets = False, True
            self._device.launch(_cuda.plan_notify(args))

    def check_arrivals(self, operation: str) -> None:
        """Raise if ranks did not arrive in an earlier call. Local.

        Raises:
            RuntimeError: naming them.
        """
        epoch, seen = _cuda.read_arrive_error(self._arrive_error.read(), self.num_ranks)
        if epoch:
            self._raise_late(operation, "send its rows in an earlier call", epoch, seen)

    def _check_progress(self, operation: str, is_there: bool, report: _cuda.Report) -> None:
        self.check_arrivals(operation)
        if not is_there:
            raise RuntimeError(
                f"{operation}: rank {self.rank} expected its own GPU to answer within "
                f"{self._patience:g} s, got nothing; does another kernel block ours? This Buffer "
                "cannot go on"
            )
        if report.status == _cuda.TIMED_OUT:
            seen = [word.seen for word in report.words]
            self._raise_late(operation, "post this call", report.epoch, seen)

    def _raise_late(self, operation: str, what: str, epoch: int, seen: Sequence[int]) -> None:
        late = [rank for rank, last in enumerate(seen) if last - epoch & 0x80000000]
        raise RuntimeError(
            f"{operation}: rank {self.rank} expected every rank to {what} within "
            f"{self._timeout:g} s, got nothing from rank {', '.join(map(str, late))}; "
            "did it stop, or is it in another call? This Buffer cannot go on"
        )
