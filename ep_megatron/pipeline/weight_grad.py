"""Weight gradients apart from the gradients of inputs, for Megatron's own parallel linears.

Megatron's local `ColumnParallelLinear` and `RowParallelLinear` compute both in one backward. After
`split_linears` their backward, inside a pipeline node, gives the gradient of the input only and
leaves the weight's as a function in the node's list. That function hands the gradient to the
weight's own accumulator in autograd, so whatever hangs there (`.grad`, the hooks by which
Megatron's DistributedDataParallel fills `main_grad` and counts buckets) sees what it always sees.

Outside a node the linears are Megatron's, untouched.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Half:
    """The weight's half of a backward; `compute` returns the gradient, of whatever `weight` is.

    Without a weight it accumulates its gradients itself.
    """

    compute: Callable[[], Tensor | None]
    weight: Tensor | None = None


Deferred = list[Half]
"""Weight gradients still to be computed, in order."""

_deferred: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


@contextlib.contextmanager
def deferred_to(deferred: Deferred) -> Iterator[None]:
    """Leave the weight gradients of linears called in this block in `deferred`, at their backward.

    Not collective.
    """
    token = _deferred.set(deferred)
    try:
        yield
    finally:
        _deferred.reset(token)


def defer(function: Callable[[], None]) -> None:
    """Leave `function` to the node that is running forwards; for modules with halves of their own.

    It accumulates the gradients that it computes.

    Raises:
        RuntimeError: outside a node.
    """
    deferred = _deferred.get()
    if deferred is None:
        raise RuntimeError("defer: expected to be called inside a pipeline node, got no node")
    deferred.append(Half(function))


def run_deferred(deferred: Deferred) -> None:
    """Compute and accumulate what is in `deferred`, in order, and empty it. Not collective.

    Gradients of a weight that was used more than once are added up before they are accumulated, as
    autograd does.
    """
    totals: dict[int, Tensor] = {}
    # Outside the engine grad mode is on, and a gradient computed so would hold the activations.
    with torch.no_grad():
        while deferred:
            half = deferred.pop(0)
            gradient, weight = half.compute(), half.weight
            if weight is None or gradient is None:
                continue
            if id(weight) in totals:
                gradient = totals.pop(id(weight)).add_(gradient)
            if any(other.weight is weight for other in deferred):
                totals[id(weight)] = gradient
            else:
                torch.autograd.backward(weight, gradient)


def split_linears(model: torch.nn.Module) -> None:
    """Let all local parallel linears inside `model` defer weight gradients inside nodes.

    Not collective; calling it again changes nothing.

    Raises:
        ValueError: if a linear adds weight gradients to `main_grad` inside its backward
            (`gradient_accumulation_fusion`), which leaves nothing to defer.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for name, module in model.named_modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        if module.gradient_accumulation_fusion:
            raise ValueError(
                f"split_linears: expected gradient_accumulation_fusion to be off for {name}, got "
                "on; build the model with gradient_accumulation_fusion=False"
            )
        if "_forward_impl" not in vars(module):
            module._forward_impl = functools.partial(_linear, module._forward_impl)


def _linear(theirs: Callable[..., Tensor], **arguments: Any) -> Tensor:
    """Stand for a linear's `_forward_impl`; `theirs` does what is not deferred."""
    deferred = _deferred.get()
    x, weight = arguments["input"], arguments["weight"]
    is_split = deferred is not None and torch.is_grad_enabled()
    if not is_split or not x.requires_grad or not weight.requires_grad:
        return theirs(**arguments)
    if arguments.get("grad_output_buffer") is not None:
        raise ValueError(
            "pipeline: expected defer_embedding_wgrad_compute to be off, got on; a schedule with "
            "weight gradients apart does the same"
        )
    y: Tensor = _SplitLinear.apply(
        x,
        arguments["bias"],
        [weight],
        deferred,
        arguments["tp_group"],
        arguments["sequence_parallel"],
        arguments["allreduce_dgrad"],
    )
    return y


class _SplitLinear(torch.autograd.Function):
    """`x W^T + b`; the weight comes in a list, so that autograd knows of no gradient for it.

    Operation for operation what Megatron's own function computes, in its order, so bits agree.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weights: list[Tensor],
        deferred: Deferred,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
    ) -> Tensor:
        (weight,) = weights
        ctx.save_for_backward(x)
        ctx.weight, ctx.deferred, ctx.group = weight, deferred, group
        ctx.sequence_parallel, ctx.allreduce_dgrad = sequence_parallel, allreduce_dgrad
        ctx.has_bias = bias is not None
        total = _gather(x, group) if sequence_parallel else x
        y = torch.matmul(total, weight.t())
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, group = ctx.weight, ctx.group
        grad_x = grad_y.matmul(weight)
        if ctx.allreduce_dgrad:
            dist.all_reduce(grad_x, group=group)
        if ctx.sequence_parallel:
            grad_x = _reduce_scatter(grad_x, group)
        rows = grad_y.contiguous().view(-1, grad_y.shape[-1])
        # The gathering for the weight's gradient is done at its turn on every rank of the group.
        gather = functools.partial(_gather, x, group) if ctx.sequence_parallel else lambda: x

        def compute() -> Tensor:
            total = gather()
            return rows.t().matmul(total.contiguous().view(-1, total.shape[-1]))

        ctx.deferred.append(Half(compute, weight))
        grad_bias = rows.sum(dim=0) if ctx.has_bias else None
        return grad_x, grad_bias, None, None, None, None, None


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(total, x.contiguous(), group=group)
    return total


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part
