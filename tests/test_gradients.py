"""Gradients through dispatch and combine, against a dense layer in float64."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from ep_megatron import Buffer, fused_combine, fused_dispatch, fused_dispatch_fp8
from ep_megatron.experts import GroupedExperts, moe_forward, moe_reference
from ep_megatron.fp8 import FP8, Fp8Recipe
from ep_megatron.handle import CapacityHandle
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import BACKENDS, buffer_of

CASES = [
    Case("one rank", (6,), hidden=8),
    Case("two ranks", (7, 5), hidden=8),
    Case("empty rank", (0, 9), hidden=8),
    Case("repeated", (5, 6), num_topk=4, hidden=8, style="repeated"),
    Case("holes", (9, 9, 9, 9), num_topk=4, hidden=8, style="holes"),
    Case("one expert", (6, 5), hidden=8, style="one_expert"),
]


def assert_exact(actual: Tensor | None, expected: Tensor | None) -> None:
    """Equal in float64 up to the order of sums."""
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def all_experts(case: Case) -> GroupedExperts:
    experts = GroupedExperts(case.num_experts, case.hidden, 6, dtype=torch.float64)
    rng = torch.Generator().manual_seed(7)  # the ranks may be threads, which share torch's own
    with torch.no_grad():
        for weight in (experts.gate_up, experts.down):
            weight.normal_(std=weight.shape[1] ** -0.5, generator=rng)
    return experts


def local_experts(case: Case, rank: int) -> GroupedExperts:
    experts = GroupedExperts(case.experts_per_rank, case.hidden, 6, dtype=torch.float64)
    local = slice(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
    full = all_experts(case)
    with torch.no_grad():
        experts.gate_up.copy_(full.gate_up[local])
        experts.down.copy_(full.down[local])
    return experts


def leaves(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    x = case.x(rank, torch.float64).requires_grad_()
    router = torch.randn(
        case.hidden, case.num_topk, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    ).requires_grad_()
    weights = (x @ router).sigmoid()
    weights.retain_grad()
    return x, router, weights


def check_gradients(rank: int, backend: str, case: Case) -> None:
    check_gradients_of(rank, buffer_of(backend), case)


def check_gradients_of(rank: int, buffer: Buffer, case: Case) -> None:
    """x, weights, router and expert weights get the gradients of a dense layer."""
    experts = local_experts(case, rank)
    x, router, weights = leaves(case, rank)
    out = moe_forward(x, case.topk_idx(rank), weights, experts, buffer)
    target = case.x(rank, torch.float64).cos()
    (out * target).sum().backward()

    dense = all_experts(case)
    expected = []
    for source in range(case.num_ranks):  # expert gradients are sums over all ranks' tokens
        other = leaves(case, source)
        reference = moe_reference(other[0], case.topk_idx(source), other[2], dense)
        (reference * case.x(source, torch.float64).cos()).sum().backward()
        expected.append((*other, reference))
    ref_x, ref_router, ref_weights, reference = expected[rank]
    assert_exact(out, reference)
    assert_exact(x.grad, ref_x.grad)
    assert_exact(weights.grad, ref_weights.grad)
    assert_exact(router.grad, ref_router.grad)
    local = slice(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
    for ours, theirs in ((experts.gate_up, dense.gate_up), (experts.down, dense.down)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_exact(ours.grad, theirs.grad[local])


def check_gradcheck(rank: int, backend: str, expand: bool) -> None:
    """torch.autograd.gradcheck, whose perturbed input belongs to one rank at a time."""
    case = Case("small", (3, 2), num_topk=2, experts_per_rank=2, hidden=2)
    buffer = buffer_of(backend)
    for owner in range(case.num_ranks):
        x = case.x(rank, torch.float64).requires_grad_(rank == owner)
        weights = case.weights(rank, torch.float64).requires_grad_(rank == owner)

        def layer(x: Tensor, weights: Tensor) -> Tensor:
            rows, _, row_weights, handle = fused_dispatch(
                x, case.topk_idx(rank), weights, case.num_experts, buffer, expand=expand
            )
            assert row_weights is not None
            factor = row_weights if expand else row_weights.sum(1)
            combined = fused_combine(rows * factor[:, None].sin(), handle, buffer)
            # Every rank's output, so that the owner sees what its tokens do elsewhere too.
            return torch.cat([combined, combined.sum().expand(1, case.hidden)])

        if rank == owner:
            (reference,) = torch.autograd.grad(layer(x, weights).sum(), x, retain_graph=True)
            eps = 1e-6
            for index in range(x.numel()):
                values = []
                for sign in (1, -1):
                    moved = x.detach().clone()
                    moved.view(-1)[index] += sign * eps
                    values.append(layer(moved, weights.detach()).sum())
                numeric = (values[0] - values[1]) / (2 * eps)
                assert_close(reference.view(-1)[index], numeric, atol=1e-7, rtol=1e-7)
        else:
            other = x.detach().requires_grad_()
            out = layer(other, weights)
            torch.autograd.grad(out.sum(), other)
            for _ in range(2 * case.num_tokens[owner] * case.hidden):
                layer(other.detach(), weights.detach())


def check_gradcheck_alone(rank: int, backend: str) -> None:
    """Run gradcheck itself: every rank perturbs the same input, on a group of one."""
    case = Case("alone", (4,), num_topk=2, experts_per_rank=3, hidden=2)
    buffer = buffer_of(backend)
    for expand in (False, True):

        def layer(x: Tensor, weights: Tensor, expand: bool = expand) -> Tensor:
            rows, _, row_weights, handle = fused_dispatch(
                x, case.topk_idx(0), weights, case.num_experts, buffer, expand=expand
            )
            assert row_weights is not None
            factor = row_weights if expand else row_weights.sum(1)
            return fused_combine(rows * factor[:, None].sin(), handle, buffer)

        x = case.x(0, torch.float64).requires_grad_()
        weights = case.weights(0, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(layer, (x, weights))


def check_two_in_flight(rank: int, backend: str) -> None:
    """Two graphs at a time, backward in either order; strided and expanded gradients."""
    case = Case("flight", (6, 5), hidden=8)
    buffer = buffer_of(backend)
    grads = []
    for order in ((0, 1), (1, 0)):
        xs = [case.x(rank, torch.float64).mul(i + 1).requires_grad_() for i in range(2)]
        outs = []
        for x in xs:
            rows, _, _, handle = fused_dispatch(
                x, case.topk_idx(rank), None, case.num_experts, buffer, expand=True
            )
            outs.append(fused_combine(rows.sin(), handle, buffer))
        for index in order:
            outs[index].sum().backward()  # the gradient of sum() is an expanded view
        grads.append([x.grad for x in xs])
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    x = case.x(rank, torch.float64).requires_grad_()
    rows, _, _, handle = fused_dispatch(
        x, case.topk_idx(rank), None, case.num_experts, buffer, expand=True
    )
    out = fused_combine(rows.sin(), handle, buffer)
    out.backward(torch.ones(case.hidden, len(out), dtype=torch.float64).T)
    first = grads[0][0]
    assert x.grad is not None
    assert first is not None
    assert torch.equal(x.grad, first)


def check_bfloat16(rank: int, backend: str) -> None:
    """bfloat16 rows with float32 weights: gradients have the leaves' dtypes and are close."""
    case = Case("bf16", (33, 47), num_topk=4, experts_per_rank=4, hidden=64)
    buffer = buffer_of(backend)
    x = case.x(rank, torch.bfloat16).requires_grad_()
    weights = case.weights(rank).requires_grad_()
    rows, _, row_weights, handle = fused_dispatch(
        x, case.topk_idx(rank), weights, case.num_experts, buffer, expand=True
    )
    assert row_weights is not None
    fused_combine((rows * row_weights[:, None]).bfloat16(), handle, buffer).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32
    used = case.topk_idx(rank) >= 0
    total = (case.weights(rank) * used).sum(1, keepdim=True).expand(-1, case.hidden)
    # Each of the K addends and the sum are rounded to 8 bits of mantissa.
    assert_close(x.grad.float(), total, rtol=5 * 2**-8, atol=1e-3)
    row_sums = case.x(rank, torch.bfloat16).float().sum(1, keepdim=True)
    assert_close(weights.grad, row_sums * used, rtol=1e-2, atol=0.1)
    dist.barrier()


