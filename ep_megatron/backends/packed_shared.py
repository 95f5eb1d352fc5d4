"""Low-latency calls between CPU ranks of one host, by compiled code over shared memory.

Rows stay in their rank's segment until those who need them take them. The protocol is in
docs/design.md, its flags in csrc/cpu/packed_meeting.h.
"""

import os
import secrets
from typing import NoReturn

import torch
from torch import Tensor

from ep_megatron import _cpu, casts
from ep_megatron.backends.arrival import view
from ep_megatron.backends.base import PeerReport
from ep_megatron.backends.host_share import count_cores, default_max_bytes, default_threads
from ep_megatron.backends.meeting import Gathering, check_working
from ep_megatron.backends.packed import (
    LOW_LATENCY_OPERATIONS,
    NUM_FIELDS,
    LowLatencyCall,
    LowLatencyHandle,
    Packed,
    Waits,
    check_low_latency_agreement,
    other_routing,
)
from ep_megatron.backends.shared_memory import run_together
from ep_megatron.config import BufferConfig


class PackedShared:
    """See `LowLatencyBackend`. Collective constructor.

    Args:
        meeting: of the CPU ranks of one host; used by the constructor alone.
        config: limits; see `BufferConfig`.
        enable_shrink: whether a rank that has ended or is late is masked instead of an error.

    Raises:
        RuntimeError: on every rank, if one cannot make its segment.
    """

    device_type = "cpu"

    def __init__(self, meeting: Gathering, config: BufferConfig, enable_shrink: bool) -> None:
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        prefix = f"ep_megatron.{os.geteuid()}."
        name = f"{prefix}{os.getpid()}.{secrets.token_hex(16)}"

        def create() -> None:
            self._calls = _cpu.LowLatency(
                folder=config.shm_dir,
                name=name,
                rank=self.rank,
                num_ranks=self.num_ranks,
                max_bytes=config.max_bytes or default_max_bytes(config.shm_dir, self.num_ranks),
                num_threads=config.num_threads or default_threads(self.num_ranks),
                timeout=config.timeout,
                has_core_per_rank=count_cores() >= self.num_ranks,
                enable_shrink=enable_shrink,
            )

        run_together(meeting, create)
        try:
            names = meeting.gather_text("Buffer", name)
            run_together(meeting, lambda: self._calls.attach(names))
        except BaseException:
            self._calls.close()
            raise
        self._calls.unlink()
        self._next: tuple[_cpu.Block, Tensor] | None = None
        self._taken: dict[int, _cpu.Block] = {}  # by address, until their combine is sent
        self._is_closed = False

    def send_dispatch(self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor) -> int:
        """See `LowLatencyBackend.send_dispatch`."""
        self._check_open(call.name)
        return self._calls.send_dispatch(call, x.data_ptr(), _topk(topk_idx), _format(call))

    def receive_dispatch(self, number: int, call: LowLatencyCall, packed: Packed) -> None:
        """See `LowLatencyBackend.receive_dispatch`."""
        self._check_open(call.name)
        tensors = packed.x, packed.scales, packed.count, packed.src_info, packed.layout_range
        addresses = *(0 if t is None else t.data_ptr() for t in tensors), packed.waited.data_ptr()
        if not self._calls.receive_dispatch(number, call, _format(call), addresses):
            self._raise_disagreement(call.name)

    def send_combine(
        self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor, handle: LowLatencyHandle
    ) -> int:
        """See `LowLatencyBackend.send_combine`."""
        self._check_open(call.name)
        block = self._taken.pop(x.data_ptr(), None)
        layout = handle.packed_recv_layout_range.data_ptr()
        return self._calls.send_combine(call, x.data_ptr(), layout, _topk(topk_idx), block)

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
        self._check_open(call.name)
        is_agreed, others = self._calls.receive_combine(
            number,
            call,
            _topk(topk_idx),
            topk_weights.data_ptr(),
            out.data_ptr(),
            waits.waited.data_ptr(),
            waits.num_bytes.data_ptr(),
        )
        if not is_agreed:
            self._raise_disagreement(call.name)
        if others:
            raise other_routing(call.name, others)

    def clean(self, call: LowLatencyCall) -> None:
        """See `LowLatencyBackend.clean`."""
        self._check_open(call.name)
        number = self._calls.send_nothing(call.operation, call)
        if not self._calls.receive_nothing(call.operation, number):
            self._raise_disagreement(call.name)

    def combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.combine_buffer`."""
        self._check_open("get_next_low_latency_combine_buffer")
        rows = self.num_ranks * handle.num_max_dispatch_tokens_per_rank
        shape = (handle.num_experts // self.num_ranks, rows, handle.hidden)
        if self._next is None or self._next[1].shape != shape:
            self._next = None
            block = self._calls.allocate(2 * shape[0] * rows * handle.hidden)
            like = torch.empty(0, dtype=torch.bfloat16)
            self._next = block, view(block, 0, like, *shape)
        return self._next[1]

    def take_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.take_combine_buffer`."""
        buffer = self.combine_buffer(handle)
        assert self._next is not None
        self._taken[buffer.data_ptr()] = self._next[0]
        self._next = None
        return buffer

    def fail(self, operation: str, error: str) -> None:
        """See `LowLatencyBackend.fail`."""
        self._check_open(operation)
        self._calls.report_failure(LOW_LATENCY_OPERATIONS.index(operation), error)

    def mask(self, rank: int, is_masked: bool) -> None:
        """See `LowLatencyBackend.mask`."""
        self._calls.mask(rank, is_masked)

    def masks(self) -> list[int]:
        """See `LowLatencyBackend.masks`."""
        return self._calls.masks()

    def limit_threads(self, num_threads: int) -> None:
        """See `LowLatencyBackend.limit_threads`."""
        self._calls.limit_threads(num_threads)

    def interrupt(self) -> None:
        """See `LowLatencyBackend.interrupt`. Within 50 ms."""
        self._calls.interrupt()

    def close(self) -> None:
        """See `LowLatencyBackend.close`."""
        self._is_closed = True
        self._calls.close()

    def _check_open(self, name: str) -> None:
        check_working(name, "it was destroyed" if self._is_closed else "")

    def _raise_disagreement(self, name: str) -> NoReturn:
        reports = {r.rank: PeerReport(r.call[:NUM_FIELDS], r.error) for r in self._calls.reports()}
        check_low_latency_agreement(name, reports, self.num_ranks)
        raise AssertionError(f"{name}: the ranks disagree in nothing that is named")


def _topk(topk_idx: Tensor) -> tuple[int, int, int, int]:
    num_tokens, num_topk = topk_idx.shape
    return topk_idx.data_ptr(), topk_idx.element_size(), num_tokens, num_topk


def _format(call: LowLatencyCall) -> tuple[int, int, float] | None:
    return None if call.recipe is None else casts.format_of(call.recipe)
