"""Received rows in a block of the arena, or in ordinary memory, as tensors.

A block holds the rows' parts one after the other (csrc/cpu/exchange.h, `Sections`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ep_megatron import _cpu, casts, fp8
from ep_megatron.backends.base import Rows
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import DispatchHandle

# Code and bits, as in DLPack.
_DLPACK_TYPES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
}


@dataclass(frozen=True)
class Arrival:
    """What arrives of one dispatch: the parts of `sent`, and expert ids like `topk_idx`.

    Attributes:
        sent: rows as they leave; only dtypes and sizes are looked at.
        topk_idx: `[T, K]` of a fresh dispatch by rank, else None.
        num_topk: K.
        expand: whether rows arrive expert-major.
    """

    sent: Rows
    topk_idx: Tensor | None
    num_topk: int
    expand: bool

    def row_bytes(self) -> tuple[int, int, int, int]:
        """Return the bytes of a row, its scales, one weight and one expert id; 0 where absent."""
        sent, hidden = self.sent, self.sent.x.shape[1]
        scales, weights = sent.scales, sent.topk_weights
        x_bytes = hidden * sent.x.element_size()
        scale_bytes = 0 if scales is None else scales.shape[1] * scales.element_size()
        if sent.fp8 is not None:
            x_bytes, scale_bytes = hidden, 4 * sent.fp8.num_scales(hidden)
        return (
            x_bytes,
            scale_bytes,
            0 if weights is None else weights.element_size(),
            0 if self.topk_idx is None else self.topk_idx.element_size(),
        )

    def cast(self) -> tuple[str, int, tuple[int, int, float], bool] | None:
        """Return how the kernels cast rows as they are sent, if they do."""
        recipe = self.sent.fp8
        if recipe is None:
            return None
        name, hidden = casts.dtype_name(self.sent.x.dtype), self.sent.x.shape[1]
        return name, hidden, casts.format_of(recipe), recipe.layout == "column_major"

    def num_bytes(self, num_rows: int) -> int:
        """Return the bytes of the block that `num_rows` rows need."""
        return self._sections(num_rows)[3]

    def views(self, block: _cpu.Block, num_rows: int) -> Rows:
        """Look at a block as received rows, not widened yet, which keep it alive."""
        sent, hidden = self.sent, self.sent.x.shape[1]
        scales_at, weights_at, idx_at, _ = self._sections(num_rows)
        scales, weights, idx = sent.scales, sent.topk_weights, self.topk_idx
        if weights is not None:
            weights = view(block, weights_at, weights, *self._weights_shape(num_rows))
        if idx is not None:
            idx = view(block, idx_at, idx, num_rows, self.num_topk)
        if sent.fp8 is not None:
            like = torch.empty(0, dtype=torch.float8_e4m3fn)
            scales = _view_scales(block, scales_at, sent.fp8, num_rows, hidden)
            return Rows(view(block, 0, like, num_rows, hidden), scales, weights, idx)
        if scales is not None:
            scales = view(block, scales_at, scales, num_rows, scales.shape[1])
        return Rows(view(block, 0, sent.x, num_rows, hidden), scales, weights, idx)

    def ordinary(self, num_rows: int) -> Rows:
        """Return uninitialised tensors for received rows, as they are asked for."""
        weights = self.sent.new_weights(*self._weights_shape(num_rows))
        idx = self.topk_idx
        if idx is not None:
            idx = idx.new_empty(num_rows, self.num_topk)
        return Rows(*self.sent.new_arrived(num_rows), weights, idx)

    def _sections(self, num_rows: int) -> tuple[int, int, int, int]:
        cast = self.cast()
        by_column = cast is not None and cast[3]
        return _cpu.sections(self.row_bytes(), num_rows, self.num_topk, self.expand, by_column)

    def _weights_shape(self, num_rows: int) -> tuple[int, ...]:
        return (num_rows,) if self.expand else (num_rows, self.num_topk)


def arrival_along(rows: Rows, handle: DispatchHandle, with_idx: bool) -> Arrival:
    """Return what arrives when `rows` go the way of an earlier dispatch."""
    # Expert ids travel by rank; expert-major rows say by their place whose they are.
    idx = handle.topk_idx if with_idx and not handle.expand else None
    return Arrival(rows, idx, handle.num_topk, handle.expand)


def _view_scales(
    block: _cpu.Block, offset: int, recipe: Fp8Recipe, num_rows: int, hidden: int
) -> Tensor:
    like = torch.empty(0, dtype=recipe.scale_dtype)
    num_scales = recipe.num_scales(hidden)
    if recipe.layout == "row_major":
        return view(block, offset, like, num_rows, num_scales)
    return view(block, offset, like, num_scales, fp8.column_rows(num_rows)).T[:num_rows]


def view(block: _cpu.Block, offset: int, like: Tensor, *shape: int) -> Tensor:
    """Look at a part of a block as a tensor, which keeps the block alive."""
    dtype = like.dtype
    # float8 is newer in DLPack than in torch.
    is_known = dtype in _DLPACK_TYPES
    tensor = from_dlpack(
        block.tensor(offset, _DLPACK_TYPES[dtype if is_known else torch.uint8], shape)
    )
    return tensor if is_known else tensor.view(dtype)
