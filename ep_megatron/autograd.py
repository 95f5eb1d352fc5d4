"""Dispatch and combine as differentiable operations.

For one handle they are adjoint linear maps: the backward of dispatch is a combine, the backward of
combine a dispatch along the same routing, so only the handle is kept. A cast to FP8 on the way is
passed straight through by the backward pass, as if it changed nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_megatron import casts
from ep_megatron.buffer import Buffer
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import AnyHandle, CapacityHandle


@dataclass(frozen=True, eq=False)
class Fp8Rows:
    """Received rows as FP8, for experts that compute with them as they are.

    Autograd has no gradients of e4m3 tensors, so they go to `carrier`, which stands for the rows in
    the graph: whoever consumes `data` and `scales` takes the carrier as its differentiable input
    and returns for it the gradient of the rows. `widen` is one such consumer.

    Attributes:
        data: `[M, H]` float8_e4m3fn.
        scales: `[M, S]`, see `Fp8Recipe`.
        carrier: `[M, H]` of the dtype of the tokens; one zero, seen everywhere.
    """

    data: Tensor
    scales: Tensor
    carrier: Tensor

    def widen(self) -> Tensor:
        """Return the rows in the dtype of the tokens, differentiably. Local."""
        rows: Tensor = WidenRows.apply(self.carrier, self.data, self.scales)
        return rows


class WidenRows(torch.autograd.Function):
    """Widen FP8 rows; the gradient goes to their carrier."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, data: Tensor, scales: Tensor) -> Tensor:
        """See `Fp8Rows.widen`."""
        return casts.dequantize(data, scales, carrier.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Hand the gradient on."""
        return grad, None, None


class FusedDispatch(torch.autograd.Function):
    """Forward dispatch, backward combine."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor | None, buffer: Buffer, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, AnyHandle, Tensor | None, Tensor | None]:
        """See `fused_dispatch`; the last two are data and scales, if rows are handed on as FP8."""
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_weights=topk_weights, **options
        )
        ctx.buffer, ctx.handle = buffer, handle
        for rows in recv_x if isinstance(recv_x, tuple) else (recv_x,):
            _zero_behind(rows, handle)
        if recv_idx is not None:
            ctx.mark_non_differentiable(recv_idx)
        assert handle is not None
        data = scales = None
        if isinstance(recv_x, tuple):
            data, scales = recv_x
            ctx.mark_non_differentiable(data, scales)
            recv_x = x.new_zeros(()).expand(data.shape)
        return recv_x, recv_idx, recv_weights, handle, data, scales

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor, _idx: None, grad_weights: Tensor | None, *_none: None
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """Sum each token's gradients over the ranks it went to."""
        grad, grad_topk_weights, _ = ctx.buffer.combine(
            grad_x, ctx.handle, topk_weights=grad_weights
        )
        return grad, grad_topk_weights, None, None


class FusedCombine(torch.autograd.Function):
    """Forward combine, backward dispatch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, handle: AnyHandle, buffer: Buffer, grad_fp8: Fp8Recipe | None
    ) -> Tensor:
        """See `fused_combine`."""
        ctx.buffer, ctx.handle, ctx.grad_fp8 = buffer, handle, grad_fp8
        return buffer.combine(x, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Send each token's gradient to the rows it was summed from."""
        widen_to = None if ctx.grad_fp8 is None else grad.dtype
        rows = ctx.buffer.dispatch(grad, ctx.handle, fp8=ctx.grad_fp8, widen_to=widen_to)[0]
        _zero_behind(rows, ctx.handle)
        return rows, None, None, None


def _zero_behind(rows: Tensor, handle: AnyHandle) -> None:
    """Zero what a dispatch into a fixed number of rows leaves as it was: else not linear."""
    if not isinstance(handle, CapacityHandle):
        return
    is_behind = torch.arange(len(rows), device=rows.device) >= handle.num_recv_rows_tensor
    if rows.dtype == torch.float8_e4m3fn:  # masked_fill does not know it
        rows = rows.view(torch.uint8)
    rows.masked_fill_(is_behind[:, None], 0)


def fused_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    buffer: Buffer,
    *,
    expand: bool = False,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
    fp8: Fp8Recipe | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, AnyHandle]:
    """Send every token to the ranks that hold its experts, differentiably.

    Collective, and so is its backward, which is `combine` along the same routing. Differentiable
    once, in `x` and `topk_weights`.

    Args:
        x: `[T, H]` bfloat16, float16, float32 or float64 (with `fp8` not float64).
        topk_idx: `[T, K]` int64 or int32 in `[0, num_experts)`, -1 where a slot is unused.
        topk_weights: `[T, K]` float32 or float64, or None.
        num_experts: experts on all ranks.
        buffer: of the expert-parallel group.
        expand: see `Buffer.dispatch`.
        expert_alignment: see `Buffer.dispatch`.
        num_worst_tokens: see `Buffer.dispatch`; rows and gradients behind those that came are 0.
        fp8: rows travel as FP8 and arrive widened to the dtype of `x`; gradients come back as they
            are, straight through the cast.

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
        "num_worst_tokens": num_worst_tokens,
        "fp8": fp8,
        "widen_to": None if fp8 is None else x.dtype,
    }
    recv_x, recv_idx, recv_weights, handle, _, _ = FusedDispatch.apply(
        x, topk_weights, buffer, options
    )
    return recv_x, recv_idx, recv_weights, handle


def fused_dispatch_fp8(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    buffer: Buffer,
    *,
    fp8: Fp8Recipe,
    expand: bool = False,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
) -> tuple[Fp8Rows, Tensor | None, Tensor | None, AnyHandle]:
    """Send every token as FP8 and hand the rows on as they arrive, differentiably.

    As `fused_dispatch`, but for experts that compute with FP8 rows: nothing is widened, and the
    rows' gradient is expected at `Fp8Rows.carrier`, in the dtype of `x`.
    """
    options = {
        "topk_idx": topk_idx,
        "num_experts": num_experts,
        "expand": expand,
        "expert_alignment": expert_alignment,
        "num_worst_tokens": num_worst_tokens,
        "fp8": fp8,
    }
    carrier, recv_idx, recv_weights, handle, data, scales = FusedDispatch.apply(
        x, topk_weights, buffer, options
    )
    return Fp8Rows(data, scales, carrier), recv_idx, recv_weights, handle


def fused_combine(
    x: Tensor, handle: AnyHandle, buffer: Buffer, *, grad_fp8: Fp8Recipe | None = None
) -> Tensor:
    """Bring rows back to their tokens and sum them, differentiably.

    Collective, and so is its backward, which dispatches the gradient along the same routing.
    Differentiable once.

    Args:
        x: `[M, H]` (`[N, H]` with an expert-major handle) rows in the order of the dispatch.
        handle: of that dispatch.
        buffer: of the expert-parallel group.
        grad_fp8: the backward pass sends the gradient as FP8 and widens it where it arrives.
            Gradients are small: give a recipe whose `min_amax` is `fp8.TINY_AMAX`.

    Returns:
        `[T, H]`: see `Buffer.combine`.

    Raises:
        ValueError, RuntimeError: see `Buffer.combine`.
    """
    combined: Tensor = FusedCombine.apply(x, handle, buffer, grad_fp8)
    return combined
