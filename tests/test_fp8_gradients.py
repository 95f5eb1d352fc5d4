"""Gradients through FP8 dispatch: those of a reference that casts explicitly, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_megatron import Buffer, Fp8Recipe, fp8, fused_combine, fused_dispatch, fused_dispatch_fp8
from ep_megatron.fp8 import FP8, MXFP8
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import BACKENDS, bits, buffer_of

CASES = [
    Case("one rank", (6,), hidden=256),
    Case("two ranks", (7, 5), hidden=256, alignment=8),
    Case("empty rank", (0, 9), hidden=256),
    Case("holes", (9, 9, 9, 9), num_topk=4, hidden=256, style="holes", alignment=4),
]
GRAD_FP8 = replace(FP8, min_amax=fp8.TINY_AMAX)


def cast(x: Tensor, recipe: Fp8Recipe) -> Tensor:
    return fp8.dequantize(*fp8.quantize(x, recipe), x.dtype)


class CastGradient(torch.autograd.Function):
    """The identity, whose backward pass casts."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return cast(grad.contiguous(), GRAD_FP8)


def run(
    buffer: Buffer, case: Case, rank: int, expand: bool, dtype: torch.dtype, how: str
) -> list[Tensor]:
    """Return output, rows and gradients of a layer, cast in one of three ways."""
    x = case.x(rank, dtype).requires_grad_()
    topk_weights = case.weights(rank).requires_grad_()
    routing = (case.topk_idx(rank), topk_weights, case.num_experts, buffer)
    order = {"expand": expand, "expert_alignment": case.alignment}
    if how == "explicit":
        sent = cast(x.detach(), FP8).requires_grad_()
        rows, _, row_weights, handle = fused_dispatch(sent, *routing, **order)  # type: ignore[arg-type]
    elif how == "widened":
        sent = x
        rows, _, row_weights, handle = fused_dispatch(x, *routing, **order, fp8=FP8)  # type: ignore[arg-type]
    else:
        sent = x
        fp8_rows, _, row_weights, handle = fused_dispatch_fp8(x, *routing, **order, fp8=FP8)  # type: ignore[arg-type]
        assert fp8_rows.carrier.untyped_storage().nbytes() == dtype.itemsize
        rows = fp8_rows.widen()
    assert row_weights is not None
    assert rows.dtype == dtype
    factor = row_weights if expand else row_weights.sum(1)
    y = (rows.float().sin() * factor[:, None]).to(dtype)
    if how == "explicit":
        out = CastGradient.apply(fused_combine(y, handle, buffer))
    else:
        out = fused_combine(y, handle, buffer, grad_fp8=GRAD_FP8)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank)) * 1e-6
    out.backward(seed.to(dtype))
    assert sent.grad is not None
    assert topk_weights.grad is not None
    return [out.detach(), rows.detach(), sent.grad, topk_weights.grad]


def check_gradients(rank: int, backend: str, case: Case) -> None:
    buffer = buffer_of(backend)
    for expand in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            expected = run(buffer, case, rank, expand, dtype, "explicit")
            for how in ("widened", "handed on"):
                actual = run(buffer, case, rank, expand, dtype, how)
                for mine, theirs in zip(actual, expected, strict=True):
                    assert torch.equal(bits(mine), bits(theirs)), how
            if len(expected[2]):
                assert expected[2].any()  # gradients of 1e-6 are not lost below the floor


def test_small_gradients_need_a_small_floor() -> None:
    x = torch.full((4, 256), 1e-12)
    assert not cast(x, FP8).any()
    assert torch.allclose(cast(x, GRAD_FP8), x, rtol=2.0**-4)
    assert torch.allclose(cast(x, MXFP8), x, rtol=2.0**-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_an_explicit_cast(case: Case, backend: str) -> None:
    run_on_ranks(case.num_ranks, check_gradients, backend, case)
