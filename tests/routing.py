"""Routings that every backend must survive, and what they must do, in plain tensor math."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """How tokens are routed; every rank derives every rank's routing from it."""

    name: str
    num_tokens: tuple[int, ...]  # per rank
    num_topk: int = 3
    experts_per_rank: int = 3
    hidden: int = 40  # not a multiple of 128
    style: str = "random"
    idx_dtype: torch.dtype = torch.int64
    alignment: int = 1

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_per_rank

    def topk_idx(self, rank: int) -> Tensor:
        """Return `[T, K]` of that rank."""
        rng = torch.Generator().manual_seed(1000 + rank)
        shape = (self.num_tokens[rank], self.num_topk)
        if self.style == "one_expert":
            idx = torch.full(shape, -1)
            idx[:, -1] = self.num_experts - 1
        elif self.style == "repeated":  # the same expert more than once in one token
            idx = torch.randint(0, max(2, self.num_experts // 4), shape, generator=rng)
        elif self.style == "local":  # nothing crosses ranks
            idx = torch.randint(0, self.experts_per_rank, shape, generator=rng)
            idx += rank * self.experts_per_rank
        elif self.style == "nothing":
            idx = torch.full(shape, -1)
        elif self.style == "first_rank":  # all ranks but one receive nothing
            idx = torch.randint(0, self.experts_per_rank, shape, generator=rng)
        else:
            scores = torch.rand(shape[0], max(self.num_experts, self.num_topk), generator=rng)
            idx = scores.topk(self.num_topk).indices
            idx = torch.where(idx < self.num_experts, idx, -1)
            if self.style == "holes":
                idx = idx.masked_fill(torch.rand(shape, generator=rng) < 0.5, -1)
        return idx.to(self.idx_dtype)

    def x(self, rank: int, dtype: torch.dtype) -> Tensor:
        rng = torch.Generator().manual_seed(2000 + rank)
        return torch.randn(
            self.num_tokens[rank], self.hidden, generator=rng, dtype=torch.float64
        ).to(dtype)

    def weights(self, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
        rng = torch.Generator().manual_seed(3000 + rank)
        return torch.rand(
            self.num_tokens[rank], self.num_topk, generator=rng, dtype=torch.float64
        ).to(dtype)


CASES = [
    Case("one rank", (5,)),
    Case("two ranks", (7, 3)),
    Case("three ranks", (5, 6, 4), num_topk=4, alignment=4),
    Case("four ranks", (9, 8, 7, 6), num_topk=2, idx_dtype=torch.int32),
    Case("five ranks", (3, 1, 4, 1, 5), num_topk=6),
    Case("eight ranks", (6, 7, 8, 9, 6, 7, 8, 9), num_topk=8, experts_per_rank=2, alignment=16),
    Case("a rank without tokens", (0, 9)),
    Case("no tokens at all", (0, 0), alignment=8),
    Case("nothing is routed", (4, 5), style="nothing", alignment=2),
    Case("all tokens to one expert", (6, 5), style="one_expert", alignment=8),
    Case("one rank receives all", (6, 5, 4), style="first_rank"),
    Case("everything stays", (6, 5), style="local"),
    Case("an expert repeated in a token", (8, 8), num_topk=4, style="repeated"),
    Case("unused slots", (20, 20, 3), style="holes", alignment=4, idx_dtype=torch.int32),
    Case("top one", (9, 9), num_topk=1),
    Case("one local expert", (9, 4, 2, 7), num_topk=2, experts_per_rank=1, alignment=2),
    Case("more slots than experts", (4, 4), num_topk=5, experts_per_rank=2),
    Case("large enough to stream", (300, 500), num_topk=8, experts_per_rank=32, hidden=4096),
]


@dataclass(frozen=True)
class Expected:
    """What one rank must receive: its rows as (source rank, token, slot or -1) of each, or None."""

    rows: list[tuple[int, int, int] | None]
    blocks: list[int]


def expected_rows(case: Case, rank: int, expand: bool) -> Expected:
    """Work out the row order by the definition, loop by loop."""
    first = rank * case.experts_per_rank
    routings = [case.topk_idx(source).tolist() for source in range(case.num_ranks)]
    by_expert: list[list[tuple[int, int, int] | None]] = [[] for _ in range(case.experts_per_rank)]
    deduplicated: list[tuple[int, int, int] | None] = []
    for source, tokens in enumerate(routings):
        for token, experts in enumerate(tokens):
            is_here = False
            for slot, expert in enumerate(experts):
                if first <= expert < first + case.experts_per_rank:
                    by_expert[expert - first].append((source, token, slot))
                    is_here = True
            if is_here:
                deduplicated.append((source, token, -1))
    for block in by_expert:
        block.extend([None] * (-len(block) % case.alignment))
    rows = [row for block in by_expert for row in block] if expand else deduplicated
    return Expected(rows, [len(block) for block in by_expert])
