"""Dispatch and combine of one MoE layer and micro-batch as exchanges outside autograd.

They are each other's adjoint: the backward of dispatch is a combine along the same handle, that of
combine a dispatch. Both go through the Buffer with `async_finish`, so that they run while the
caller computes, and are waited for when their result is asked for.
"""

from typing import Any

from torch import Tensor

from ep_megatron.buffer import Buffer
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import DispatchHandle
from ep_megatron.pipeline.nodes import Tensors
from ep_megatron.streams import EventOverlap


class Route:
    """Where one micro-batch's tokens go in one layer; a value that the layer's nodes share.

    Args:
        buffer: of the layer's expert ranks.
        num_experts: experts on all ranks.
        expert_alignment: see `Buffer.dispatch`.
        layer: within the chunk, for timelines.
        dispatch_fp8: how tokens travel to the experts' rows, or None as they are.
        combine_grad_fp8: how their gradients do.
    """

    def __init__(
        self,
        buffer: Buffer,
        num_experts: int,
        expert_alignment: int,
        layer: int,
        dispatch_fp8: Fp8Recipe | None = None,
        combine_grad_fp8: Fp8Recipe | None = None,
    ) -> None:
        self.buffer, self.num_experts, self.layer = buffer, num_experts, layer
        self.expert_alignment = expert_alignment
        self.dispatch_fp8, self.combine_grad_fp8 = dispatch_fp8, combine_grad_fp8
        self.topk_idx: Tensor | None = None
        """`[T, K]`, set by the attention node."""
        self.hidden_shape: Any = None
        """Shape that the tokens had before they were flattened, set by the attention node."""
        self.handle: DispatchHandle | None = None
        """Set by the dispatch."""


class _UnderWay:
    """One call to the Buffer that was started, and what it needs and brings."""

    def __init__(self, received: Tensors, event: EventOverlap, kept: Tensors) -> None:
        self.received, self.event = received, event
        # An exchange may read its input until it is done; nobody else has to know.
        self.kept = kept

    def finish(self) -> Tensors:
        self.event.current_stream_wait()
        self.kept = ()
        return self.received


class Dispatch:
    """Tokens and weights to their experts' rows; backwards, the rows' gradients to the tokens.

    Payload: `[T, H]` tokens, `[T, K]` weights. Received: `[N, H]` rows grouped by local expert,
    `[N]` weights.
    """

    name = "dispatch"
    num_payload = num_received = 2

    def __init__(self, route: Route) -> None:
        self._route = route
        self.layer: int | None = route.layer
        self._call: _UnderWay | None = None

    def start(self, payload: Tensors, after: EventOverlap) -> None:
        """See `Exchange`. Returns when the counts of rows are known."""
        route = self._route
        tokens, weights = payload
        assert tokens is not None
        rows, _, row_weights, _, route.handle, event = route.buffer.dispatch(
            tokens,
            topk_idx=route.topk_idx,
            topk_weights=weights,
            num_experts=route.num_experts,
            expand=True,
            expert_alignment=route.expert_alignment,
            previous_event=after,
            async_finish=True,
            **_wire(tokens, route.dispatch_fp8),
        )
        assert isinstance(rows, Tensor)
        self._call = _UnderWay((rows, row_weights), event, payload)

    def start_adjoint(self, grads: Tensors, after: EventOverlap) -> None:
        """See `Exchange`."""
        grad_rows, grad_weights = grads
        assert grad_rows is not None
        assert self._route.handle is not None
        combined, combined_weights, event = self._route.buffer.combine(
            grad_rows,
            self._route.handle,
            topk_weights=grad_weights,
            previous_event=after,
            async_finish=True,
        )
        self._call = _UnderWay((combined, combined_weights), event, grads)

    def finish(self) -> Tensors:
        """See `Exchange`."""
        return _finish(self)


class Combine:
    """Experts' rows summed into tokens; backwards, the tokens' gradients to the rows.

    Payload: `[N, H]` rows. Received: `[T, H]` tokens.
    """

    name = "combine"
    num_payload = num_received = 1

    def __init__(self, route: Route) -> None:
        self._route = route
        self.layer: int | None = route.layer
        self._call: _UnderWay | None = None

    def start(self, payload: Tensors, after: EventOverlap) -> None:
        """See `Exchange`."""
        (rows,) = payload
        assert rows is not None
        assert self._route.handle is not None
        tokens, _, event = self._route.buffer.combine(
            rows, self._route.handle, previous_event=after, async_finish=True
        )
        self._call = _UnderWay((tokens,), event, payload)

    def start_adjoint(self, grads: Tensors, after: EventOverlap) -> None:
        """See `Exchange`."""
        (grad_tokens,) = grads
        assert grad_tokens is not None
        assert self._route.handle is not None
        rows, _, _, _, _, event = self._route.buffer.dispatch(
            grad_tokens,
            self._route.handle,
            previous_event=after,
            async_finish=True,
            **_wire(grad_tokens, self._route.combine_grad_fp8),
        )
        assert isinstance(rows, Tensor)
        self._call = _UnderWay((rows,), event, grads)

    def finish(self) -> Tensors:
        """See `Exchange`."""
        return _finish(self)


def _wire(x: Tensor, fp8: Fp8Recipe | None) -> dict[str, Any]:
    """Return what makes rows of `x` travel as FP8 and arrive in its dtype."""
    return {} if fp8 is None else {"fp8": fp8, "widen_to": x.dtype}


def _finish(exchange: Any) -> Tensors:
    call: _UnderWay = exchange._call
    exchange._call = None
    return call.finish()
