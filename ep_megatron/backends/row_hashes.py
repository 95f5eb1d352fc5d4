"""Hashes of rows, and how rows that came changed are found by them."""

from collections.abc import Mapping

import torch
from torch import Tensor

_FACTOR = 0x100000001B3  # odd, so that a change of any word changes the sum


def hash_rows(x: Tensor) -> Tensor:
    """Return int64 `[N]` of rows `[N, H]`: any change of one 4-byte word changes it; 0 of zeros."""
    # A single column or row is dense whatever its strides are.
    dense = x if x.is_contiguous() and x.stride(1) == 1 else x.new_empty(x.shape).copy_(x)
    data = dense.view(torch.uint8)
    words = data.view(torch.int32) if data.shape[1] % 4 == 0 else data
    powers = torch.ones(words.shape[1], dtype=torch.int64, device=x.device)
    powers[1:] = _FACTOR
    return (words.to(torch.int64) * powers.cumprod(0)).sum(1)


def hash_or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    """Return the hashes of rows that may be absent, one per row of `like`."""
    return like.new_zeros(len(like), dtype=torch.int64) if x is None else hash_rows(x)


def is_same(a: Tensor, b: Tensor) -> Tensor:
    """Compare elementwise; a NaN is any other NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def first_wrong(wrong: Mapping[str, Tensor]) -> tuple[int, str, int] | None:
    """Return the first row that is wrong in anything, in what, and how many rows are; or None.

    Args:
        wrong: `[N]` bool by what it is that differs.
    """
    anything = torch.stack(list(wrong.values())).any(0).nonzero()[:, 0]
    if len(anything) == 0:
        return None
    row = int(anything[0])
    return (
        row,
        " and ".join(what for what, is_wrong in wrong.items() if is_wrong[row]),
        len(anything),
    )
