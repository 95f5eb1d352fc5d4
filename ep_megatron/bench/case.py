"""What is measured: sizes, routing, and one row of the result."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe

# What the benchmark casts by; exponents of MXFP8 travel packed, one byte each.
FP8_RECIPES = {"fp8": FP8, "mxfp8": replace(MXFP8, scales="packed_ue8m0")}

Step = Callable[[], Any]
DIRECTIONS = ("forward", "forward_backward")


@dataclass(frozen=True)
class Case:
    """One size, equal on all ranks."""

    num_ranks: int
    num_tokens: int  # per rank
    hidden: int
    num_topk: int
    num_experts: int

    def topk_idx(self, rank: int) -> Tensor:
        """Return `[T, K]` int64, K different experts per token, uniformly at random."""
        rng = torch.Generator().manual_seed(rank)
        scores = torch.rand(self.num_tokens, self.num_experts, generator=rng)
        return scores.topk(self.num_topk).indices

    def x(self, rank: int) -> Tensor:
        """Return `[T, H]` bfloat16."""
        rng = torch.Generator().manual_seed(100 + rank)
        return torch.randn(self.num_tokens, self.hidden, generator=rng).bfloat16()

    def topk_weights(self, rank: int) -> Tensor:
        """Return `[T, K]` float32 that sum to one."""
        rng = torch.Generator().manual_seed(200 + rank)
        return torch.rand(self.num_tokens, self.num_topk, generator=rng).softmax(1)

    def num_copies(self) -> int:
        """Count the rows that cross from all ranks' tokens to their ranks, one way."""
        per_rank = self.num_experts // self.num_ranks
        total = 0
        for rank in range(self.num_ranks):
            destinations = self.topk_idx(rank) // per_rank
            hits = torch.zeros(self.num_tokens, self.num_ranks, dtype=torch.bool)
            total += int(hits.scatter_(1, destinations, True).sum())
        return total

    def packed_bytes(self, recipe: Fp8Recipe | None = None) -> int:
        """Bytes of rows that all ranks take in one low-latency dispatch, a row per expert."""
        row_bytes = self.hidden * 2
        if recipe is not None:
            row_bytes = self.hidden + 4 * recipe.num_scales(self.hidden)
        return self.num_ranks * self.num_tokens * self.num_topk * row_bytes

    def payload_bytes(self, recipe: Fp8Recipe | None = None) -> int:
        """Bytes that all ranks send one way, a token once per destination rank.

        Args:
            recipe: of rows that travel as FP8, scales included; bfloat16 without.
        """
        row_bytes = self.hidden * 2
        if recipe is not None:
            row_bytes = self.hidden + 4 * recipe.num_scales(self.hidden)
        return self.num_copies() * row_bytes


# Makes the steps of one implementation, by direction, for one case and rank.
Maker = Callable[[Case, int], dict[str, Step]]


@dataclass(frozen=True)
class Result:
    """Wall time of one step on all ranks, over all samples.

    `payload_bytes` are those of bfloat16 rows one way, `dispatch_bytes` those that a dispatch of
    this implementation sends: fewer with FP8, scales counted.
    `link_bytes` left both hosts in one step, headers included; 0 where all ranks are on one host.
    """

    implementation: str
    direction: str
    num_ranks: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    payload_bytes: int
    num_samples: int
    median_ms: float
    min_ms: float
    max_ms: float
    link_bytes: int = 0
    dispatch_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        return asdict(self)
