"""Dispatch and combine as operations of `torch.library`, for torch.compile and checkpointing.

Tensors and numbers go in, tensors come out, so that a compiler can put the operations into a graph
and selective checkpointing can keep what they brought instead of communicating again. The handle
crosses as a tensor of one number. That tensor owns it: the handle lives as long as the tensor's
memory does, in a graph, in a checkpoint or in a variable, and nothing else keeps it.

    number = ops.register(buffer)
    rows, _, weights, counts, handle = ops.dispatch(x, idx, topk_weights, E, number, expand=True)
    out = ops.combine(my_experts(rows, counts, weights), handle, len(x))

Source: that handles cross as numbers follows torchtitan's wrapper of DeepEP (BSD-3).
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ep_megatron.buffer import Buffer
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import AnyHandle

_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class HandleMemory(bytearray):
    """The eight bytes of a handle's number, which hold the handle itself."""

    handle: AnyHandle
    buffer: Buffer


# By number; an entry goes when the memory of its last tensor does.
_handles: weakref.WeakValueDictionary[int, HandleMemory] = weakref.WeakValueDictionary()


def register(buffer: Buffer) -> int:
    """Return the number by which the operations know `buffer`; the same one every time.

    Local. The caller, and every handle in use, keep the Buffer alive; a number does not.
    """
    for number, known in _buffers.items():
        if known is buffer:
            return number
    number = next(_numbers)
    _buffers[number] = buffer
    return number


def num_handles() -> int:
    """Return how many handles of these operations are alive in this process."""
    return len(_handles)


