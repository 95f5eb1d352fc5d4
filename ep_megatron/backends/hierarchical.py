"""Dispatch and combine between CPU ranks of several hosts: one copy of a token per host.

A token crosses the network once for each host that has one of its experts, to the rank of the same
index there, its gateway. The gateway puts it at its final addresses by a shared-memory dispatch
(`host_plan` says how it knows them), so rows arrive as over any other backend, bit for bit. Combine
goes the same way back: each host sums a token's rows in shared memory, the gateway returns one row,
and the token's rank adds the hosts' sums.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor

from ep_megatron.arguments import check_topk_range
from ep_megatron.backends.arrival import arrival_along
from ep_megatron.backends.base import Announce, Call, NoRoomError, Received, Routing, Rows
from ep_megatron.backends.casting import as_asked, cast_rows, copy_rows
from ep_megatron.backends.host_counts import counts_of, tellings
from ep_megatron.backends.host_plan import WIRE_IDX_DTYPE, HostPlan, add_parts, sum_weights
from ep_megatron.backends.meeting import (
    Gathering,
    PartOfMeeting,
    check_process,
    check_working,
    keep_numbers,
    renumbered,
)
from ep_megatron.backends.shared_memory import SharedMemoryBackend
from ep_megatron.backends.wire import LateError, Message, Status, Transfer, Wire
from ep_megatron.config import BufferConfig
from ep_megatron.handle import AnyHandle, DispatchHandle, HostHop
from ep_megatron.hosts import Hosts
from ep_megatron.statistics import BufferStatistics


class HierarchicalBackend:
    """See `Backend`. Collective constructor.

    Args:
        meeting: of the CPU ranks; used by the constructor alone.
        config: limits; see `BufferConfig`.
        host_ids: one per rank, equal where ranks share memory.

    Raises:
        RuntimeError: on every rank, if one cannot make its segment.
    """

    name = "hierarchical"

    def __init__(self, meeting: Gathering, config: BufferConfig, host_ids: Sequence[str]) -> None:
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self.hosts = Hosts.from_ids(host_ids)
        self._host = self.hosts.host_of[self.rank]
        self._is_wire_exact = config.float32_between_hosts
        self._num_calls, self._broken, self._process = 0, "", os.getpid()
        self._inside = SharedMemoryBackend(
            PartOfMeeting(meeting, self.hosts.members[self._host]), config
        )
        self._wire = Wire(meeting, config.timeout)

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        operation, rows, routing = "dispatch", rows.contiguous(), routing.contiguous()
        try:
            check_topk_range(operation, routing.topk_idx, routing.num_experts)
        except ValueError as error:
            self.fail(operation, str(error).removeprefix("dispatch: "))
            raise
        plan = HostPlan(self.hosts, self.rank, routing)
        told = self._agree(operation, Call.of(operation, rows, routing), tellings(plan))
        assert told is not None
        with self._taking_part():
            with self._telling_host(operation):
                counts = counts_of(operation, plan, told, self._wire)
            handle = plan.handle(self._num_calls, counts)
            hop, place = plan.hop(handle, counts), None
            handle = replace(handle, hop=hop)
            if announce is not None:
                place = self._place(rows, hop, with_idx=True)
                announce(place.rows, handle)
            inner_rows, forwarded_idx = self._cross(operation, cast_rows(rows), hop, plan)
            forwarded_idx = [idx.to(routing.topk_idx.dtype) for idx in forwarded_idx]
            plan.settle(hop, counts, forwarded_idx)
            received = self._spread(operation, rows, inner_rows, hop, place, with_idx=True)
        self._wire.count(operation)
        return received, handle

    def new_received(self, rows: Rows, handle: DispatchHandle) -> Received:
        """See `Backend.new_received`."""
        if not isinstance(
            handle.hop, HostHop
        ):  # of another backend: the call will say so, on every rank
            return Received(Rows(*rows.new_arrived(handle.num_recv_rows)))
        return self._place(rows, handle.hop, with_idx=False)

    def dispatch_again(
        self, rows: Rows, handle: DispatchHandle, received: Received | None = None
    ) -> Rows:
        """See `Backend.dispatch_again`."""
        operation, rows = "cached dispatch", rows.contiguous()
        hop = self._hop_of(operation, handle)
        self._agree(operation, Call.of(operation, rows, handle))
        with self._taking_part():
            inner_rows, _ = self._cross(operation, cast_rows(rows), hop)
            arrived = self._spread(operation, rows, inner_rows, hop, received, with_idx=False)
        self._wire.count(operation)
        return arrived

    def new_combined(self, rows: Rows, handle: AnyHandle) -> tuple[Tensor, Tensor | None]:
        """See `Backend.new_combined`."""
        return self._inside.new_combined(rows, handle)

    def combine(
        self,
        rows: Rows,
        handle: DispatchHandle,
        biases: Sequence[Tensor] = (),
        combined: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`; a host's ranks are summed first, then host after host.

        A host's sum is rounded to the dtype of the rows, or with `float32_between_hosts` not at
        all, on every host alike: the result does not depend on where a token comes from.
        """
        hop, dtype = self._hop_of("combine", handle), rows.x.dtype
        out, out_weights = combined or self.new_combined(rows, handle)
        rows, biases = rows.contiguous(), [bias.contiguous() for bias in biases]
        self._agree("combine", Call.of("combine", rows, handle))
        with self._taking_part():
            if self._is_wire_exact and dtype in (torch.bfloat16, torch.float16):
                rows = replace(rows, x=rows.x.float())
                biases = [bias.float() for bias in biases]
            sums, weights = self._return(rows, hop, handle)
            like = rows.x
            total = out if like.dtype == dtype else self._inside.new_rows(handle.num_tokens, like)
            add_parts(sums, hop, biases, total)
            if total is not out:
                out.copy_(total)
            if weights is not None and out_weights is not None:
                out_weights.copy_(sum_weights(weights, hop, handle))
        self._wire.count("combine")
        return out, out_weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        try:
            self._agree(operation, None, error=error)
        except ValueError:
            return  # the others' copy of the error this rank is about to raise
        raise AssertionError("a reported error was not returned")

    def interrupt(self) -> None:
        """See `Backend.interrupt`."""
        self._broken = self._broken or "a call was interrupted"
        self._inside.interrupt()
        self._wire.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`."""
        self._inside.limit_threads(num_threads)

    def close(self) -> None:
        """See `Backend.close`."""
        self._broken = self._broken or "it was destroyed"
        self._inside.close()
        self._wire.close()

    def statistics(self) -> BufferStatistics:
        """See `CountingBackend`; bytes are those that cross hosts."""
        return self._wire.statistics()

    # -- between hosts ----------------------------------------------------------------------------

    def _cross(
        self, operation: str, rows: Rows, hop: HostHop, plan: HostPlan | None = None
    ) -> tuple[Rows, list[Tensor]]:
        """Send rows to their gateways; return own and forwarded rows, in one.

        With `plan` the tokens' expert ids travel too: `[n, K]` of each rank forwarded for.
        """
        x, num_own = rows.x, len(rows.x)
        num_rows = num_own + sum(n for _, n in hop.num_forwarded)
        inner_x = x.new_empty(num_rows, x.shape[1])
        # What is small lies side by side: one message.
        num_topk = plan.routing.topk_idx.shape[1] if plan else 0
        parts = [torch.empty(0, num_topk, dtype=WIRE_IDX_DTYPE)] if plan else []
        parts += [p for p in (rows.topk_weights, rows.scales) if p is not None]
        widths = [part.shape[1] * part.element_size() for part in parts]
        beside = torch.empty(num_rows - num_own, sum(widths), dtype=torch.uint8)
        receives, first = [], 0
        for source, count in hop.num_forwarded:
            if count == 0:
                continue
            place = slice(num_own + first, num_own + first + count)
            receives.append(Transfer(source, Message.ROWS, inner_x[place]))
            if widths:
                receives.append(Transfer(source, Message.BESIDE, beside[first : first + count]))
            first += count

        def sends() -> Iterator[Transfer]:
            for host, tokens in enumerate(hop.tokens_per_host):
                if host == self._host or len(tokens) == 0:
                    continue
                gateway = self.hosts.gateway(self.rank, host)
                yield Transfer(gateway, Message.ROWS, x.view(torch.uint8)[tokens])
                small = [] if plan is None else [plan.inner_idx(host, WIRE_IDX_DTYPE)]
                small += [p[tokens] for p in (rows.topk_weights, rows.scales) if p is not None]
                if small:
                    joined = torch.cat([part.view(torch.uint8) for part in small], 1)
                    yield Transfer(gateway, Message.BESIDE, joined)

        def keep_own() -> None:
            inner_x[:num_own] = x

        with self._telling_host(operation):
            self._wire.exchange(operation, receives, sends(), meanwhile=keep_own)
        came = beside.split(widths, 1) if widths else ()
        columns = [
            column.clone(memory_format=torch.contiguous_format).view(part.dtype)
            for column, part in zip(came, parts, strict=True)
        ]
        counts = [count for _, count in hop.num_forwarded]
        idx = [] if plan is None else list(columns.pop(0).split(counts))
        weights = scales = None
        if rows.topk_weights is not None:
            weights = torch.cat([rows.topk_weights, columns.pop(0)])
        if rows.scales is not None:
            scales = torch.cat([rows.scales, columns.pop(0)])
        return Rows(inner_x, scales, weights, widen_to=rows.widen_to), idx

    def _return(
        self, rows: Rows, hop: HostHop, handle: DispatchHandle
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Sum inside the hosts and bring the sums back: one tensor of them per host."""
        sums, weights, reason = self._sum_inside(rows, hop)
        status = Status.REFUSED if reason else Status.FINE
        beside = None if weights is None else weights.dtype
        receives, parts, weight_parts = [], [], []
        for host, tokens in enumerate(hop.tokens_per_host):
            if host == self._host:
                parts.append(sums)
                weight_parts.append(weights)
                continue
            count, gateway = len(tokens), self.hosts.gateway(self.rank, host)
            parts.append(sums.new_empty(count, sums.shape[1]))
            weight_parts.append(
                None if beside is None else torch.empty(count, handle.num_topk, dtype=beside)
            )
            if count:
                receives.append(self._wire.expected_status(gateway))
                receives.append(Transfer(gateway, Message.ROWS, parts[-1]))
                if weight_parts[-1] is not None:
                    receives.append(Transfer(gateway, Message.BESIDE, weight_parts[-1]))
        sends, first = [], handle.num_tokens
        for source, count in hop.num_forwarded:
            if count:
                place = slice(first, first + count)
                sends.append(self._wire.status(source, status, reason))
                sends.append(Transfer(source, Message.ROWS, sums[place]))
                if weights is not None:
                    sends.append(Transfer(source, Message.BESIDE, weights[place]))
            first += count
        refusals = self._wire.exchange("combine", receives, sends)
        if reason or refusals:
            reasons = [f"rank {rank}: {refusals[rank]}" for rank in sorted(refusals)]
            raise NoRoomError(reason or f"combine: expected all sums, got {'; '.join(reasons)}")
        return parts, None if weights is None else [p for p in weight_parts if p is not None]

    # -- inside this host -------------------------------------------------------------------------

    def _spread(
        self,
        operation: str,
        rows: Rows,
        inner_rows: Rows,
        hop: HostHop,
        received: Received | None,
        *,
        with_idx: bool,
    ) -> Rows:
        """Put own and forwarded rows at their addresses, then where and as they are asked for."""
        place = None if rows.is_cast else received
        try:
            arrived = self._inside.dispatch_again(inner_rows, hop.inner, place, with_idx=with_idx)
        except BaseException as error:
            translated = self._translated(error)
            raise translated from (None if translated is error else error)
        arrived = as_asked(arrived, rows)
        if received is None or received is place:
            return arrived
        copy_rows(received.rows, arrived)
        return received.rows

    def _place(self, rows: Rows, hop: HostHop, *, with_idx: bool) -> Received:
        """Return tensors for what `_spread` will return."""
        if not rows.is_cast:
            return self._inside.new_received(rows, hop.inner, with_idx=with_idx)
        arrival = arrival_along(rows, hop.inner, with_idx)
        return Received(arrival.ordinary(hop.inner.num_recv_rows))

    def _sum_inside(self, rows: Rows, hop: HostHop) -> tuple[Tensor, Tensor | None, str]:
        """Return this host's sums, of own and forwarded tokens, and weights; or why there are none.

        What cannot go on is told to those who wait for the sums, and raised.
        """
        try:
            return *self._inside.combine(rows, hop.inner), ""
        except BaseException as error:
            translated = self._translated(error)
            if self._broken:
                waiting = [source for source, count in hop.num_forwarded if count]
                reason = str(translated) or type(error).__name__
                self._wire.send(
                    self._wire.status(source, Status.BROKEN, reason) for source in waiting
                )
                raise translated from (None if translated is error else error)
            # Memory did not suffice; rows that mean nothing keep the connections in step.
            nothing, weights = rows.new_combined(hop.inner)
            return nothing, weights, str(translated)

    def _translated(self, error: BaseException) -> BaseException:
        """Number ranks as the whole group does; break down if the host's ranks have.

        The ranks have agreed on the call, so a disagreement inside the host is a rank that says
        why it cannot go on.
        """
        text = renumbered(str(error), self.hosts.members[self._host])
        if isinstance(error, NoRoomError) and not self._inside.is_broken:
            return NoRoomError(text)
        self._break(text or type(error).__name__)
        text = text.replace("no rank went on because of", "cannot go on because of")
        return RuntimeError(text) if isinstance(error, ValueError | RuntimeError) else error

    @contextmanager
    def _telling_host(self, operation: str) -> Iterator[None]:
        """Let this host's ranks hear why this one will not take part."""
        try:
            yield
        except LateError as error:
            with suppress(RuntimeError, ValueError):  # they have heard, or cannot any more
                self._inside.fail(operation, keep_numbers(str(error)))
            raise

    # -- the whole group --------------------------------------------------------------------------

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        """End the group where this rank alone fails: the others count on what it would send."""
        try:
            yield
        except NoRoomError:
            raise
        except LateError as error:  # what was sent is on its way yet
            self._break(str(error))
            raise
        except BaseException as error:
            if not self._broken:
                reason = f"rank {self.rank} failed in a call: {error or type(error).__name__}"
                self._wire.interrupt(reason)
                self._break(reason)
            raise

    def _agree(
        self,
        operation: str,
        call: Call | None,
        counts: Sequence[Tensor] | None = None,
        error: str = "",
    ) -> Tensor | None:
        check_working(operation, self._broken)
        check_process(operation, self._process)
        self._num_calls += 1
        try:
            return self._wire.agree(operation, call, counts, error)
        except ValueError:
            raise
        except BaseException as exception:
            self._break(str(exception) or type(exception).__name__)
            raise

    def _hop_of(self, operation: str, handle: DispatchHandle) -> HostHop:
        if isinstance(handle.hop, HostHop):
            return handle.hop
        error = "expected the handle to be one of this backend, got one of another"
        self.fail(operation, error)
        raise ValueError(f"{operation}: {error}")

    def _break(self, reason: str) -> None:  # makes no further call, and lets the others know
        self._broken = reason
        self._wire.farewell(reason)
        self._inside.close()
