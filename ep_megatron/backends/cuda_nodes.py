"""Dispatch and combine between GPUs of several nodes: one copy of a token per node.

A token crosses the network once for each node that has one of its experts, to the rank of the same
index there, its gateway. The gateway puts it at its final addresses by the kernels of `cuda`
(`host_plan` says how it knows them), so rows arrive as over any other backend, bit for bit. Combine
goes the same way back: each node sums a token's rows, the gateway returns one row, and the token's
rank adds the nodes' sums. The sums are those of the `hierarchical` backend.

The plan is made on the host, from a copy of `topk_idx`, and rows are laid side by side before they
cross: no kernel overlaps the two hops yet.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.arguments import check_topk_range
from ep_megatron.backends.base import Announce, Call, Received, Routing, Rows
from ep_megatron.backends.casting import as_asked, cast_rows, copy_rows
from ep_megatron.backends.crossing import Crossing, join, split
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_links import SUM_DTYPES
from ep_megatron.backends.device_rows import limit_error
from ep_megatron.backends.host_plan import WIRE_IDX_DTYPE, HostPlan, sum_weights
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.network import Network
from ep_megatron.config import BufferConfig
from ep_megatron.handle import AnyHandle, DispatchHandle, HostHop
from ep_megatron.hosts import Hosts


class CudaNodesBackend:
    """See `Backend`. Collective constructor.

    Args:
        meeting: of all ranks; every call meets there first, on the host.
        inside: of the ranks of this node.
        device: this rank's.
        network: between all ranks.
        config: limits; see `BufferConfig`.
        node_ids: one per rank, equal where ranks reach each other's memory.

    Raises:
        ValueError: more ranks than kernels are made for, or more nodes than a token's slots.
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
                raise ValueError(f"Buffer: expected at most {most} {what}, got {actual}")
        self._node = self.nodes.host_of[self.rank]
        self._meeting, self._inside, self._device = meeting, inside, device
        self.device, self.network = device, network  # for low-latency calls beside
        self._num_sms = min(config.num_sms, device.num_sms)
        self._is_wire_exact = config.float32_between_hosts
        sizes = (config.timeout, self._num_sms)
        self._crossing = Crossing(device, network, self.rank, self.num_ranks, sizes)
        self._num_calls, self._broken = 0, ""

    # -- the three operations ---------------------------------------------------------------------

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`. Reads `topk_idx` on the host."""
        rows, routing = rows.contiguous(), routing.contiguous()
        call = Call.of("dispatch", rows, routing)
        planned = replace(routing, topk_idx=routing.topk_idx.cpu())
        error = limit_error(call)
        try:
            check_topk_range("dispatch", planned.topk_idx, routing.num_experts)
        except ValueError as found:
            error = str(found).removeprefix("dispatch: ")
        if error:
            self.fail("dispatch", error)
            raise ValueError(f"dispatch: {error}")
        plan = HostPlan(self.nodes, self.rank, planned)
        everyone = self._agree("dispatch", call, plan.counts)
        counts = plan.all_counts(everyone)
        handle = plan.handle(self._num_calls, counts)
        per_node = plan.split(everyone)[2].tolist()
        inner_rows, idx = self._cross(rows, plan.tokens_per_host, per_node, plan)
        num_forwarded = [count for _, count in plan.num_forwarded(counts)]
        forwarded = idx.to(planned.topk_idx.dtype).split(num_forwarded)
        hop = plan.hop(handle, counts)
        plan.settle(hop, counts, forwarded)
        handle = self._on_device(replace(handle, hop=hop), routing.topk_idx.device)
        assert handle.hop is not None
        inner = handle.hop.inner
        arrived = self._inside.dispatch_again(inner_rows, inner, with_idx=not routing.expand)
        received = as_asked(arrived, rows)
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
        rows = rows.contiguous()
        hop, per_node = self._begin_again("cached dispatch", rows, handle)
        inner_rows, _ = self._cross(rows, hop.tokens_per_host, per_node)
        arrived = as_asked(self._inside.dispatch_again(inner_rows, hop.inner), rows)
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
        hop, per_node = self._begin_again("combine", rows, handle)
        out, out_weights = combined or self.new_combined(rows, handle)
        if self._is_wire_exact and rows.x.dtype in (torch.bfloat16, torch.float16):
            rows = replace(rows, x=rows.x.float())
            biases = [bias.float() for bias in biases]
        sums, weights = self._inside.combine(rows, hop.inner)
        own = slice(0, handle.num_tokens)
        parts: list[Tensor | None] = [sums, weights]
        records, widths = join([None if part is None else part[own.stop :] for part in parts])
        back = [list(column) for column in zip(*self._matrix(per_node), strict=True)]
        came = self._crossing.exchange(records, back)
        sums_of, weights_of = [sums[own]] * self.nodes.num_hosts, [weights] * self.nodes.num_hosts
        if weights is not None:
            weights_of[self._node] = weights[own]
        first = 0
        for node in self._by_gateway():
            count = len(hop.tokens_per_host[node])
            found = split(came[first : first + count], parts, widths)
            sums_of[node] = found[0]
            if weights is not None:
                weights_of[node] = found[1]
            first += count
        out.copy_(self._sum(sums_of, hop, biases))
        if weights is not None and out_weights is not None:
            on_host = [part.cpu() for part in weights_of if part is not None]
            plain = replace(handle, routes=handle.routes.cpu())
            out_weights.copy_(sum_weights(on_host, hop, plain))
        return out, out_weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        self._check(operation)
        try:
            self._meeting.agree(operation, None, error)
        except ValueError:
            return  # the others' copy of the error this rank is about to raise
        raise AssertionError("a reported error was not returned")

    def interrupt(self) -> None:
        """See `Backend.interrupt`. A kernel keeps its deadline; the next call gives up."""
        self._broken = self._broken or "a call was interrupted"
        self._inside.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`. No thread of the host moves rows."""

    def close(self) -> None:
        """See `Backend.close`. The network is its owner's to close, behind this."""
        self._broken = self._broken or "it was destroyed"
        self._inside.close()

    # -- between nodes ----------------------------------------------------------------------------

    def _cross(
        self,
        rows: Rows,
        tokens_per_node: Sequence[Tensor],
        per_node: Sequence[Sequence[int]],
        plan: HostPlan | None = None,
    ) -> tuple[Rows, Tensor]:
        """Send rows to their gateways; return own and forwarded rows, in one.

        With `plan` the tokens' expert ids travel too: those of what this rank forwards, `[n, K]`.
        """
        sent = cast_rows(rows)
        device, nodes = rows.x.device, self._by_gateway()
        order = [tokens_per_node[node] for node in nodes]
        tokens = torch.cat([*order, torch.empty(0, dtype=torch.int64)]).to(device)
        idx = None
        if plan is not None:
            none = torch.empty(0, plan.routing.topk_idx.shape[1], dtype=WIRE_IDX_DTYPE)
            idx = torch.cat([*(plan.inner_idx(node, WIRE_IDX_DTYPE) for node in nodes), none])
            idx = idx.to(device)
        own = (sent.x, sent.topk_weights, sent.scales)
        leaving = [None if p is None else p.view(torch.uint8)[tokens].view(p.dtype) for p in own]
        parts = [*leaving, idx]
        records, widths = join(parts)
        found = split(self._crossing.exchange(records, self._matrix(per_node)), parts, widths)
        forwarded_idx = torch.empty(0) if idx is None else found.pop().cpu()
        whole = [
            None
            if p is None
            else torch.cat([p.view(torch.uint8), q.view(torch.uint8)]).view(p.dtype)
            for p, q in zip(own, _aligned(found, own), strict=True)
        ]
        assert whole[0] is not None
        inner = Rows(whole[0], whole[2], whole[1], widen_to=rows.widen_to)
        return inner, forwarded_idx

    def _matrix(self, per_node: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return how many rows go from whom to whom, `[R][R]`; `per_node` is `[R][nodes]`."""
        matrix = [[0] * self.num_ranks for _ in range(self.num_ranks)]
        for rank, counts in enumerate(per_node):
            for node, count in enumerate(counts):
                if node != self.nodes.host_of[rank]:
                    matrix[rank][self.nodes.gateway(rank, node)] = int(count)
        return matrix

    def _by_gateway(self) -> list[int]:
        """Return the other nodes in the order of this rank's gateways there."""
        others = [node for node in range(self.nodes.num_hosts) if node != self._node]
        return sorted(others, key=lambda node: self.nodes.gateway(self.rank, node))

    def _sum(self, parts: Sequence[Tensor], hop: HostHop, biases: Sequence[Tensor]) -> Tensor:
        """Add the nodes' rows of each token, node after node, behind the biases; round once.

        It is the combine of rows that each node would have one of.
        """
        row = hop.row_in_host
        num_nodes = row.shape[1]
        node = torch.arange(num_nodes).expand_as(row)
        order = torch.where(row < 0, num_nodes, node).argsort(dim=1, stable=True)
        found = row.gather(1, order).long()
        routes = torch.stack([torch.where(found < 0, -1, order), found, torch.zeros_like(found)])
        device, like = self._device, parts[0]
        inputs = [device.input(part.contiguous()) for part in parts]
        given = device.input(routes.to(like.device, torch.int32))
        bias_inputs: list[Memory | None] = [*(device.input(bias) for bias in biases), None, None]
        out = device.output(like.dtype, (len(row), like.shape[1]))
        args = _cuda.CombineArgs(
            routes=given.address,
            num_tokens=len(row),
            num_topk=num_nodes,
            row_bytes=like.shape[1] * like.element_size(),
            bias_0=0 if bias_inputs[0] is None else bias_inputs[0].address,
            bias_1=0 if bias_inputs[1] is None else bias_inputs[1].address,
            out=out.address,
            from_x=[part.address for part in inputs],
        )
        with device.on_stream():
            device.launch(_cuda.plan_combine(args, SUM_DTYPES[like.dtype], self._num_sms))
        return device.tensor(out)

    # -- the whole group --------------------------------------------------------------------------

    def _begin_again(
        self, operation: str, rows: Rows, handle: DispatchHandle
    ) -> tuple[HostHop, list[list[int]]]:
        """Agree on a call along a handle; return its way and all ranks' tokens per node."""
        hop, call = handle.hop, Call.of(operation, rows, handle)
        error = limit_error(call)
        if hop is None:
            error = "expected the handle to be one of this backend, got one of another"
        if error or hop is None:
            self.fail(operation, error)
            raise ValueError(f"{operation}: {error}")
        counts = torch.tensor([len(tokens) for tokens in hop.tokens_per_host], dtype=torch.int32)
        per_node: list[list[int]] = self._agree(operation, call, counts).tolist()
        return hop, per_node

    def _agree(self, operation: str, call: Call, counts: Tensor) -> Tensor:
        """Return all ranks' counts if all make the same call; raise on every rank otherwise."""
        self._check(operation)
        self._meeting.agree(operation, call)
        self._num_calls += 1
        try:
            return self._meeting.exchange(operation, counts)
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            raise

    def _check(self, operation: str) -> None:
        if self._broken:
            raise RuntimeError(
                f"{operation}: expected a working Buffer, got one that broke down "
                f"({self._broken}); make a new Buffer"
            )
        self._crossing.check(operation)

    def _on_device(self, handle: DispatchHandle, device: torch.device) -> DispatchHandle:
        """Return a handle that was made on the host with what kernels read on the device."""
        assert handle.hop is not None
        inner = handle.hop.inner
        idx = None if handle.topk_idx is None else handle.topk_idx.to(device)
        inner_idx = None if inner.topk_idx is None else inner.topk_idx.to(device)
        inner = replace(inner, routes=inner.routes.to(device), topk_idx=inner_idx)
        return replace(
            handle,
            routes=handle.routes.to(device),
            topk_idx=idx,
            hop=replace(handle.hop, inner=inner),
        )


def _aligned(found: Sequence[Tensor], own: Sequence[Tensor | None]) -> list[Tensor]:
    """Return what was split off at the places of the parts that are there."""
    rest = iter(found)
    return [torch.empty(0) if part is None else next(rest) for part in own]