@torch.library.custom_op("ep_megatron::dispatch", mutates_args=())
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    buffer: int,
    expand: bool = False,
    expert_alignment: int = 1,
    fp8: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send every token to the ranks that hold its experts.

    Collective, and so is its backward, a combine along the same routing. Differentiable once, in
    `x` and `topk_weights`.

    Args:
        x: `[T, H]` bfloat16, float16, float32 or float64.
        topk_idx: `[T, K]` int64 or int32, -1 where a slot is unused.
        topk_weights: `[T, K]` float32 or float64.
        num_experts: experts on all ranks.
        buffer: from `register`.
        expand: see `Buffer.dispatch`.
        expert_alignment: see `Buffer.dispatch`.
        fp8: the `code` of an `Fp8Recipe`, or 0: rows travel as FP8 and arrive widened.

    Returns:
        recv_x: `[M, H]`, see `Buffer.dispatch`.
        recv_topk_idx: `[M, K]` local experts; with `expand` `[0, K]`.
        recv_topk_weights: `[M, K]`; with `expand` `[M]`.
        num_tokens_per_expert: `[L]` int64 on the CPU, rounded up to `expert_alignment`.
        handle: `[1]` int64 on the CPU, for `combine`. Only this memory names it, no copy of it.

    Raises:
        ValueError, RuntimeError: see `Buffer.dispatch`; ValueError for an unknown `buffer`.
    """
    of = _buffer(buffer)
    recipe = Fp8Recipe.of_code(fp8) if fp8 else None
    recv_x, recv_idx, recv_weights, counts, handle, _ = of.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_experts=num_experts,
        expand=expand,
        expert_alignment=expert_alignment,
        fp8=recipe,
        widen_to=None if recipe is None else x.dtype,
    )
    assert isinstance(recv_x, Tensor)
    assert recv_weights is not None
    if recv_idx is None:
        recv_idx = topk_idx.new_empty(0, topk_idx.shape[1])
    num_tokens = torch.tensor(counts, dtype=torch.int64)
    return recv_x, recv_idx, recv_weights, num_tokens, _tensor_of(handle, of)


@torch.library.custom_op("ep_megatron::combine", mutates_args=())
def combine(x: Tensor, handle: Tensor, num_tokens: int, grad_fp8: int = 0) -> Tensor:
    """Bring rows back to their tokens and sum them, unweighted.

    Collective, and so is its backward, a dispatch along the same routing. Differentiable once.

    Args:
        x: `[M, H]` rows in the order of the dispatch.
        handle: of that dispatch.
        num_tokens: T, rows of the result.
        grad_fp8: the `code` of an `Fp8Recipe`, or 0: how the backward pass sends the gradient.

    Returns:
        `[T, H]`, see `Buffer.combine`.

    Raises:
        ValueError, RuntimeError: see `Buffer.combine`; ValueError for a `handle` whose memory is
            gone, or if it has another number of tokens.
    """
    memory = _memory("combine", handle)
    combined = memory.buffer.combine(x, memory.handle)[0]
    return _checked("combine", combined, num_tokens)


@torch.library.custom_op("ep_megatron::combine_weighted", mutates_args=())
def combine_weighted(
    x: Tensor, topk_weights: Tensor, handle: Tensor, num_tokens: int, num_topk: int
) -> tuple[Tensor, Tensor]:
    """Sum rows and their weights: the backward of `dispatch`. Collective, not differentiable."""
    memory = _memory("combine_weighted", handle)
    combined, weights, _ = memory.buffer.combine(x, memory.handle, topk_weights=topk_weights)
    assert weights is not None
    return _checked("combine_weighted", combined, num_tokens), weights


@torch.library.custom_op("ep_megatron::dispatch_again", mutates_args=())
def dispatch_again(x: Tensor, handle: Tensor, num_rows: int, fp8: int = 0) -> Tensor:
    """Send `x [T, H]` the way of an earlier dispatch: the backward of `combine`.

    Collective, not differentiable; nothing is counted again. `num_rows` is M of that dispatch.
    """
    memory = _memory("dispatch_again", handle)
    recipe = Fp8Recipe.of_code(fp8) if fp8 else None
    widen_to = None if recipe is None else x.dtype
    rows = memory.buffer.dispatch(x, memory.handle, fp8=recipe, widen_to=widen_to)[0]
    assert isinstance(rows, Tensor)
    return _checked("dispatch_again", rows, num_rows)


# -- shapes, for compilers ------------------------------------------------------------------------


@dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    buffer: int,
    expand: bool = False,
    expert_alignment: int = 1,
    fp8: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_topk = torch.library.get_ctx().new_dynamic_size(), topk_idx.shape[1]
    num_local = num_experts // _buffer(buffer).group_size
    return (
        x.new_empty(num_rows, x.shape[1]),
        topk_idx.new_empty(0 if expand else num_rows, num_topk),
        topk_weights.new_empty((num_rows,) if expand else (num_rows, num_topk)),
        torch.empty(num_local, dtype=torch.int64, device="cpu"),
        torch.empty(1, dtype=torch.int64, device="cpu"),
    )


@combine.register_fake
def _(x: Tensor, handle: Tensor, num_tokens: int, grad_fp8: int = 0) -> Tensor:
    return x.new_empty(num_tokens, x.shape[1])


@combine_weighted.register_fake
def _(
    x: Tensor, topk_weights: Tensor, handle: Tensor, num_tokens: int, num_topk: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(num_tokens, x.shape[1]), topk_weights.new_empty(num_tokens, num_topk)


@dispatch_again.register_fake
def _(x: Tensor, handle: Tensor, num_rows: int, fp8: int = 0) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


# -- gradients ------------------------------------------------------------------------------------


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_tokens, ctx.num_topk = inputs[1].shape
    ctx.save_for_backward(output[4])


def _dispatch_backward(
    ctx: Any, grad_x: Tensor, _idx: Any, grad_weights: Tensor, *_none: Any
) -> tuple[Tensor | None, ...]:
    (handle,) = ctx.saved_tensors
    grad, grad_topk_weights = combine_weighted(
        grad_x, grad_weights, handle, ctx.num_tokens, ctx.num_topk
    )
    return grad, None, grad_topk_weights, None, None, None, None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, _, ctx.grad_fp8 = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(handle)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (handle,) = ctx.saved_tensors
    return dispatch_again(grad, handle, ctx.num_rows, ctx.grad_fp8), None, None, None


dispatch.register_autograd(_dispatch_backward, setup_context=_keep_dispatch)
combine.register_autograd(_combine_backward, setup_context=_keep_combine)


def _buffer(number: int) -> Buffer:
    buffer = _buffers.get(number)
    if buffer is None:
        raise ValueError(
            f"dispatch: expected buffer to be a number of ops.register, got {number}; keep the "
            "Buffer alive for as long as its number is in use"
        )
    return buffer


def _tensor_of(handle: AnyHandle, buffer: Buffer) -> Tensor:
    number = next(_numbers)
    memory = HandleMemory(number.to_bytes(8, "little"))
    memory.handle, memory.buffer = handle, buffer
    _handles[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64)


def _memory(operation: str, handle: Tensor) -> HandleMemory:
    memory = _handles.get(int(handle))
    if memory is None:
        raise ValueError(
            f"{operation}: expected handle to be of ops.dispatch, in the memory it came in, got "
            f"number {int(handle)}, which nothing holds any more; keep the tensor, not a copy"
        )
    return memory


def _checked(operation: str, rows: Tensor, expected: int) -> Tensor:
    """Return `rows`; raise behind the call, as the other ranks are in it."""
    if len(rows) != expected:
        raise ValueError(
            f"{operation}: expected {expected} rows, as was said, got {len(rows)}; give the "
            "number that belongs to the handle"
        )
    return rows