def check_capacity(rank: int, backend: str, recipe: Fp8Recipe | None, expand: bool) -> None:
    """Into a fixed number of rows: the same results, and zeros behind the rows that came."""
    case = Case("capacity", (9, 6), hidden=128, alignment=4)
    buffer = buffer_of(backend)
    results: list[list[Tensor]] = []
    for capacity in (0, 80):
        x = case.x(rank, torch.float32).requires_grad_()
        weights = case.weights(rank).requires_grad_()
        rows, _, row_weights, handle = fused_dispatch(
            x,
            case.topk_idx(rank),
            weights,
            case.num_experts,
            buffer,
            expand=expand,
            expert_alignment=case.alignment,
            num_worst_tokens=capacity,
            fp8=recipe,
        )
        assert row_weights is not None
        rows.retain_grad()
        factor = row_weights if expand else row_weights.sum(1)
        # Not zero where rows are: what the experts make of padding must not come back.
        y = (rows * factor[:, None]).cos()
        y.retain_grad()
        out = fused_combine(y, handle, buffer, grad_fp8=recipe and replace(recipe, min_amax=1e-30))
        (out * x.detach()).sum().backward()
        num_rows = handle.num_recv_rows
        if isinstance(handle, CapacityHandle):
            assert num_rows == capacity
            num_rows = int(handle.num_recv_rows_tensor)
            for part in (rows, row_weights, rows.grad, y.grad):
                assert part is not None
                assert not part[num_rows:].any()
        found = (out, rows[:num_rows], x.grad, weights.grad, y.grad)
        results.append([part[:num_rows] if part is y.grad else part for part in found])  # type: ignore
    assert len(results[0][1]) > 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def check_fp8_capacity(rank: int, backend: str) -> None:
    """Rows handed on as FP8 are zeros behind those that came, and so are their scales."""
    case = Case("capacity", (5, 6), hidden=256)
    recipe = Fp8Recipe(layout="column_major")
    rows, _, _, handle = fused_dispatch_fp8(
        case.x(rank, torch.float32).requires_grad_(),
        case.topk_idx(rank),
        None,
        case.num_experts,
        buffer_of(backend),
        fp8=recipe,
        num_worst_tokens=16,
    )
    assert isinstance(handle, CapacityHandle)
    num_rows = int(handle.num_recv_rows_tensor)
    assert 0 < num_rows < len(rows.data) == 16
    assert not rows.widen()[num_rows:].any()
    assert not rows.scales[num_rows:].any()
    assert rows.scales[:num_rows].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expand", [False, True], ids=["by_rank", "by_expert"])
@pytest.mark.parametrize("recipe", [None, FP8], ids=["exact", "fp8"])
def test_a_fixed_number_of_rows_changes_no_result(
    backend: str, expand: bool, recipe: Fp8Recipe | None
) -> None:
    run_on_ranks(2, check_capacity, backend, recipe, expand)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_rows_of_a_fixed_number_end_in_zeros(backend: str) -> None:
    run_on_ranks(2, check_fp8_capacity, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_equal_those_of_a_dense_layer(case: Case, backend: str) -> None:
    run_on_ranks(case.num_ranks, check_gradients, backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expand", [False, True], ids=["by_rank", "by_expert"])
def test_gradients_equal_differences(backend: str, expand: bool) -> None:
    run_on_ranks(2, check_gradcheck, backend, expand)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    run_on_ranks(1, check_gradcheck_alone, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_graphs_in_flight(backend: str) -> None:
    run_on_ranks(2, check_two_in_flight, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients(backend: str) -> None:
    run_on_ranks(2, check_bfloat16, backend)
