"""The CUDA backend on emulated GPUs gives the reference's bits, and raises what it must.

The kernels are those of the built extension; see tests/cuda/emulated.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from ep_megatron.handle import DispatchHandle
from tests.routing import CASES, Case
from tests.test_dispatch import HANDLE_NUMBERS, bits

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.emulated import Ranks

SMALL = [case for case in CASES if case.hidden <= 64]
RECIPES = [
    FP8,
    Fp8Recipe(scales="packed_ue8m0", layout="column_major"),
    replace(MXFP8, layout="column_major"),
]


def same(mine: Tensor | None, other: Tensor | None) -> None:
    assert (mine is None) == (other is None)
    if mine is not None and other is not None:
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert torch.equal(bits(mine), bits(other))


def same_rows(mine: Rows, other: Rows) -> None:
    for name in ("x", "scales", "topk_weights", "topk_idx"):
        same(getattr(mine, name), getattr(other, name))


def same_handles(mine: DispatchHandle, other: DispatchHandle) -> None:
    assert torch.equal(mine.routes, other.routes)
    for name in HANDLE_NUMBERS:
        assert getattr(mine, name) == getattr(other, name), name


def check_case(
    backend: Backend, reference: Backend, case: Case, dtype: torch.dtype, expand: bool
) -> None:
    """Every operation on one routing, with weights, biases, signed zeros and NaNs."""
    rank = backend.rank
    routing = Routing(case.topk_idx(rank), case.num_experts, expand, case.alignment)
    sent = Rows(case.x(rank, dtype), topk_weights=case.weights(rank))
    (mine, handle), (other, other_handle) = (
        b.dispatch(sent, routing) for b in (backend, reference)
    )
    same_rows(mine, other)
    same_handles(handle, other_handle)
    rng = torch.Generator().manual_seed(rank)
    y = torch.randn(handle.num_recv_rows, case.hidden, generator=rng, dtype=torch.float64)
    y.view(-1)[::7] = -0.0
    columns = (len(y),) if expand else (len(y), case.num_topk)
    rows = Rows(y.to(dtype), topk_weights=torch.randn(columns, generator=rng))
    biases = [case.x(rank, dtype) + 1, case.x(rank, dtype) * 3]
    for used in ([], biases[:1], biases):
        for got, wanted in zip(
            backend.combine(rows, handle, used),
            reference.combine(rows, other_handle, used),
            strict=True,
        ):
            same(got, wanted)
    again = Rows(case.x(rank, dtype).flip(0), topk_weights=case.weights(rank, torch.float64))
    same_rows(backend.dispatch_again(again, handle), reference.dispatch_again(again, other_handle))


def check_fp8(
    backend: Backend, reference: Backend, case: Case, recipe: Fp8Recipe, dtype: torch.dtype
) -> None:
    """Rows are cast on their way; NaN and infinity spread over their block alone."""
    x = case.x(backend.rank, torch.float64)
    x *= torch.exp2(torch.arange(case.hidden) % 37 - 18 - torch.arange(len(x))[:, None] % 5)
    x = x.to(dtype)
    x[3:4, 100], x[4:5, 200] = torch.nan, -torch.inf
    for expand in (False, True):
        routing = Routing(case.topk_idx(backend.rank), case.num_experts, expand, case.alignment)
        for widen_to in (None, torch.float32):
            sent = Rows(x, topk_weights=case.weights(backend.rank), fp8=recipe, widen_to=widen_to)
            (mine, handle), (other, _) = (b.dispatch(sent, routing) for b in (backend, reference))
            same_rows(mine, other)
        same_rows(
            backend.dispatch_again(Rows(x.flip(0), fp8=recipe), handle),
            reference.dispatch_again(Rows(x.flip(0), fp8=recipe), _),
        )


def no_report(ranks: Ranks) -> None:
    assert ranks.machine.report() == []


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_operation_gives_the_bits_of_the_reference(case: Case) -> None:
    ranks = Ranks(case.num_ranks)
    for dtype in (torch.bfloat16, torch.float32):
        for expand in (False, True):
            ranks.run(check_case, case, dtype, expand)
    no_report(ranks)
