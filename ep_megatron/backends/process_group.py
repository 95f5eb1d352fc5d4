"""Dispatch and combine over torch.distributed: any device, any number of hosts; the reference.

A token travels once per destination rank. Expert-major rows are made, and summed, by the rank that
holds the experts. T tokens here, M received, N expert-major rows, K top-k, R ranks, H hidden.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.arguments import check_topk_range
from ep_megatron.backends.base import OPERATIONS, Announce, Call, Received, Routing, Rows
from ep_megatron.backends.casting import as_asked, cast_rows, copy_rows
from ep_megatron.backends.meeting import Meeting, check_process
from ep_megatron.backends.row_connections import RowConnections
from ep_megatron.handle import AnyHandle, DispatchHandle
from ep_megatron.layout import (
    count_tokens,
    deduplicated_routes,
    expanded_routes,
    expert_starts,
    index_within,
    occurs_in_row,
    round_up,
)
from ep_megatron.statistics import BufferStatistics, CallCounts

_Result = TypeVar("_Result")


class ProcessGroupBackend:
    """See `Backend`. Collective constructor.

    Rows on a CPU, and counts, travel over connections of its own, so that calls on another thread
    do not mingle with the caller's use of `group`; rows on another device over the group.

    Args:
        group: the ranks.
        timeout: seconds to wait for the others in one call.
    """

    name = "process_group"

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self._meeting = Meeting(group, timeout, is_private=True)
        self._rows = RowConnections(group, self._meeting)
        self.rank, self.num_ranks = self._meeting.rank, self._meeting.num_ranks
        self._counts = CallCounts(self.rank, self.num_ranks)
        self._num_calls = 0
        self._broken, self._process = "", os.getpid()

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        rows, routing = rows.contiguous(), routing.contiguous()
        try:
            check_topk_range("dispatch", routing.topk_idx, routing.num_experts)
        except ValueError as error:
            self.fail("dispatch", str(error).removeprefix("dispatch: "))
            raise
        self._agree("dispatch", Call.of("dispatch", rows, routing))
        with self._taking_part():
            handle, received = self._plan(rows, routing)
            if announce is not None:
                announce(received, handle)
            self._deliver(rows, handle, received)
        self._count("dispatch")
        return received, handle

    def new_received(self, rows: Rows, handle: DispatchHandle) -> Received:
        """See `Backend.new_received`."""
        return Received(rows.new_received(handle))

    def dispatch_again(
        self, rows: Rows, handle: DispatchHandle, received: Received | None = None
    ) -> Rows:
        """See `Backend.dispatch_again`."""
        rows = rows.contiguous()
        received = received or self.new_received(rows, handle)
        self._agree("cached dispatch", Call.of("cached dispatch", rows, handle))
        with self._taking_part():
            if rows.topk_weights is not None:
                assert received.rows.topk_weights is not None
                weights = self._send(rows.topk_weights, handle)
                received.rows.topk_weights.copy_(self._local_weights(weights, handle))
            self._deliver(rows, handle, received.rows)
        self._count("cached dispatch")
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
        out, out_weights = combined or self.new_combined(rows, handle)
        self._agree("combine", Call.of("combine", rows, handle))
        with self._taking_part():
            self._sum(rows, handle, biases, (out, out_weights))
        self._count("combine")
        return out, out_weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        try:
            self._agree(operation, None, error)
        except ValueError:
            return  # the others' copy of the error this rank is about to raise
        raise AssertionError("a reported error was not returned")

    def interrupt(self) -> None:
        """See `Backend.interrupt`. Waits of rows on a GPU end at their deadline."""
        self._broken = self._broken or "a call was interrupted"
        self._rows.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`. The threads are torch's, which are not this room's."""

    def close(self) -> None:
        """See `Backend.close`. The connections end with the object."""
        self._broken = self._broken or "it was destroyed"

    def statistics(self) -> BufferStatistics:
        """See `CountingBackend`."""
        return BufferStatistics(self.rank, self._counts.operations(OPERATIONS))

    def _count(self, operation: str) -> None:
        moved = self._rows.num_bytes[operation == "combine"]
        self._counts.add(operation, self._meeting.posted_at, moved)

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        """End the group where this rank alone fails: the others count on what it would send."""
        try:
            yield
        except BaseException as error:
            if not self._broken:
                self._broken = f"rank {self.rank} failed in a call: {error or type(error).__name__}"
                self.interrupt()
            raise

    # -- planning ---------------------------------------------------------------------------------

    def _agree(self, operation: str, call: Call | None, error: str = "") -> None:
        if self._broken:
            raise RuntimeError(
                f"{operation}: expected a working Buffer, got one that broke down "
                f"({self._broken}); make a new Buffer"
            )
        check_process(operation, self._process)
        self._num_calls += 1
        self._rows.start_counting()
        self._waiting(lambda: self._meeting.agree(operation, call, error))

    def _waiting(self, wait: Callable[[], _Result]) -> _Result:
        """Return `wait()`; if a rank did not come, no later call of this Buffer waits for it."""
        try:
            return wait()
        except ValueError:
            raise
        except BaseException as error:
            self._broken = self._broken or str(error).split(";")[0][:200] or type(error).__name__
            raise

    def _plan(self, rows: Rows, routing: Routing) -> tuple[DispatchHandle, Rows]:
        """Exchange counts, then the routing itself; both are needed before expert-major rows."""
        topk_idx, alignment = routing.topk_idx, routing.expert_alignment
        counts = count_tokens(topk_idx, routing.num_experts, self.num_ranks)
        own = torch.cat([counts.num_tokens_per_rank, counts.num_tokens_per_expert]).cpu()
        everyone = self._waiting(lambda: self._meeting.exchange("dispatch", own))
        everyone = everyone.to(topk_idx.device)
        matrix, per_expert = everyone[:, : self.num_ranks], everyone[:, self.num_ranks :]
        blocks = round_up(per_expert.sum(0), alignment).view(self.num_ranks, -1)
        if routing.expand:
            routes = expanded_routes(topk_idx, self.rank, per_expert, alignment)
            num_rows = blocks.sum(1)
        else:
            routes = deduplicated_routes(topk_idx, self.rank, counts, matrix)
            num_rows = matrix.sum(0)
        valid = per_expert.sum(0).view(self.num_ranks, -1)[self.rank]
        plain = DispatchHandle(
            plan_id=self._num_calls,
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_tokens=len(topk_idx),
            num_topk=topk_idx.shape[1],
            num_experts=routing.num_experts,
            expand=routing.expand,
            expert_alignment=alignment,
            routes=torch.stack(routes),
            num_rows_per_rank=tuple(num_rows.tolist()),
            num_tokens_per_rank=tuple(matrix[self.rank].tolist()),
            num_recv_tokens_per_rank=tuple(matrix[:, self.rank].tolist()),
            num_recv_tokens_per_expert=tuple(blocks[self.rank].tolist()),
            num_valid_tokens_per_expert=tuple(valid.tolist()),
        )
        recv_idx = self._send(topk_idx, plain)
        first = self.rank * plain.num_local_experts
        is_local = (recv_idx >= first) & (recv_idx < first + plain.num_local_experts)
        local_idx = (recv_idx - first).masked_fill(~is_local, -1)
        starts = expert_starts(per_expert, self.num_ranks, alignment)[first:]
        flat = local_idx.reshape(-1).to(torch.int64)
        within = index_within(flat, plain.num_local_experts)
        recv_row = (starts[flat.clamp(min=0)] + within).masked_fill(flat < 0, -1)
        handle = replace(
            plain,
            recv_row=recv_row.view(local_idx.shape),
            topk_idx=None if routing.expand else topk_idx.clone(),
        )
        weights = rows.topk_weights
        if weights is not None:
            weights = self._local_weights(self._send(weights, handle), handle)
        received = Rows(*rows.new_arrived(handle.num_recv_rows), weights)
        return handle, received if routing.expand else replace(received, topk_idx=local_idx)

    @staticmethod
    def _local_weights(weights: Tensor, handle: DispatchHandle) -> Tensor:
        """Return `[M, K]` with 0 where an expert is elsewhere; expert-major `[N]`."""
        assert handle.recv_row is not None
        is_local = handle.recv_row >= 0
        if not handle.expand:
            return weights.masked_fill(~is_local, 0)
        expanded = weights.new_zeros(handle.num_recv_rows)
        expanded[handle.recv_row[is_local]] = weights[is_local]
        return expanded

    # -- moving -----------------------------------------------------------------------------------

    def _send_order(self, handle: DispatchHandle) -> Tensor:
        """Tokens in the order they leave: by destination rank, then token."""
        return occurs_in_row(handle.route_rank, handle.num_ranks).T.nonzero()[:, 1]

    def _send(self, values: Tensor, handle: DispatchHandle) -> Tensor:
        """Send `values [T, ...]` to every destination rank of its token; return `[M, ...]`."""
        return self._all_to_all(
            values[self._send_order(handle)],
            handle.num_tokens_per_rank,
            handle.num_recv_tokens_per_rank,
        )

    def _send_back(self, values: Tensor, handle: DispatchHandle) -> Tensor:
        """Return `values [M, ...]` to their sources, in the order in which they had left."""
        return self._all_to_all(values, handle.num_recv_tokens_per_rank, handle.num_tokens_per_rank)

    def _all_to_all(
        self, values: Tensor, send_counts: tuple[int, ...], recv_counts: tuple[int, ...]
    ) -> Tensor:
        return self._waiting(lambda: self._rows.exchange(values, send_counts, recv_counts))

    def _by_rank(self, returned: Tensor, handle: DispatchHandle) -> list[tuple[Tensor, Tensor]]:
        """Split what came back into (tokens, rows) of each rank, in ascending rank order."""
        counts = list(handle.num_tokens_per_rank)
        tokens = self._send_order(handle).split(counts)
        return list(zip(tokens, returned.split(counts), strict=True))

    def _sum(
        self,
        rows: Rows,
        handle: DispatchHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None],
    ) -> None:
        out, out_weights = combined
        x = rows.x
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = _sum_of(biases, handle.num_tokens, x, sum_dtype)
        returned = self._send_back(self._reduce_rows(x, handle, sum_dtype), handle)
        for tokens, part in self._by_rank(returned, handle):
            total[tokens] += part.to(sum_dtype)
        has_rows = handle.route_rank[:, :1] >= 0
        if not biases:
            total = total.masked_fill(~has_rows, 0)
        out.copy_(total)
        if rows.topk_weights is not None:
            assert out_weights is not None
            out_weights.copy_(self._combine_weights(rows.topk_weights, handle))

    # -- expert-major rows ------------------------------------------------------------------------

    def _deliver(self, rows: Rows, handle: DispatchHandle, received: Rows) -> None:
        """Send `x` and scales into `received`."""
        cast = cast_rows(rows)
        x = self._expanded(self._send(cast.x, handle), handle)
        scales = None
        if cast.scales is not None:
            scales = self._expanded(self._send(cast.scales, handle), handle)
        copy_rows(received, as_asked(Rows(x, scales), rows))

    @staticmethod
    def _expanded(values: Tensor, handle: DispatchHandle) -> Tensor:
        """Return `[N, ...]` expert-major, padded with zeros, where the handle asks for it."""
        if not handle.expand:
            return values
        assert handle.recv_row is not None
        source, slot = (handle.recv_row >= 0).nonzero(as_tuple=True)
        out = values.new_zeros(handle.num_recv_rows, *values.shape[1:])
        out.view(torch.uint8)[handle.recv_row[source, slot]] = values.view(torch.uint8)[source]
        return out

    @staticmethod
    def _reduce_rows(x: Tensor, handle: DispatchHandle, sum_dtype: torch.dtype) -> Tensor:
        """Sum the expert-major rows of each received token, in slot order."""
        if not handle.expand:
            return x
        assert handle.recv_row is not None
        # Adding to -0.0 leaves every first addend as it is, -0.0 included.
        partial = x.new_full((len(handle.recv_row), x.shape[1]), -0.0, dtype=sum_dtype)
        for row in handle.recv_row.unbind(1):
            is_used = row >= 0
            partial[is_used] += x[row[is_used]].to(sum_dtype)
        return partial

    def _combine_weights(self, weights: Tensor, handle: DispatchHandle) -> Tensor:
        if handle.expand:
            assert handle.recv_row is not None
            is_used = handle.recv_row >= 0
            rows = weights.new_full(handle.recv_row.shape, -0.0)
            rows[is_used] = weights[handle.recv_row[is_used]]
        else:
            rows = weights
        returned = self._send_back(rows, handle)
        total = weights.new_full((handle.num_tokens, handle.num_topk), -0.0)
        for tokens, part in self._by_rank(returned, handle):
            total[tokens] += part
        return total.masked_fill(~_is_summed(handle), 0)


def _is_summed(handle: DispatchHandle) -> Tensor:
    """Return `[T, K]`: which combined weights have an addend at all."""
    if not handle.expand:
        return (handle.route_rank[:, :1] >= 0).expand(-1, handle.num_topk)
    return occurs_in_row(handle.route_slot, handle.num_topk)


def _sum_of(biases: Sequence[Tensor], num_tokens: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    total = x.new_full((num_tokens, x.shape[1]), -0.0, dtype=dtype)
    for bias in biases:
        total += bias.to(dtype)
    return total
