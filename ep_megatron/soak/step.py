"""One random step: what every rank sends, and what every rank must get, in plain tensor math.

All ranks draw the same step from the same seed. R ranks, L local experts, K top-k, H hidden.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron import logfmt

_HIDDEN = (128, 256, 1024)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Step:
    """Sizes and kind of one step.

    Attributes:
        seed: of all its numbers.
        kind: `"rows"`, `"fp8"` or `"low_latency"`.
        num_tokens: of each rank.
        num_topk: K.
        experts_per_rank: L.
        hidden: H.
        dtype: of the rows.
        expand: whether rows arrive by expert.
        alignment: of their blocks.
        is_queued: whether calls are asynchronous.
        use_logfmt: whether low-latency rows return as LogFMT.
    """

    seed: int
    kind: str
    num_tokens: tuple[int, ...]
    num_topk: int
    experts_per_rank: int
    hidden: int
    dtype: torch.dtype
    expand: bool
    alignment: int
    is_queued: bool
    use_logfmt: bool

    @staticmethod
    def draw(seed: int, num_ranks: int, kinds: tuple[str, ...]) -> "Step":
        """Return the step of that seed: ragged, now and then with an empty rank."""
        rng = random.Random(seed)
        kind = rng.choice(kinds)
        most = rng.choice((4, 32, 128))
        tokens = tuple(rng.randint(0, most) for _ in range(num_ranks))
        if rng.random() < 0.2:
            empty = rng.randrange(num_ranks)
            tokens = tuple(0 if rank == empty else n for rank, n in enumerate(tokens))
        local = rng.randint(1, 4)
        dtype = rng.choice(_DTYPES)
        return Step(
            seed=seed,
            kind=kind,
            num_tokens=tokens,
            num_topk=rng.randint(1, min(8, local * num_ranks)),
            experts_per_rank=local,
            hidden=rng.choice(_HIDDEN),
            dtype=torch.bfloat16 if kind == "low_latency" else dtype,
            expand=rng.random() < 0.6,
            alignment=rng.choice((1, 1, 8)),
            is_queued=rng.random() < 0.4,
            use_logfmt=kind == "low_latency" and rng.random() < 0.5,
        )

    @property
    def num_experts(self) -> int:
        """Experts of all ranks."""
        return self.experts_per_rank * len(self.num_tokens)

    def topk_idx(self, rank: int) -> Tensor:
        """Return `[T, K]` int64 of that rank: distinct experts, some slots unused."""
        rng = self._rng(rank, 1)
        shape = (self.num_tokens[rank], self.num_experts)
        idx = torch.rand(shape, generator=rng).topk(self.num_topk).indices
        return idx.masked_fill(torch.rand(idx.shape, generator=rng) < 0.1, -1)

    def x(self, rank: int) -> Tensor:
        """Return `[T, H]` of that rank."""
        shape = (self.num_tokens[rank], self.hidden)
        return torch.randn(shape, generator=self._rng(rank, 2)).to(self.dtype)

    def weights(self, rank: int) -> Tensor:
        """Return `[T, K]` float32 of that rank."""
        shape = (self.num_tokens[rank], self.num_topk)
        return torch.rand(shape, generator=self._rng(rank, 3))

    def _rng(self, rank: int, what: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 64 + rank) * 4 + what)

    def expected_rows(self, rank: int, sent: list[Tensor]) -> Tensor:
        """Return what must arrive of `sent`, one tensor per source rank: rows in their order."""
        first = rank * self.experts_per_rank
        routings = [self.topk_idx(source) for source in range(len(self.num_tokens))]
        if not self.expand:
            return torch.cat([
                rows[_is_on_rank(idx, first, self.experts_per_rank)]
                for rows, idx in zip(sent, routings, strict=True)
            ])  # fmt: skip
        blocks = []
        for expert in range(first, first + self.experts_per_rank):
            parts = [
                rows[(idx == expert).nonzero()[:, 0]]
                for rows, idx in zip(sent, routings, strict=True)
            ]
            num_rows = sum(len(part) for part in parts)
            padding = sent[rank].new_zeros(-num_rows % self.alignment, *sent[rank].shape[1:])
            blocks.append(torch.cat([*parts, padding]))
        return torch.cat(blocks)

    def expected_sum(self, rank: int, hosts: tuple[tuple[int, ...], ...]) -> Tensor:
        """Return what must come back to this rank's tokens if experts hand rows back unchanged.

        The sum of a host is rounded to the dtype of the rows before it travels, where there are
        several.
        """
        x, idx = self.x(rank).float(), self.topk_idx(rank)
        total = torch.full_like(x, -0.0)
        for members in hosts:
            of_host = torch.full_like(x, -0.0)
            is_used = torch.zeros(len(x), dtype=torch.bool)
            for peer in members:
                first = peer * self.experts_per_rank
                mine = (idx >= first) & (idx < first + self.experts_per_rank)
                copies = mine.sum(1) if self.expand else mine.any(1).long()
                part = torch.full_like(x, -0.0)
                for copy in range(int(copies.max()) if len(copies) else 0):
                    part[copies > copy] += x[copies > copy]
                of_host[copies > 0] += part[copies > 0]
                is_used |= copies > 0
            if len(hosts) > 1:
                of_host = of_host.to(self.dtype).float()
            total[is_used] += of_host[is_used]
        return total.masked_fill((idx < 0).all(1, keepdim=True), 0).to(self.dtype)

    def expected_weighted_sum(self, rank: int) -> Tensor:
        """Return what a low-latency combine must give if experts hand rows back unchanged."""
        x, idx, weights = self.x(rank), self.topk_idx(rank), self.weights(rank)
        x = logfmt.decode(logfmt.encode(x)) if self.use_logfmt else x.float()
        total = torch.zeros(x.shape)
        for slot in range(self.num_topk):
            used = idx[:, slot] >= 0
            total[used] += x[used] * weights[used, slot, None]
        return total.bfloat16()


def _is_on_rank(idx: Tensor, first: int, num_local: int) -> Tensor:
    return ((idx >= first) & (idx < first + num_local)).any(1)
