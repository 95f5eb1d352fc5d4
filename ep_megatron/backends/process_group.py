"""Dispatch and combine over torch.distributed: any device, any number of hosts; the reference.

A token travels once per destination rank. Expert-major rows are made, and summed, by the rank that
holds the experts. T tokens here, M received, N expert-major rows, K top-k, R ranks, H hidden.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.arguments import check_topk_range
from ep_megatron.backends.base import Call, Routing, Rows
from ep_megatron.backends.casting import as_asked, cast_rows
from ep_megatron.backends.meeting import Meeting
from ep_megatron.handle import DispatchHandle
from ep_megatron.layout import (
    count_tokens,
    deduplicated_routes,
    expanded_routes,
    expert_starts,
    index_within,
    occurs_in_row,
    round_up,
)


class ProcessGroupBackend:
    """See `Backend`. Collective constructor.

    Args:
        group: the ranks; rows travel over its backend for their device.
        timeout: seconds to wait for the others in one call.
    """

    name = "process_group"

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self._group, self._timeout = group, timeout
        self._meeting = Meeting(group, timeout)
        self.rank, self.num_ranks = self._meeting.rank, self._meeting.num_ranks
        self._num_calls = 0

    def dispatch(self, rows: Rows, routing: Routing) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        try:
            check_topk_range("dispatch", routing.topk_idx, routing.num_experts)
        except ValueError as error:
            self.fail("dispatch", str(error).removeprefix("dispatch: "))
            raise
        self._agree("dispatch", Call.of("dispatch", rows, routing))
        handle, local_idx, weights = self._plan(rows, routing)
        return self._deliver(rows, handle, local_idx, weights), handle

    def dispatch_again(self, rows: Rows, handle: DispatchHandle) -> Rows:
        """See `Backend.dispatch_again`."""
        self._agree("cached dispatch", Call.of("cached dispatch", rows, handle))
        weights = None
        if rows.topk_weights is not None:
            is_local = self._is_local(handle)
            weights = self._send(rows.topk_weights, handle).masked_fill(~is_local, 0)
        return self._deliver(rows, handle, None, weights)

    def combine(
        self, rows: Rows, handle: DispatchHandle, biases: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        self._agree("combine", Call.of("combine", rows, handle))
        x = rows.x
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = _sum_of(biases, handle.num_tokens, x, sum_dtype)
        returned = self._send_back(self._reduce_rows(x, handle, sum_dtype), handle)
        for tokens, part in self._by_rank(returned, handle):
            total[tokens] += part.to(sum_dtype)
        has_rows = handle.route_rank[:, :1] >= 0
        if not biases:
            total = total.masked_fill(~has_rows, 0)
        weights = None
        if rows.topk_weights is not None:
            weights = self._combine_weights(rows.topk_weights, handle)
        return total.to(x.dtype), weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        try:
            self._agree(operation, None, error)
        except ValueError:
            return  # the others' copy of the error this rank is about to raise
        raise AssertionError("a reported error was not returned")

    def close(self) -> None:
        """Nothing to free: the group belongs to the caller."""

    # -- planning ---------------------------------------------------------------------------------

    def _agree(self, operation: str, call: Call | None, error: str = "") -> None:
        self._num_calls += 1
        self._meeting.agree(operation, call, error)

    def _plan(
        self, rows: Rows, routing: Routing
    ) -> tuple[DispatchHandle, Tensor | None, Tensor | None]:
        """Exchange counts, then the routing itself; both are needed before expert-major rows."""
        topk_idx, alignment = routing.topk_idx, routing.expert_alignment
        counts = count_tokens(topk_idx, routing.num_experts, self.num_ranks)
        everyone = self._meeting.exchange(
            "dispatch",
            torch.cat([counts.num_tokens_per_rank, counts.num_tokens_per_expert]).cpu(),
        ).to(topk_idx.device)
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
        weights = None
        if rows.topk_weights is not None:
            weights = self._send(rows.topk_weights, plain).masked_fill(~is_local, 0)
        starts = expert_starts(per_expert, self.num_ranks, alignment)[first:]
        flat = local_idx.reshape(-1).to(torch.int64)
        within = index_within(flat, plain.num_local_experts)
        recv_row = (starts[flat.clamp(min=0)] + within).masked_fill(flat < 0, -1)
        handle = replace(
            plain,
            recv_row=recv_row.view(local_idx.shape),
            topk_idx=None if routing.expand else topk_idx.clone(),
        )
        return handle, local_idx, weights

    @staticmethod
    def _is_local(handle: DispatchHandle) -> Tensor:
        assert handle.recv_row is not None
        return handle.recv_row >= 0

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
        received = values.new_empty(sum(recv_counts), *values.shape[1:])
        # As bytes: no backend of torch.distributed sends every dtype (gloo sends no float8).
        work = dist.all_to_all_single(
            received.flatten(1).view(torch.uint8),
            values.contiguous().flatten(1).view(torch.uint8),
            list(recv_counts),
            list(send_counts),
            group=self._group,
            async_op=True,
        )
        try:
            work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise RuntimeError(
                f"process_group: rank {self.rank} expected its rows within {self._timeout:g} s, "
                f"got {str(error).splitlines()[0]}; a rank stopped between the count exchange and "
                "the rows. This Buffer and its process group cannot go on"
            ) from error
        return received

    def _by_rank(self, returned: Tensor, handle: DispatchHandle) -> list[tuple[Tensor, Tensor]]:
        """Split what came back into (tokens, rows) of each rank, in ascending rank order."""
        counts = list(handle.num_tokens_per_rank)
        tokens = self._send_order(handle).split(counts)
        return list(zip(tokens, returned.split(counts), strict=True))

    # -- expert-major rows ------------------------------------------------------------------------

    def _deliver(
        self, rows: Rows, handle: DispatchHandle, local_idx: Tensor | None, weights: Tensor | None
    ) -> Rows:
        cast = cast_rows(rows)
        x = self._send(cast.x, handle)
        scales = None if cast.scales is None else self._send(cast.scales, handle)
        if not handle.expand:
            return as_asked(Rows(x, scales, weights, local_idx), rows)
        assert handle.recv_row is not None
        source, slot = (handle.recv_row >= 0).nonzero(as_tuple=True)
        target = handle.recv_row[source, slot]

        def expand(values: Tensor) -> Tensor:
            out = values.new_zeros(handle.num_recv_rows, *values.shape[1:])
            out.view(torch.uint8)[target] = values.view(torch.uint8)[source]
            return out

        expanded_weights = None
        if weights is not None:
            expanded_weights = weights.new_zeros(handle.num_recv_rows)
            expanded_weights[target] = weights[source, slot]
        scales = None if scales is None else expand(scales)
        return as_asked(Rows(expand(x), scales, expanded_weights), rows)

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
