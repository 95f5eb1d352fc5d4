"""Dispatch and combine between GPUs of several nodes: one copy of a token per node.

A token crosses the network once for each node that has one of its experts, to the rank of the same
index there, its gateway. Its rank knows the final address of every row, and sends these addresses
beside the rows: the gateway plans nothing, it hands what has come to the kernels of `cuda`, chunk
by chunk, while later chunks are on their way. So rows arrive as over any other backend, bit for
bit. Combine goes the same way back: each node sums a token's rows, the gateway returns one row, and
the token's rank adds the nodes' sums. The sums are those of the `hierarchical` backend.

What is launched is in `node_rows`. All ranks meet on the device, those of other nodes by the
network, and the host learns from there how much goes where; then those of a node meet once more, to
offer each other memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Announce, Call, NoRoomError, Received, Routing, Rows
from ep_megatron.backends.casting import as_asked, copy_rows
from ep_megatron.backends.crossing import Crossing, Traffic
from ep_megatron.backends.crossing_within import CrossingWithin
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_meeting import DeviceMeeting
from ep_megatron.backends.device_rows import Sizes, handle_of, limit_error
from ep_megatron.backends.meeting import Meeting, check_working
from ep_megatron.backends.network import Network
from ep_megatron.backends.node_ends import Ends, Fresh, Place
from ep_megatron.backends.node_rows import Returning, Sending
from ep_megatron.backends.nodes_within import NodesWithin
from ep_megatron.config import BufferConfig
from ep_megatron.handle import AnyHandle, DeviceHandle, DispatchHandle, NodeHop
from ep_megatron.hosts import Hosts


class CudaNodesBackend:
    """See `Backend`. Collective constructor.

    Args:
        meeting: of all ranks, for what is rare: setting up.
        inside: of the ranks of this node.
        device: this rank's.
        network: between all ranks.
        config: limits; see `BufferConfig`.
        node_ids: one per rank, equal where ranks reach each other's memory.

    Raises:
        ValueError: more ranks or nodes than kernels are made for.
        RuntimeError: on every rank, if some have another config.
    """

    name = "cuda"

    def __init__(
        self,
        meeting: Meeting,
        inside: CudaBackend,
        device: Device,
        network: Network,
        config: BufferConfig,
        node_ids: Sequence[str],
    ) -> None:
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self.nodes = Hosts.from_ids(node_ids)
        for what, actual, most in (
            ("ranks", self.num_ranks, _cuda.MAX_RANKS),
            ("nodes", self.nodes.num_hosts, _cuda.MAX_TOPK),
        ):
            if actual > most:
                raise ValueError(
                    f"Buffer: expected at most {most} {what}, got {actual}; make smaller groups"
                )
        for field in ("chunk_bytes_between_hosts", "float32_between_hosts"):
            values = meeting.gather_text("Buffer", str(getattr(config, field)))
            if len(set(values)) > 1:
                found = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                raise RuntimeError(
                    f"Buffer: expected {field} to be the same on all ranks, got {found}; give all "
                    "ranks one config"
                )
        self._inside, self._device = inside, device
        self.device, self.network = device, network  # for low-latency calls beside
        self._place = Place(device, self.nodes, self.rank, min(config.num_sms, device.num_sms))
        self._is_wire_exact = config.float32_between_hosts
        self._crossing = Crossing(
            device, network, meeting, config.timeout, config.chunk_bytes_between_hosts
        )
        near = self.nodes.members[self.nodes.host_of[self.rank]]
        self._everyone = DeviceMeeting(
            device, meeting, config.timeout, self._place.num_sms, 0, far=(network, near)
        )
        crossing = CrossingWithin(
            device, network, meeting, config.timeout, self._crossing.error, self._everyone.state
        )
        self._within = NodesWithin(self._place, self._everyone, inside.within, crossing)
        self._broken = ""

    # -- the three operations ---------------------------------------------------------------------

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        rows, routing = rows.contiguous(), routing.contiguous()
        handle, hop, fresh = self._plan(rows, routing)
        with self._taking_part("dispatch"):
            ends = fresh.ends()
            received = self._dispatch("dispatch", rows, hop, ends, fresh)
            routes = self._device.tensor(fresh.routes)
            handle = replace(handle, routes=routes, hop=ends.kept(self._device, hop))
        if announce is not None:
            announce(received, handle)
        return received, handle

    def new_received(self, rows: Rows, handle: DispatchHandle) -> Received:
        """See `Backend.new_received`."""
        return Received(rows.new_received(handle))

    def dispatch_again(
        self, rows: Rows, handle: DispatchHandle, received: Received | None = None
    ) -> Rows:
        """See `Backend.dispatch_again`."""
        operation, rows = "cached dispatch", rows.contiguous()
        hop = self._begin_again(operation, rows, handle)
        with self._taking_part(operation):
            arrived = self._dispatch(operation, rows, hop, Ends.of(self._device, hop))
        if received is None:
            return arrived
        copy_rows(received.rows, arrived)
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
        """See `Backend.combine`; a node's ranks are summed first, then node after node.

        A node's sum is rounded to the dtype of the rows, or with `float32_between_hosts` not at
        all, on every node alike: the result does not depend on where a token comes from.
        """
        rows, biases = rows.contiguous(), [bias.contiguous() for bias in biases]
        hop = self._begin_again("combine", rows, handle)
        with self._taking_part("combine"):
            return self._combine(rows, hop, biases, combined)

    def _combine(
        self,
        rows: Rows,
        hop: NodeHop,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None] | None,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = rows.x.dtype
        if self._is_wire_exact and dtype in (torch.bfloat16, torch.float16):
            rows = replace(rows, x=rows.x.float())
            biases = [bias.float() for bias in biases]
        into = combined or (None, None)
        is_widened = rows.x.dtype != dtype
        back = {(target, source): n for (source, target), n in self._leaving(hop).items()}
        returning = Returning.of(rows, hop.inner)
        exchange = self._crossing.begin("combine", returning.record, Traffic.of(self.rank, back))
        ends = Ends.of(self._device, hop)
        try:
            own = self._inside.combine_parts(
                rows,
                hop.inner,
                lambda added, state: returning.leave(self._place, exchange, ends, added, state),
            )
        except NoRoomError as error:
            self._broken = f"what others wait for was not summed: {error}"
            raise
        out, out_weights = returning.add(
            self._place, exchange, ends, own, biases, (None if is_widened else into[0], into[1])
        )
        if not is_widened:
            return out, out_weights
        narrow = out.to(dtype) if into[0] is None else into[0].copy_(out)
        return narrow, out_weights

    # -- the same without a host that waits -------------------------------------------------------

    def dispatch_within(self, rows: Rows, routing: Routing) -> tuple[Rows, DeviceHandle]:
        """See `SyncFreeBackend.dispatch_within`."""
        rows, routing = rows.contiguous(), routing.contiguous()
        return self._within.dispatch(self._begin("dispatch", rows, routing), rows, routing)

    def dispatch_again_within(self, rows: Rows, handle: DeviceHandle) -> Rows:
        """See `SyncFreeBackend.dispatch_again_within`."""
        rows = rows.contiguous()
        call = self._begin("cached dispatch", rows, handle)
        return self._within.dispatch_again(call, rows, handle)

    def combine_within(
        self,
        rows: Rows,
        handle: DeviceHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None],
    ) -> None:
        """See `SyncFreeBackend.combine_within`; the sums are those of `combine`."""
        rows, biases = rows.contiguous(), [bias.contiguous() for bias in biases]
        self._begin("combine", rows, handle)
        dtype, into = rows.x.dtype, combined
        if self._is_wire_exact and dtype in (torch.bfloat16, torch.float16):
            rows, biases = replace(rows, x=rows.x.float()), [bias.float() for bias in biases]
            into = combined[0].new_empty(combined[0].shape, dtype=torch.float32), combined[1]
        reduces = self._inside.reduces_within(dtype)
        self._within.combine(rows, handle, biases, into, reduces=reduces)
        if into is not combined:
            combined[0].copy_(into[0])

    # -- what else a backend does -----------------------------------------------------------------

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        self._check(operation)
        with self._naming(operation), self._device.on_stream():
            self._everyone.fail(operation, error)

    def interrupt(self) -> None:
        """See `Backend.interrupt`. A kernel keeps its deadline; the next call gives up."""
        self._broken = self._broken or "a call was interrupted"
        self._everyone.close(self._broken)
        self._inside.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`. No thread of the host moves rows."""

    def close(self) -> None:
        """See `Backend.close`. The network is its owner's to close, behind this."""
        self._broken = self._broken or "it was destroyed"
        self._everyone.close(self._broken)
        self._inside.close()

    # -- dispatch ---------------------------------------------------------------------------------

    def _plan(self, rows: Rows, routing: Routing) -> tuple[DispatchHandle, NodeHop, Fresh]:
        """Agree and plan; tensors of handle and hop are what `Fresh` has, to be read later."""
        device, topk_idx = self._device, routing.topk_idx
        call = self._begin("dispatch", rows, routing)
        given = device.input(topk_idx)
        routes = device.output(torch.int32, (3, *topk_idx.shape))
        by_node = device.output(torch.int32, (3, len(topk_idx), self.nodes.num_hosts))
        scan = self._everyone.scan(given.address, call, len(topk_idx), routes.address)
        scan.num_nodes, scan.node = self.nodes.num_hosts, self.nodes.host_of[self.rank]
        scan.node_of, scan.by_node = list(self.nodes.host_of), by_node.address
        report = self._agree("dispatch", call, scan)
        with self._taking_part("dispatch"):
            return self._planned(report, call, routing, given, (routes, by_node))

    def _planned(
        self,
        report: _cuda.Report,
        call: Call,
        routing: Routing,
        given: Memory,
        made: tuple[Memory, Memory],
    ) -> tuple[DispatchHandle, NodeHop, Fresh]:
        sizes, ranks = Sizes.of(report, call, self.rank), (self.rank, self.num_ranks)
        nothing, number = routing.topk_idx[:0], self._everyone.ticket
        handle = handle_of(report, sizes, routing, ranks, number, nothing)
        here = self.nodes.members[self.nodes.host_of[self.rank]]
        hop = NodeHop(
            inner=replace(
                handle,
                rank=self.nodes.index_of[self.rank],
                num_ranks=len(here),
                num_experts=handle.num_local_experts * len(here),
                num_rows_per_rank=tuple(sizes.num_rows[rank] for rank in here),
                topk_idx=None,
            ),
            by_node=nothing,
            forwarded=nothing,
            num_to_node=tuple(map(tuple, report.per_node)),
        )
        came = [n for (_, to), n in sorted(self._leaving(hop).items()) if to == self.rank]
        return handle, hop, Fresh.of(self._device, routing, given, made, came)

    def _dispatch(
        self, operation: str, rows: Rows, hop: NodeHop, ends: Ends, fresh: Fresh | None = None
    ) -> Rows:
        """Send rows to their gateways and forward those of others; return what arrives."""
        sending = Sending.of(self._device, rows, hop, ends, fresh)
        traffic = Traffic.of(self.rank, self._leaving(hop))
        exchange = self._crossing.begin(operation, sending.record, traffic)
        with self._device.on_stream():
            sending.leave(self._place, exchange, hop)
            exchange.put_beside()
            exchange.put_all_rows()
        try:
            arrived = self._inside.dispatch_parts(
                sending.send,
                hop.inner,
                lambda args: sending.forward(self._place, exchange, args),
            )
        except NoRoomError:
            # What is on its way must not come into a later exchange.
            with self._device.on_stream():
                exchange.wait_for_all()
            raise
        return as_asked(arrived, rows)

    def _leaving(self, hop: NodeHop) -> dict[tuple[int, int], int]:
        """Return how many tokens go from a rank to a gateway, where any do."""
        return {
            (rank, self.nodes.gateway(rank, node)): count
            for rank, counts in enumerate(hop.num_to_node)
            for node, count in enumerate(counts)
            if count and node != self.nodes.host_of[rank]
        }

    # -- the whole group --------------------------------------------------------------------------

    def _begin(
        self, operation: str, rows: Rows, by: Routing | DispatchHandle | DeviceHandle
    ) -> Call:
        """Describe a call, or raise why it cannot be; the other ranks in it hear of it."""
        self._check(operation)
        call = Call.of(operation, rows, by)
        is_foreign = (isinstance(by, DispatchHandle) and not isinstance(by.hop, NodeHop)) or (
            isinstance(by, DeviceHandle) and by.hop is None
        )
        try:
            self._within.raise_failure()
            error = limit_error(call)
            if is_foreign:
                error = (
                    "expected the handle to be one of this backend, got one of another; use that "
                    "of a dispatch of this Buffer"
                )
            if error:
                raise ValueError(f"{operation}: {error}")
        except ValueError as error:
            if not self._device.is_capturing():
                self.fail(operation, str(error).removeprefix(f"{operation}: "))
            raise
        return call

    def _begin_again(self, operation: str, rows: Rows, handle: DispatchHandle) -> NodeHop:
        """Agree on a call along a handle; return its way."""
        call = self._begin(operation, rows, handle)
        self._agree(operation, call)
        assert isinstance(handle.hop, NodeHop)
        return handle.hop

    def _agree(
        self, operation: str, call: Call, scan: _cuda.ScanArgs | None = None
    ) -> _cuda.Report:
        """Meet all ranks; raise on each unless all make the same call."""
        with self._naming(operation), self._device.on_stream():
            report = self._everyone.meet(operation, call, scan=scan)
        self._everyone.agree(operation, report)
        return report

    @contextmanager
    def _naming(self, operation: str) -> Iterator[None]:
        """Name who did not come in an earlier call, where that has ended this rank's GPU."""
        try:
            yield
        except ValueError:
            raise
        except Exception:
            self._crossing.check(operation)
            self._inside.check_arrivals(operation)
            raise

    @contextmanager
    def _taking_part(self, operation: str) -> Iterator[None]:
        """Make no further call where this rank alone fails in one that all agree on.

        The others count on what it would send, and name it when it does not come.
        """
        try:
            yield
        except NoRoomError:  # of all this node's ranks, which are in step with the others
            raise
        except BaseException as error:
            self._broken = self._broken or f"{operation} ended by {error or type(error).__name__}"
            raise

    def _check(self, operation: str) -> None:
        check_working(operation, self._broken)
        self._crossing.check(operation)
        self._inside.check_arrivals(operation)
        self._within.check(operation)
