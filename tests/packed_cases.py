"""Routings for low-latency calls, and what they must do, by loops over their definition."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron import fp8, logfmt
from ep_megatron.fp8 import Fp8Recipe


@dataclass(frozen=True)
class PackedCase:
    """How tokens are routed; every rank derives every rank's routing from it."""

    num_tokens: tuple[int, ...]  # per rank
    num_topk: int = 3
    experts_per_rank: int = 2
    capacity: int = 8
    hidden: int = 128
    style: str = "random"
    idx_dtype: torch.dtype = torch.int64
    scale: float = 1.0  # of the tokens

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_per_rank

    def topk_idx(self, rank: int, step: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(1000 * step + rank)
        shape = (self.num_tokens[rank], self.num_topk)
        if self.style == "one_expert":
            idx = torch.full(shape, -1)
            idx[:, 0] = self.num_experts - 1
        else:
            scores = torch.rand(shape[0], max(self.num_experts, self.num_topk), generator=rng)
            idx = scores.topk(self.num_topk).indices
            idx = torch.where(idx < self.num_experts, idx, -1)
            if self.style == "repeated" and self.num_topk > 1:
                idx[:1, 1] = idx[:1, 0]
            if self.style == "holes":
                idx = idx.masked_fill(torch.rand(shape, generator=rng) < 0.5, -1)
        return idx.to(self.idx_dtype)

    def x(self, rank: int, step: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(5000 + 1000 * step + rank)
        x = torch.randn(self.num_tokens[rank], self.hidden, generator=rng)
        return (x * self.scale).bfloat16()

    def weights(self, rank: int, step: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(9000 + 1000 * step + rank)
        return torch.rand(self.num_tokens[rank], self.num_topk, generator=rng)


def expected_packed(
    case: PackedCase, rank: int, step: int = 0, masked: tuple[int, ...] = ()
) -> list[list[list[int]]]:
    """Return, by local expert and source rank, the tokens that must arrive, in order."""
    first = rank * case.experts_per_rank
    routings = [case.topk_idx(source, step).tolist() for source in range(case.num_ranks)]
    return [
        [
            []
            if source in masked
            else [token for token, experts in enumerate(routing) for e in experts if e == expert]
            for source, routing in enumerate(routings)
        ]
        for expert in range(first, first + case.experts_per_rank)
    ]


def check_packed(
    case: PackedCase,
    rank: int,
    recv_x: Tensor | tuple[Tensor, Tensor],
    recv_count: Tensor,
    handle: tuple[Tensor, Tensor, int, int, int],
    recipe: Fp8Recipe | None,
    step: int = 0,
    masked: tuple[int, ...] = (),
) -> None:
    """Compare every valid row, scale, count and place, bit for bit."""
    local, rows = case.experts_per_rank, case.num_ranks * case.capacity
    src_info, layout, *sizes = handle
    assert sizes == [case.capacity, case.hidden, case.num_experts]
    assert src_info.shape == (local, rows)
    assert src_info.dtype == torch.int32
    assert layout.shape == (local, case.num_ranks)
    assert layout.dtype == torch.int64
    x, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    assert x.shape == (local, rows, case.hidden)
    assert x.dtype == (torch.bfloat16 if recipe is None else torch.float8_e4m3fn)
    if scales is not None:
        assert recipe is not None
        assert scales.shape == (local, rows, recipe.num_scales(case.hidden))
        assert scales.stride() == (scales.shape[2] * rows, 1, rows)
        assert scales.dtype == recipe.scale_dtype
    for expert, by_source in enumerate(expected_packed(case, rank, step, masked)):
        at = 0
        for source, tokens in enumerate(by_source):
            end = at + len(tokens)
            # A masked rank has an empty range, wherever it begins.
            if source not in masked:
                assert int(layout[expert, source]) == (at << 32 | len(tokens))
            assert src_info[expert, at:end].tolist() == tokens
            sent = case.x(source, step)[tokens]
            if recipe is None:
                assert torch.equal(x[expert, at:end].view(torch.int16), sent.view(torch.int16))
            else:
                data, sent_scales = fp8.quantize(sent, recipe)
                got = x[expert, at:end]
                assert torch.equal(got.view(torch.uint8), data.view(torch.uint8))
                assert scales is not None
                assert torch.equal(
                    scales[expert, at:end].contiguous().view(torch.int32),
                    sent_scales.contiguous().view(torch.int32),
                )
            at = end
        assert int(recv_count[expert]) == at


def expert_output(x: Tensor, expert: int) -> Tensor:
    """Return what an expert makes of bfloat16 rows: another for every expert."""
    return (x.float() * (1 + expert / 8)).bfloat16()


def as_logfmt(rows: Tensor) -> Tensor:
    """Return what arrives of bfloat16 rows that are sent as LogFMT."""
    return logfmt.decode(logfmt.encode(rows))


def expected_combined(
    case: PackedCase,
    rank: int,
    step: int = 0,
    masked: tuple[int, ...] = (),
    as_sent: Callable[[Tensor], Tensor] = Tensor.float,
) -> Tensor:
    """Return the weighted sum in slot order, addend by addend, in float32.

    `as_sent` makes float32 `[M, H]` of the experts' bfloat16 rows: what of them arrives.
    """
    x, idx, weights = case.x(rank, step), case.topk_idx(rank, step), case.weights(rank, step)
    total = torch.zeros(x.shape)
    for token, experts in enumerate(idx.tolist()):
        for slot, expert in enumerate(experts):
            if expert < 0 or expert // case.experts_per_rank in masked:
                continue
            row = as_sent(expert_output(x[token : token + 1], expert))[0]
            total[token] += row * weights[token, slot]
    return total.bfloat16()
