"""Dispatch and combine between CPU ranks of one host, by compiled code over shared memory.

Rows go straight to their final address: nothing is packed, and received rows are handed out as
views of the arena while it has room. The protocol is in docs/design.md, its flags in
csrc/cpu/control.h.
"""

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ep_megatron import _cpu, casts
from ep_megatron.arguments import SUM_DTYPES
from ep_megatron.backends.arrival import Arrival, arrival_along, view
from ep_megatron.backends.base import (
    OPERATIONS,
    Announce,
    Call,
    NoRoomError,
    PeerReport,
    Received,
    Routing,
    Rows,
    check_agreement,
)
from ep_megatron.backends.casting import copy_rows
from ep_megatron.backends.host_share import (
    count_cores,
    default_max_bytes,
    default_streaming_bytes,
    default_threads,
)
from ep_megatron.backends.meeting import Gathering
from ep_megatron.config import MIB, BufferConfig
from ep_megatron.handle import AnyHandle, DispatchHandle
from ep_megatron.statistics import BufferStatistics

# Smaller results are as warm in torch's allocator: glibc keeps what it has once faulted in.
_MIN_ARENA_BYTES = MIB


class SharedMemoryBackend:
    """See `Backend`. Collective constructor.

    Args:
        meeting: of the CPU ranks of one host; used by the constructor alone.
        config: limits; see `BufferConfig`.

    Raises:
        ValueError: if the ranks cannot share memory.
        RuntimeError: on every rank, if one cannot make its segment.
    """

    name = "shared_memory"

    def __init__(self, meeting: Gathering, config: BufferConfig) -> None:
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self._num_calls = 0
        prefix = f"ep_megatron.{os.geteuid()}."
        # Unguessable, and gone as soon as all ranks have it mapped.
        name = f"{prefix}{os.getpid()}.{secrets.token_hex(16)}"
        max_bytes = config.max_bytes or default_max_bytes(config.shm_dir, self.num_ranks)

        def create() -> None:
            _cpu.remove_stale_segments(config.shm_dir, prefix)
            self._exchange = _cpu.Exchange(
                folder=config.shm_dir,
                name=name,
                rank=self.rank,
                num_ranks=self.num_ranks,
                max_bytes=max_bytes,
                max_view_bytes=(
                    max_bytes // 2 if config.max_view_bytes is None else config.max_view_bytes
                ),
                streaming_bytes=(
                    default_streaming_bytes()
                    if config.streaming_bytes is None
                    else config.streaming_bytes
                ),
                num_threads=config.num_threads or default_threads(self.num_ranks),
                timeout=config.timeout,
                has_core_per_rank=count_cores() >= self.num_ranks,
            )
            self._exchange.reserve(min(config.initial_bytes, max_bytes))

        run_together(meeting, create)
        try:
            names = meeting.gather_text("Buffer", name)
            run_together(meeting, lambda: self._exchange.attach(names))
        except BaseException:
            self._exchange.close()
            raise
        self._exchange.unlink()

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        rows, routing = rows.contiguous(), routing.contiguous()
        idx = None if routing.expand else routing.topk_idx
        arrival = Arrival(rows, idx, routing.topk_idx.shape[1], routing.expand)
        planned: tuple[Rows, DispatchHandle] | None = None

        def plan(result: _cpu.Dispatched) -> None:
            nonlocal planned
            num_rows = result.num_rows_per_rank[self.rank]
            received = arrival.views(result.block, num_rows)
            if result.must_copy or rows.widen_to is not None:
                received = self._new_place(arrival, num_rows)
            planned = received, self._handle(result, routing)
            if announce is not None:
                announce(*planned)

        call = Call.of("dispatch", rows, routing)
        on_planned = None if announce is None else plan
        result = self._dispatch(call, arrival, routing.topk_idx, None, None, on_planned)
        if on_planned is None:
            plan(result)
        assert planned is not None
        if result.must_copy or rows.widen_to is not None:
            views = arrival.views(result.block, len(planned[0].x))
            self._settle(planned[0], views, rows.widen_to)
        return planned

    def _handle(self, result: _cpu.Dispatched, routing: Routing) -> DispatchHandle:
        num_tokens, num_topk = routing.topk_idx.shape
        alignment = routing.expert_alignment
        valid, topk_idx = tuple(result.valid_per_expert), result.topk_idx()
        return DispatchHandle(
            plan_id=self._num_calls,
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=routing.num_experts,
            expand=routing.expand,
            expert_alignment=alignment,
            routes=from_dlpack(result.routes()),
            num_rows_per_rank=tuple(result.num_rows_per_rank),
            num_tokens_per_rank=tuple(result.num_tokens_per_rank),
            num_recv_tokens_per_rank=tuple(result.num_recv_tokens_per_rank),
            num_recv_tokens_per_expert=(
                valid if alignment == 1 else tuple(-(-n // alignment) * alignment for n in valid)
            ),
            num_valid_tokens_per_expert=valid,
            topk_idx=None if topk_idx is None else from_dlpack(topk_idx),
        )

    def new_received(
        self, rows: Rows, handle: DispatchHandle, *, with_idx: bool = False
    ) -> Received:
        """See `Backend.new_received`; `with_idx`: for expert ids too, as by a first dispatch."""
        arrival, num_rows = arrival_along(rows, handle, with_idx), handle.num_recv_rows
        block = None
        if rows.widen_to is None:
            block = self._exchange.allocate(arrival.num_bytes(num_rows))
        if block is None:
            return Received(self._new_place(arrival, num_rows))
        return Received(arrival.views(block, num_rows), block)

    def dispatch_again(
        self,
        rows: Rows,
        handle: DispatchHandle,
        received: Received | None = None,
        *,
        with_idx: bool = False,
    ) -> Rows:
        """See `Backend.dispatch_again`; `with_idx`: expert ids arrive, as by a first dispatch."""
        rows = rows.contiguous()
        arrival, num_rows = arrival_along(rows, handle, with_idx), handle.num_recv_rows
        call = Call.of("cached dispatch", rows, handle)
        block = None if received is None else received.place
        result = self._dispatch(call, arrival, handle.topk_idx, handle, block)
        if received is not None and block is not None:
            return received.rows
        views = arrival.views(result.block, num_rows)
        if received is None and not result.must_copy and rows.widen_to is None:
            return views
        target = self._new_place(arrival, num_rows) if received is None else received.rows
        self._settle(target, views, rows.widen_to)
        return target

    def new_combined(self, rows: Rows, handle: AnyHandle) -> tuple[Tensor, Tensor | None]:
        """See `Backend.new_combined`."""
        out = self.new_rows(handle.num_tokens, rows.x)
        return out, rows.new_weights(handle.num_tokens, handle.num_topk)

    def combine(
        self,
        rows: Rows,
        handle: DispatchHandle,
        biases: Sequence[Tensor] = (),
        combined: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        rows = rows.contiguous()
        biases = [bias.contiguous() for bias in biases]
        x, weights = rows.x, rows.topk_weights
        out, out_weights = combined or self.new_combined(rows, handle)
        self._num_calls += 1
        is_agreed = self._exchange.combine(
            Call.of("combine", rows, handle),
            (handle.num_tokens, handle.num_topk, handle.expand, x.shape[0]),
            handle.num_rows_per_rank,
            SUM_DTYPES.index(x.dtype),
            x.shape[1],
            0 if weights is None else weights.element_size(),
            (
                handle.routes.data_ptr(),
                x.data_ptr(),
                _address(weights),
                _address(biases[0]) if len(biases) > 0 else 0,
                _address(biases[1]) if len(biases) > 1 else 0,
            ),
            out.data_ptr(),
            _address(out_weights),
        )
        if not is_agreed:
            self._raise_disagreement("combine")
        return out, out_weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        self._num_calls += 1
        self._exchange.report_failure(OPERATIONS.index(operation), error)

    def interrupt(self) -> None:
        """See `Backend.interrupt`. Within 50 ms; the Buffer is broken then, as after Ctrl-C."""
        self._exchange.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`."""
        self._exchange.limit_threads(num_threads)

    def close(self) -> None:
        """See `Backend.close`."""
        self._exchange.close()

    def statistics(self) -> BufferStatistics:
        """See `CountingBackend`."""
        counted = zip(OPERATIONS, self._exchange.statistics(), strict=True)
        return BufferStatistics.of(self.rank, dict(counted))

    @property
    def is_broken(self) -> bool:
        """Whether a call broke down: no other will go on."""
        return self._exchange.is_broken

    @property
    def num_bytes_committed(self) -> int:
        """Bytes of shared memory this rank has allocated."""
        return self._exchange.committed

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of it that tensors view, or that peers may still read."""
        return self._exchange.num_bytes_in_use

    def new_rows(self, num_rows: int, like: Tensor) -> Tensor:
        """Return uninitialised `[num_rows, H]`, in the arena where that is worth it."""
        num_bytes = num_rows * like.shape[1] * like.element_size()
        block = self._exchange.allocate(num_bytes) if num_bytes >= _MIN_ARENA_BYTES else None
        if block is None:
            return like.new_empty(num_rows, like.shape[1])
        return view(block, 0, like, num_rows, like.shape[1])

    def _dispatch(
        self,
        call: Call,
        arrival: Arrival,
        topk_idx: Tensor | None,
        handle: DispatchHandle | None,
        block: _cpu.Block | None,
        on_planned: Callable[[_cpu.Dispatched], None] | None = None,
    ) -> _cpu.Dispatched:
        rows = arrival.sent
        self._num_calls += 1
        result = self._exchange.dispatch(
            call,
            _address(topk_idx),
            0 if topk_idx is None else topk_idx.element_size(),
            (
                rows.x.shape[0],
                call.num_topk,
                call.num_experts,
                bool(call.expand),
                call.expert_alignment,
            ),
            (rows.x.data_ptr(), _address(rows.scales), _address(rows.topk_weights)),
            arrival.row_bytes(),
            0 if handle is None else handle.routes.data_ptr(),
            None if handle is None else handle.num_rows_per_rank,
            None if handle is None else handle.num_valid_tokens_per_expert,
            arrival.cast(),
            block,
            on_planned,
        )
        if not result.is_agreed:
            self._raise_disagreement(OPERATIONS[call.operation])
        return result

    def _settle(self, target: Rows, arrived: Rows, widen_to: torch.dtype | None) -> None:
        """Put what arrived in a block where it is asked for, widened or copied."""
        if widen_to is None:
            copy_rows(target, arrived)
            return
        scales = arrived.scales
        assert scales is not None  # checked with the arguments
        self._exchange.widen(
            casts.dtype_name(widen_to),
            casts.format_like("dispatch", arrived.x, scales),
            target.x.data_ptr(),
            arrived.x.data_ptr(),
            scales.data_ptr(),
            casts.scale_strides(scales),
            *arrived.x.shape,
        )
        copy_rows(replace(target, x=target.x[:0]), replace(arrived, x=arrived.x[:0]))

    def _new_place(self, arrival: Arrival, num_rows: int) -> Rows:
        """Return tensors outside of the block that rows arrive in, where they are asked for."""
        place = arrival.ordinary(num_rows)
        if arrival.sent.widen_to is None:
            return place
        # Once widened, the FP8 rows are of no more use: what came with them must not hold them.
        return replace(place, x=self.new_rows(num_rows, place.x[:0]))

    def _raise_disagreement(self, operation: str) -> None:
        reports = self._exchange.reports()
        lacking = [
            f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.is_out_of_memory
        ]
        if lacking:
            raise NoRoomError(
                f"{operation}: expected room for all rows, got {'; '.join(lacking)}; "
                "raise max_bytes or free shared memory"
            )
        check_agreement(operation, [PeerReport(r.call, r.error) for r in reports])
        raise RuntimeError(
            f"{operation}: expected all ranks to describe their call in the same way, got words "
            "that mean nothing here; do all ranks run the same version of ep_megatron?"
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run_together(meeting: Gathering, action: Callable[[], None]) -> None:
    """Run `action` on all ranks; raise on all if it fails on one."""
    error, reason = None, ""
    try:
        action()
    except (RuntimeError, OSError) as exception:
        error, reason = exception, str(exception)[:200]
    reasons = meeting.gather_text("Buffer", reason)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text]
    if failed:
        raise RuntimeError(
            f"Buffer: expected every rank to share its memory, got {'; '.join(failed)}; "
            "backend='process_group' works without shared memory"
        ) from error
