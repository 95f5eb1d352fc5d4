"""A tensor that takes another's place where Megatron would free it.

Megatron's combined 1F1B schedule drops the storage of the dispatched rows as soon as the experts
have run, as its own dispatchers copy the rows once more before the experts take them. Ours does
not: the experts keep the very rows for their weight gradients. So the schedule is given a tensor of
the same shape and autograd history without memory to speak of, and the experts the rows.
"""

from typing import Any

import torch
from torch import Tensor


class _Hide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.new_zeros(1, 1).expand(rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Show(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def hide(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a stand-in for `rows` and the rows themselves, cut off from autograd.

    Args:
        rows: `[N, H]` of any dtype.

    Returns:
        stand_in: `[N, H]` zeros that share one element; its gradient becomes that of `rows`.
        rows: the same memory, for `show`.
    """
    stand_in: Tensor = _Hide.apply(rows)
    return stand_in, rows.detach()


def show(stand_in: Tensor, rows: Tensor) -> Tensor:
    """Return `rows` with the autograd history of `stand_in`, or of a detached copy of it."""
    shown: Tensor = _Show.apply(stand_in, rows)
    return shown
