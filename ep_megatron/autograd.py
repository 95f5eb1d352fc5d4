"""Dispatch and combine as differentiable operations.

For one handle they are adjoint linear maps: the backward of dispatch is a combine, the backward of
combine a dispatch along the same routing, so only the handle is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_megatron.buffer import Buffer
from ep_megatron.handle import DispatchHandle


class FusedDispatch(torch.autograd.Function):
    """Forward dispatch, backward combine."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor | None, buffer: Buffer, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, DispatchHandle]:
        """See `fused_dispatch`."""
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_weights=topk_weights, **options
        )
        ctx.buffer, ctx.handle = buffer, handle
        if recv_idx is not None:
            ctx.mark_non_differentiable(recv_idx)
        assert isinstance(recv_x, Tensor)
        assert handle is not None
        return recv_x, recv_idx, recv_weights, handle

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor, _idx: None, grad_weights: Tensor | None, _handle: None
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """Sum each token's gradients over the ranks it went to."""
        grad, grad_topk_weights, _ = ctx.buffer.combine(
            grad_x, ctx.handle, topk_weights=grad_weights
        )
        return grad, grad_topk_weights, None, None


class FusedCombine(torch.autograd.Function):
    """Forward combine, backward dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: DispatchHandle, buffer: Buffer) -> Tensor:
        """See `fused_combine`."""
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(x, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Send each token's gradient to the rows it was summed from."""
        return ctx.buffer.dispatch(grad, ctx.handle)[0], None, None


def fused_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    buffer: Buffer,
    *,
    expand: bool = False,
    expert_alignment: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None, DispatchHandle]:
    """Send every token to the ranks that hold its experts, differentiably.

    Collective, and so is its backward, which is `combine` along the same routing. Differentiable
    once, in `x` and `topk_weights`.

    Args:
        x: `[T, H]` bfloat16, float16, float32 or float64.
        topk_idx: `[T, K]` int64 or int32 in `[0, num_experts)`, -1 where a slot is unused.
        topk_weights: `[T, K]` float32 or float64, or None.
        num_experts: experts on all ranks.
        buffer: of the expert-parallel group.
        expand: see `Buffer.dispatch`.
        expert_alignment: see `Buffer.dispatch`.

    Returns:
        recv_x, recv_topk_idx, recv_topk_weights, handle: see `Buffer.dispatch`.

    Raises:
        ValueError, RuntimeError: see `Buffer.dispatch`.

    Source: DeepSeek-V3, arXiv:2412.19437, section 3.2.2.
    """
    options = {
        "topk_idx": topk_idx,
        "num_experts": num_experts,
        "expand": expand,
        "expert_alignment": expert_alignment,
    }
    received: tuple[Tensor, Tensor | None, Tensor | None, DispatchHandle] = FusedDispatch.apply(
        x, topk_weights, buffer, options
    )
    return received


def fused_combine(x: Tensor, handle: DispatchHandle, buffer: Buffer) -> Tensor:
    """Bring rows back to their tokens and sum them, differentiably.

    Collective, and so is its backward, which dispatches the gradient along the same routing.
    Differentiable once.

    Args:
        x: `[M, H]` (`[N, H]` with an expert-major handle) rows in the order of the dispatch.
        handle: of that dispatch.
        buffer: of the expert-parallel group.

    Returns:
        `[T, H]`: see `Buffer.combine`.

    Raises:
        ValueError, RuntimeError: see `Buffer.combine`.
    """
    combined: Tensor = FusedCombine.apply(x, handle, buffer)
    return combined
