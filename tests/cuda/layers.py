"""The public API over emulated GPUs: `Buffer`, autograd, FP8, capacities, forwards and backwards.

Everything is computed twice, by Buffers over the CUDA backend and over the process group between
the same threads, and all bits must be equal: outputs, received rows and gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from ep_megatron import Buffer, backends, fused_combine, fused_dispatch, fused_dispatch_fp8
from ep_megatron.backends.base import Backend
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from ep_megatron.handle import CapacityHandle, DispatchHandle
from tests.cuda.emulated import Ranks
from tests.routing import CASES, Case
from tests.test_dispatch import bits

SMALL = [case for case in CASES if case.hidden <= 64]
SPARE_ROWS = 3  # of a capacity


@dataclass(frozen=True)
class Form:
    """How a layer is computed.

    Attributes:
        dtype: of tokens and rows.
        expand: whether rows arrive by expert.
        weights: dtype of the weights.
        recipe: how tokens are cast on their way, if they are.
        is_handed_on: whether the experts get FP8 rows as they arrive.
        grad_recipe: how the gradient of the output is cast on its way.
        is_strided: whether tokens and the gradient of the output are not contiguous.
        is_within: whether rows arrive in a fixed number.
    """

    dtype: torch.dtype
    expand: bool
    weights: torch.dtype = torch.float32
    recipe: Fp8Recipe | None = None
    is_handed_on: bool = False
    grad_recipe: Fp8Recipe | None = None
    is_strided: bool = False
    is_within: bool = False


FORMS = [
    Form(torch.bfloat16, expand=True),
    Form(torch.bfloat16, expand=False, is_strided=True),
    Form(torch.float64, expand=True, weights=torch.float64, is_strided=True),
    Form(torch.bfloat16, expand=True, recipe=FP8, grad_recipe=replace(FP8, min_amax=1e-30)),
    Form(torch.float32, expand=False, recipe=MXFP8, is_handed_on=True),
    Form(torch.bfloat16, expand=True, recipe=FP8, is_within=True),
]


def strided(tensor: Tensor) -> Tensor:
    """Return the same numbers with a gap behind each."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def run_with_buffers(ranks: Ranks, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run as `Ranks.run`; meanwhile, in all threads, a Buffer takes the backend it is given."""
    with patch.object(backends, "choose", lambda group, _config: group):
        return ranks.run(function, *args)


def new_buffer(backend: Backend) -> Buffer:
    """Return a Buffer over a backend that is there already, inside `run_with_buffers`."""
    return Buffer(cast(Any, backend))


def layer(buffer: Buffer, case: Case, form: Form) -> list[Tensor]:
    """Return output, rows and gradients of one layer whose experts are sines."""
    hidden = 128 if form.recipe is not None else case.hidden
    case = replace(case, hidden=hidden)
    rank = buffer.rank
    leaf = case.x(rank, form.dtype).requires_grad_()
    x = strided(leaf) if form.is_strided else leaf
    weights = case.weights(rank, form.weights).requires_grad_()
    routing = (case.topk_idx(rank), weights, case.num_experts, buffer)
    order: dict[str, Any] = {"expand": form.expand, "expert_alignment": case.alignment}
    if form.is_within:
        order["num_worst_tokens"] = most_rows(case, form.expand) + SPARE_ROWS
    received = []
    if form.is_handed_on:
        assert form.recipe is not None
        arrived, _, row_weights, handle = fused_dispatch_fp8(x, *routing, **order, fp8=form.recipe)
        received += [arrived.data, arrived.scales]
        rows = arrived.widen()
    else:
        rows, _, row_weights, handle = fused_dispatch(x, *routing, **order, fp8=form.recipe)
    assert row_weights is not None
    if isinstance(handle, DispatchHandle):
        received.append(handle.routes)
    factor = row_weights if form.expand else row_weights.sum(1)
    y = (rows.double().sin() * factor[:, None]).to(form.dtype)
    out = fused_combine(y, handle, buffer, grad_fp8=form.grad_recipe)
    grad = case.x(rank, torch.float64).cos().to(form.dtype)
    out.backward(strided(grad) if form.is_strided else grad)
    assert leaf.grad is not None
    assert weights.grad is not None
    return [out, rows, row_weights, leaf.grad, weights.grad, *received]


