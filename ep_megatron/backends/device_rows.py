"""How received rows lie in a block of GPU memory, and how many of them there are.

H hidden, K top-k, S scales of a row, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Call, Routing, Rows
from ep_megatron.backends.device_arena import align
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import DispatchHandle

_PART_ALIGNMENT = 64
_MAX_ROWS = (1 << 31) - 1  # addresses are int32


@dataclass(frozen=True)
class Part:
    """One kind of thing that a row has: dtype and shape of one row's; `()` is one element."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one row's."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class RowLayout:
    """What arrives with every row; None where a part is absent.

    Attributes:
        x: `[H]`, as it arrives.
        scales: `[S]`.
        weights: `[K]`, expert-major one.
        idx: `[K]` local experts, only in a fresh dispatch by rank.
        links: `[2]`, how a token's rows hang together (RowLink in csrc/cuda/protocol.h), where it
            may have several on a rank.
    """

    x: Part
    scales: Part | None
    weights: Part | None
    idx: Part | None
    links: Part | None

    @staticmethod
    def of(rows: Rows, call: Call, idx_dtype: torch.dtype | None) -> "RowLayout":
        """Return what arrives of `rows`; with indices of `idx_dtype` if that is not None."""
        columns = () if call.expand else (call.num_topk,)
        hidden = rows.x.shape[1]
        x, scales = Part(rows.x.dtype, (hidden,)), None
        if rows.fp8 is not None:
            x = Part(torch.float8_e4m3fn, (hidden,))
            scales = Part(rows.fp8.scale_dtype, (rows.fp8.num_scales(hidden),))
        elif rows.scales is not None:
            scales = Part(rows.scales.dtype, (rows.scales.shape[1],))
        weights = None if rows.topk_weights is None else Part(rows.topk_weights.dtype, columns)
        idx = None if idx_dtype is None else Part(idx_dtype, columns)
        may_repeat = call.expand and call.num_topk > 1
        return RowLayout(x, scales, weights, idx, Part(torch.int32, (2,)) if may_repeat else None)

    def starts(self, num_rows: int) -> list[int]:
        """Return where the parts of `num_rows` rows start, in the order above, and the end."""
        starts, end = [], 0
        for part in (self.x, self.scales, self.weights, self.idx, self.links):
            starts.append(end)
            if part is not None:
                end = align(end + num_rows * part.num_bytes, _PART_ALIGNMENT)
        return [*starts, end]

    def received(
        self, memory: Tensor, num_rows: int, must_copy: bool
    ) -> tuple[Rows, Tensor | None]:
        """Look at a block, `[bytes]` uint8, as rows, or copy them out of it; copy links."""
        starts = self.starts(num_rows)

        def look(start: int, part: Part | None, copies: bool = must_copy) -> Tensor | None:
            if part is None:
                return None
            data = memory[start : start + num_rows * part.num_bytes].view(part.dtype)
            data = data.view(num_rows, *part.shape)
            return data.clone() if copies else data

        x = look(0, self.x)
        assert x is not None
        rows = Rows(
            x,
            look(starts[1], self.scales),
            look(starts[2], self.weights),
            look(starts[3], self.idx),
        )
        return rows, look(starts[4], self.links, True)


def item_bytes(part: Part | None) -> int:
    """Return the bytes of one element; 0 for no part."""
    return 0 if part is None else part.dtype.itemsize


def recipe_of(recipe: Fp8Recipe) -> _cuda.CastRecipe:
    """Return a recipe as kernels take it."""
    return _cuda.CastRecipe(recipe.block, recipe.scales, recipe.min_amax)


@dataclass(frozen=True)
class Sizes:
    """Rows that each rank receives, and those of each of this rank's experts without padding."""

    num_rows: Sequence[int]
    valid: Sequence[int]

    @staticmethod
    def of(report: _cuda.Report, call: Call, rank: int) -> "Sizes":
        """Work out from all ranks' counts how many rows each receives.

        Raises:
            RuntimeError: on every rank, if one would receive more rows than can be addressed.
        """
        num_ranks = len(report.words)
        experts_per_rank = call.num_experts // num_ranks
        if call.expand:
            blocks = [align(n, call.expert_alignment) for n in report.per_expert]
            firsts = range(0, call.num_experts, experts_per_rank)
            num_rows = [sum(blocks[first : first + experts_per_rank]) for first in firsts]
        else:
            num_rows = [sum(column) for column in zip(*report.per_rank, strict=True)]
        if max(num_rows) > _MAX_ROWS:
            raise RuntimeError(
                f"dispatch: expected at most {_MAX_ROWS} rows on a rank, got {max(num_rows)}"
            )
        first = rank * experts_per_rank
        return Sizes(num_rows, report.per_expert[first : first + experts_per_rank])


def handle_of(
    report: _cuda.Report,
    sizes: Sizes,
    routing: Routing,
    ranks: tuple[int, int],
    plan_id: int,
    routes: Tensor,
    links: Tensor | None = None,
) -> DispatchHandle:
    """Return the handle of a fresh dispatch, of what all ranks' counts and the device say.

    Args:
        report: of the meeting.
        sizes: that follow from it.
        routing: of this rank.
        ranks: this one and how many there are.
        plan_id: number of the dispatch.
        routes: `[3, T, K]`.
        links: between received rows, where there are some.
    """
    rank, alignment = ranks[0], routing.expert_alignment
    return DispatchHandle(
        plan_id=plan_id,
        rank=rank,
        num_ranks=ranks[1],
        num_tokens=len(routing.topk_idx),
        num_topk=routing.topk_idx.shape[1],
        num_experts=routing.num_experts,
        expand=routing.expand,
        expert_alignment=alignment,
        routes=routes,
        num_rows_per_rank=tuple(sizes.num_rows),
        num_tokens_per_rank=tuple(report.per_rank[rank]),
        num_recv_tokens_per_rank=tuple(row[rank] for row in report.per_rank),
        num_recv_tokens_per_expert=tuple(align(n, alignment) for n in sizes.valid),
        num_valid_tokens_per_expert=tuple(sizes.valid),
        topk_idx=None if routing.expand else routing.topk_idx.clone(),
        links=links,
    )


def limit_error(call: Call) -> str:
    """Return in what a call exceeds what the kernels are made for; empty if in nothing."""
    limits = {
        "hidden": (call.hidden, _cuda.MAX_HIDDEN),
        "the columns of topk_idx": (call.num_topk, _cuda.MAX_TOPK),
        "num_experts": (call.num_experts, _cuda.MAX_EXPERTS),
    }
    for what, (actual, most) in limits.items():
        if actual > most:
            return f"expected {what} to be at most {most} for backend 'cuda', got {actual}"
    return ""
