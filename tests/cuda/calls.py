"""Calls drawn by a seed, of every dtype, layout and cast that the kernels have."""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_megatron import fp8
from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.routing import Case
from tests.test_dispatch import bits

RECIPES = [
    FP8,
    Fp8Recipe(scales="ue8m0"),
    Fp8Recipe(scales="packed_ue8m0", layout="column_major"),
    MXFP8,
    replace(MXFP8, scales="packed_ue8m0"),
]
STYLES = ["random", "random", "holes", "one_expert", "repeated", "local", "first_rank"]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Drawn:
    """One dispatch, combines of what came, and a cached dispatch."""

    case: Case
    dtype: torch.dtype
    summed: torch.dtype  # of combined rows that come from elsewhere
    expand: bool
    weights: torch.dtype | None
    recipe: Fp8Recipe | None
    is_cast_by_caller: bool
    in_arena: bool  # the received rows themselves are combined
    num_biases: int


def draw(num_ranks: int, seed: int) -> Drawn:
    """Return the call of a seed, the same on every rank."""
    rng = random.Random(1000 * num_ranks + seed)
    # Four kernels, with weights of three kinds and indices of two: each after each.
    kind, weights, idx_dtype = seed % 4, seed // 4 % 3, seed // 12 % 2
    is_cast_by_caller = kind == 0 and rng.random() < 0.4
    recipe = rng.choice(RECIPES) if kind or is_cast_by_caller else None
    dtype = FLOATS[kind - 1] if kind else rng.choice(FLOATS[:3] if recipe else FLOATS)
    columns = [8, 40, 264, 520, 784, 1032, 2056]
    if recipe is not None:
        columns = [512, 1024] if recipe.scales == "packed_ue8m0" else [128, 512, 640]
        if recipe is MXFP8:
            columns = [96, 640, 4352]
    many = num_ranks > 4  # then one rank's tokens are enough, to many ranks
    num_tokens = [24 if many and not r else rng.choice([0, 1, 9]) for r in range(num_ranks)]
    case = Case(
        f"seed {seed}",
        tuple(num_tokens),
        num_topk=8 if many else rng.choice([1, 2, 3, 6, 8, 9, 17, 32]),
        experts_per_rank=rng.choice([1, 2, 5, 12]),
        hidden=rng.choice(columns[:3] if many else columns),
        style=rng.choice(["random", "holes"] if many else STYLES),
        idx_dtype=[torch.int64, torch.int32][idx_dtype],
        alignment=rng.choice([1, 4, 16]),
    )
    return Drawn(
        case,
        dtype,
        FLOATS[(seed + seed // 4) % 4],
        rng.random() < (0.2 if many else 0.75),
        [torch.float32, torch.float64, None][weights],
        recipe,
        is_cast_by_caller,
        rng.random() < 0.5,
        rng.choice([0, 0, 1, 2]),
    )


def same(mine: Tensor | None, other: Tensor | None, drawn: Drawn) -> None:
    """Compare bits."""
    assert (mine is None) == (other is None), drawn
    if mine is not None and other is not None:
        assert mine.dtype == other.dtype, drawn
        assert mine.shape == other.shape, drawn
        mine, other = (t.clone(memory_format=torch.contiguous_format) for t in (mine, other))
        assert torch.equal(bits(mine), bits(other)), drawn


def same_rows(mine: Rows, other: Rows, drawn: Drawn) -> None:
    """Compare all that arrived."""
    for name in ("x", "scales", "topk_weights", "topk_idx"):
        same(getattr(mine, name), getattr(other, name), drawn)


def sent_of(rank: int, drawn: Drawn) -> Rows:
    """Return what a rank dispatches."""
    x = drawn.case.x(rank, drawn.dtype)
    weights = None if drawn.weights is None else drawn.case.weights(rank, drawn.weights)
    if not drawn.is_cast_by_caller:
        return Rows(x, topk_weights=weights, fp8=drawn.recipe)
    assert drawn.recipe is not None
    data, scales = fp8.quantize(x, replace(drawn.recipe, layout="row_major"))
    return Rows(data, scales, weights)


def check_drawn(backend: Backend, reference: Backend, seeds: range) -> None:
    """Make the calls of some seeds over both; every bit must be equal."""
    for seed in seeds:
        drawn = draw(backend.num_ranks, seed)
        check(backend, reference, drawn)


def check(backend: Backend, reference: Backend, drawn: Drawn) -> None:
    """See `check_drawn`."""
    case, rank = drawn.case, backend.rank
    sent = sent_of(rank, drawn)
    routing = Routing(case.topk_idx(rank), case.num_experts, drawn.expand, case.alignment)
    mine, handle = backend.dispatch(sent, routing)
    other, other_handle = reference.dispatch(sent, routing)
    same_rows(mine, other, drawn)
    assert torch.equal(handle.routes, other_handle.routes)
    # Twice the rows that came, where they lie; or rows from elsewhere.
    rows, other_rows = mine, other
    if sent.scales is not None or drawn.recipe is not None or not drawn.in_arena:
        rng = torch.Generator().manual_seed(rank)
        y = torch.randn(handle.num_recv_rows, case.hidden, generator=rng)
        y = y.to(drawn.summed)
        y.view(-1)[::7] = -0.0
        rows, other_rows = (Rows(y, topk_weights=r.topk_weights) for r in (mine, other))
    else:
        rows.x.mul_(2)
        other_rows.x.mul_(2)
    bias = case.x(rank, rows.x.dtype)
    biases = [bias + 1, bias * 3][: drawn.num_biases]
    for got, wanted in zip(
        backend.combine(rows, handle, biases),
        reference.combine(other_rows, other_handle, biases),
        strict=True,
    ):
        same(got, wanted, drawn)
    again = replace(sent, x=sent.x.flip(0))
    same_rows(
        backend.dispatch_again(again, handle),
        reference.dispatch_again(again, other_handle),
        drawn,
    )