def two_layers(buffer: Buffer, case: Case) -> list[Tensor]:
    """Two handles in flight; the backward passes come in the other order."""
    results, outs, leaves = [], [], []
    for factor in (1, 2):
        x = (case.x(buffer.rank, torch.float32) * factor).requires_grad_()
        rows, _, _, handle = fused_dispatch(
            x, case.topk_idx(buffer.rank), None, case.num_experts, buffer, expand=factor == 1
        )
        outs.append(fused_combine(rows.cos(), handle, buffer))
        leaves.append(x)
    for out in outs:
        out.sum().backward()  # an expanded gradient
    for x in leaves:
        assert x.grad is not None
        results.append(x.grad)
    return results


def most_rows(case: Case, expand: bool) -> int:
    """Return how many rows a rank may get, at least 1."""
    num_tokens = sum(len(case.topk_idx(rank)) for rank in range(case.num_ranks))
    if not expand:
        return max(num_tokens, 1)
    return num_tokens * case.num_topk + case.experts_per_rank * case.alignment


def within_capacity(buffer: Buffer, case: Case, form: Form) -> list[Tensor]:
    """A dispatch into a fixed number of rows, its combine, and another along its handle."""
    rank = buffer.rank
    case = replace(case, hidden=128 if form.recipe is not None else case.hidden)
    x, weights = case.x(rank, form.dtype), case.weights(rank, form.weights)
    capacity = most_rows(case, expand=False) + SPARE_ROWS
    cast_as: dict[str, Any] = {"fp8": form.recipe}
    received, idx, row_weights, _, handle, _ = buffer.dispatch(
        x,
        topk_idx=case.topk_idx(rank),
        topk_weights=weights,
        num_experts=case.num_experts,
        expert_alignment=case.alignment,
        num_worst_tokens=capacity,
        **cast_as,
    )
    assert isinstance(handle, CapacityHandle)
    assert idx is not None
    assert row_weights is not None
    num_rows = int(handle.num_recv_rows_tensor)
    parts: list[Tensor] = [*received] if isinstance(received, tuple) else [received]
    y = case.x(rank, torch.float64).sum() + torch.arange(
        capacity * case.hidden, dtype=torch.float64
    ).view(capacity, -1)
    summed, summed_weights, _ = buffer.combine(y.to(form.dtype), handle, topk_weights=row_weights)
    assert summed_weights is not None
    again = buffer.dispatch(x.flip(0), handle, topk_weights=weights, **cast_as)[0]
    parts += again if isinstance(again, tuple) else [again]
    counts = torch.tensor([num_rows, *handle.num_recv_tokens_per_expert.tolist()])
    return [idx, row_weights, summed, summed_weights, counts, *(part[:num_rows] for part in parts)]


def calls(buffer: Buffer, case: Case, forms: Sequence[Form]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield what each computation on one routing gives on one rank."""
    for form in forms:
        yield f"{form}", layer(buffer, case, form)
        if not form.expand:
            yield f"within a capacity, {form}", within_capacity(buffer, case, form)
    yield "two layers", two_layers(buffer, case)


def check(backend: Backend, reference: Backend, case: Case, forms: Sequence[Form]) -> int:
    """Compute on one rank over both; every bit must be equal. Returns how many tensors were."""
    num_same = 0
    for (what, mine), (_, other) in zip(
        calls(new_buffer(backend), case, forms),
        calls(new_buffer(reference), case, forms),
        strict=True,
    ):
        for at, (one, two) in enumerate(zip(mine, other, strict=True)):
            where = f"{case.name}, rank {backend.rank}, tensor {at} of {what}"
            assert (one.dtype, one.shape) == (two.dtype, two.shape), where
            assert torch.equal(bits(one.detach()), bits(two.detach())), where
            num_same += 1
    return num_same


def run(case: Case, seed: int, mode: str, forms: Sequence[Form] = FORMS) -> int:
    """Compute on all ranks; raise at a difference or a report. Returns the tensors compared."""
    ranks = Ranks(case.num_ranks, seed, mode)
    num_same: int = sum(run_with_buffers(ranks, check, case, forms))
    assert ranks.machine.report() == [], f"{case.name}, {mode}, seed {seed}"
    return num_same
