"""Dispatch and combine over torch.distributed: any device, any number of hosts; the reference.

A token travels once per destination rank. Expert-major rows are made, and summed, by the rank that
holds the experts. T tokens here, M received, N expert-major rows, K top-k, R ranks, H hidden.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.arguments import check_topk_range
from ep_megatron.backends.base import OPERATIONS, Announce, Call, Received, Routing, Rows
from ep_megatron.backends.casting import as_asked, cast_rows, copy_rows
from ep_megatron.backends.expert_major import (
    expand,
    is_summed,
    local_weights,
    place,
    sum_of,
    sum_slots,
    weights_of_tokens,
)
from ep_megatron.backends.meeting import (
    Meeting,
    check_process,
    check_working,
    describe_late,
    has_gloo,
    wait_for_each,
)
from ep_megatron.handle import AnyHandle, DispatchHandle
from ep_megatron.layout import (
    Counts,
    count_tokens,
    deduplicated_routes,
    expanded_routes,
    occurs_in_row,
    round_up,
)
from ep_megatron.statistics import BufferStatistics, CallCounts

_Result = TypeVar("_Result")
_ROWS_TAG = 1  # of the first tensor on the connections, the next ones count up; 0 is the meeting's


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
        self._group, self._timeout = group, timeout
        self._meeting = Meeting(group, timeout, is_private=True)
        # Rows to higher ranks go over one, to lower ranks over the other: gloo answers "ready to
        # receive" on the connection that carries rows, where it would queue behind them.
        self._down = Meeting(group, timeout, is_private=True) if has_gloo(group) else None
        self.rank, self.num_ranks = self._meeting.rank, self._meeting.num_ranks
        self._counts = CallCounts(self.rank, self.num_ranks)
        self._num_bytes = [0] * self.num_ranks, [0] * self.num_ranks  # sent, received
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
        counts = count_tokens(routing.topk_idx, routing.num_experts, self.num_ranks)
        own = torch.cat([counts.num_tokens_per_rank, counts.num_tokens_per_expert]).cpu()
        everyone = self._agree("dispatch", Call.of("dispatch", rows, routing), counts=own)
        assert everyone is not None
        with self._taking_part():
            everyone = everyone.to(routing.topk_idx.device)
            handle = self._handle(routing, counts, everyone)
            received = rows.new_received(handle)
            if not routing.expand:
                assert handle.recv_row is not None
                recv_idx = routing.topk_idx.new_empty(handle.recv_row.shape)
                received = replace(received, topk_idx=recv_idx)
            if announce is not None:
                announce(received, handle)
            self._deliver(rows, handle, received, (routing, everyone))
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
        self._meeting.interrupt()
        if self._down is not None:
            self._down.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`. The threads are torch's, which are not this room's."""

    def close(self) -> None:
        """See `Backend.close`. The connections end with the object."""
        self._broken = self._broken or "it was destroyed"

    def statistics(self) -> BufferStatistics:
        """See `CountingBackend`."""
        return BufferStatistics(self.rank, self._counts.operations(OPERATIONS))

    def _count(self, operation: str) -> None:
        moved = self._num_bytes[operation == "combine"]
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

    def _agree(
        self, operation: str, call: Call | None, error: str = "", counts: Tensor | None = None
    ) -> Tensor | None:
        check_working(operation, self._broken)
        check_process(operation, self._process)
        self._num_calls += 1
        self._num_bytes = [0] * self.num_ranks, [0] * self.num_ranks
        return self._waiting(lambda: self._meeting.agree(operation, call, error, counts))

    def _waiting(self, wait: Callable[[], _Result]) -> _Result:
        """Return `wait()`; if a rank did not come, no later call of this Buffer waits for it."""
        try:
            return wait()
        except ValueError:
            raise
        except BaseException as error:
            self._broken = self._broken or str(error).split(";")[0][:200] or type(error).__name__
            raise

    def _handle(self, routing: Routing, counts: Counts, everyone: Tensor) -> DispatchHandle:
        """Return the handle, with `recv_row` still empty. `everyone`: `[R, R + E]`, all counts."""
        topk_idx, alignment = routing.topk_idx, routing.expert_alignment
        matrix, per_expert = everyone[:, : self.num_ranks], everyone[:, self.num_ranks :]
        blocks = round_up(per_expert.sum(0), alignment).view(self.num_ranks, -1)
        if routing.expand:
            routes = expanded_routes(topk_idx, self.rank, per_expert, alignment)
            num_rows = blocks.sum(1)
        else:
            routes = deduplicated_routes(topk_idx, self.rank, counts, matrix)
            num_rows = matrix.sum(0)
        valid = per_expert.sum(0).view(self.num_ranks, -1)[self.rank]
        num_recv_tokens = tuple(matrix[:, self.rank].tolist())
        return DispatchHandle(
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
            num_recv_tokens_per_rank=num_recv_tokens,
            num_recv_tokens_per_expert=tuple(blocks[self.rank].tolist()),
            num_valid_tokens_per_expert=tuple(valid.tolist()),
            topk_idx=None if routing.expand else topk_idx.clone(),
            recv_row=topk_idx.new_empty(sum(num_recv_tokens), topk_idx.shape[1], dtype=torch.int64),
        )

    # -- moving -----------------------------------------------------------------------------------

    def _send_order(self, handle: DispatchHandle) -> Tensor:
        """Tokens in the order they leave: by destination rank, then token."""
        return occurs_in_row(handle.route_rank, handle.num_ranks).T.nonzero()[:, 1]

    def _send(self, values: Sequence[Tensor], handle: DispatchHandle) -> list[Tensor]:
        """Send each `[T, ...]` to every destination rank of its token; return `[M, ...]`."""
        order = self._send_order(handle)
        return self._all_to_all(
            [value[order] for value in values],
            handle.num_tokens_per_rank,
            handle.num_recv_tokens_per_rank,
        )

    def _send_back(self, values: Sequence[Tensor], handle: DispatchHandle) -> list[Tensor]:
        """Return each `[M, ...]` to their sources, in the order in which they had left."""
        return self._all_to_all(values, handle.num_recv_tokens_per_rank, handle.num_tokens_per_rank)

    def _all_to_all(
        self,
        values: Sequence[Tensor],
        send_counts: tuple[int, ...],
        recv_counts: tuple[int, ...],
    ) -> list[Tensor]:
        """Send each tensor's rows; all are under way at once."""
        received = [value.new_empty(sum(recv_counts), *value.shape[1:]) for value in values]
        deadline = time.monotonic() + self._timeout
        late: dict[int, str] = {}
        works: list[tuple[int, Any]] = []
        for tag, (value, to) in enumerate(zip(values, received, strict=True), _ROWS_TAG):
            # Without elements any strides count as contiguous, but not every view is allowed.
            dense = value.contiguous() if value.numel() else value.new_empty(value.shape)
            # As bytes: no backend of torch.distributed sends every dtype (gloo sends no float8).
            out, sent = (tensor.flatten(1).view(torch.uint8) for tensor in (to, dense))
            for moved, counts in zip(self._num_bytes, (send_counts, recv_counts), strict=True):
                moved[:] = [n + out.shape[1] * m for n, m in zip(moved, counts, strict=True)]
            if self._down is not None and value.device.type == "cpu":
                parts = out.split(recv_counts), sent.split(send_counts)
                works += self._post(*parts, tag, late)
            else:
                self._over_group(out, sent, (list(recv_counts), list(send_counts)))
        if works:
            self._meeting.wait(lambda: wait_for_each(works, late, deadline), self.interrupt)
        if late:
            raise self._no_rows(f"none from {describe_late(late, self._meeting.last_call)}")
        return received

    def _over_group(self, to: Tensor, sent: Tensor, counts: tuple[list[int], list[int]]) -> None:
        """Move rows over the caller's group, which does not say whose are missing."""
        try:
            work = self._group.alltoall_base(to, sent, *counts, dist.AllToAllOptions())
            work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise self._no_rows(str(error).splitlines()[0]) from error

    def _no_rows(self, actual: str) -> RuntimeError:
        self._broken = "its rows did not come"
        return RuntimeError(
            f"process_group: rank {self.rank} expected its rows of call {self._num_calls} within "
            f"{self._timeout:g} s, got {actual}; a rank stopped between the count exchange and "
            "the rows. This Buffer and its process group cannot go on"
        )

    def _post(
        self, receives: Sequence[Tensor], sends: Sequence[Tensor], tag: int, late: dict[int, str]
    ) -> list[tuple[int, Any]]:
        """Start to move each rank's part, every receive before a send; return what to wait for.

        Ranks whose connection is gone already are noted in `late`.
        """
        assert self._down is not None
        up, down = self._meeting.gloo, self._down.gloo
        works: list[tuple[int, Any]] = []
        receives[self.rank].copy_(sends[self.rank])
        for is_receive, parts in ((True, receives), (False, sends)):
            for peer, part in enumerate(parts):
                if peer == self.rank or len(part) == 0:
                    continue
                group = up if (peer > self.rank) != is_receive else down
                post = group.recv if is_receive else group.send
                try:
                    works.append((peer, post([part], peer, tag)))
                except RuntimeError as error:
                    late[peer] = str(error)
        return works

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
        total = sum_of(biases, handle.num_tokens, x, sum_dtype)
        weights = rows.topk_weights
        beside = () if weights is None else (weights_of_tokens(weights, handle),)
        returned, *returned_weights = self._send_back(
            (sum_slots(x, handle, sum_dtype), *beside), handle
        )
        for tokens, part in self._by_rank(returned, handle):
            total[tokens] += part.to(sum_dtype)
        has_rows = handle.route_rank[:, :1] >= 0
        if not biases:
            total = total.masked_fill(~has_rows, 0)
        out.copy_(total)
        for part in returned_weights:
            assert out_weights is not None
            out_weights.copy_(self._combine_weights(part, handle))

    def _deliver(
        self,
        rows: Rows,
        handle: DispatchHandle,
        received: Rows,
        fresh: tuple[Routing, Tensor] | None = None,
    ) -> None:
        """Send all that `rows` has into `received`; with `fresh`, routing and counts, ids too."""
        cast, weights = cast_rows(rows), rows.topk_weights
        parts = [] if fresh is None else [fresh[0].topk_idx]
        parts += [part for part in (weights, cast.x, cast.scales) if part is not None]
        arrived = self._send(parts, handle)
        if fresh is not None:
            place(arrived.pop(0), handle, received, fresh[1])
        if weights is not None:
            assert received.topk_weights is not None
            received.topk_weights.copy_(local_weights(arrived.pop(0), handle))
        x = expand(arrived.pop(0), handle)
        scales = expand(arrived.pop(0), handle) if arrived else None
        copy_rows(received, as_asked(Rows(x, scales), rows))

    def _combine_weights(self, returned: Tensor, handle: DispatchHandle) -> Tensor:
        total = returned.new_full((handle.num_tokens, handle.num_topk), -0.0)
        for tokens, part in self._by_rank(returned, handle):
            total[tokens] += part
        return total.masked_fill(~is_summed(handle), 0)
