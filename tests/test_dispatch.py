"""Dispatch and combine on every backend: exact rows, exact sums, adjointness."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig, DispatchHandle
from tests.ranks import run_on_ranks
from tests.routing import CASES, Case, expected_rows

BACKENDS = ("process_group", "shared_memory", "hierarchical")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HANDLE_TENSORS = ("route_rank", "route_row", "route_slot")
HANDLE_NUMBERS = (
    "num_tokens",
    "num_rows_per_rank",
    "num_tokens_per_rank",
    "num_recv_tokens_per_rank",
    "num_recv_tokens_per_expert",
    "num_valid_tokens_per_expert",
)


@functools.cache
def buffer_of(backend: str, streaming_bytes: int | None = None) -> Buffer:
    """One Buffer per rank process and backend, as in training: tests share it, in order."""
    assert dist.group.WORLD is not None
    # On hosts that are so by name: even and odd ranks.
    host_id = f"host {dist.get_rank() % 2}"
    config = BufferConfig(
        backend=backend, timeout=30, streaming_bytes=streaming_bytes, host_id=host_id
    )
    return Buffer(dist.group.WORLD, config=config)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def send(
    buffer: Buffer, case: Case, rank: int, expand: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, DispatchHandle]:
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        case.x(rank, dtype),
        topk_idx=case.topk_idx(rank),
        topk_weights=case.weights(rank),
        num_experts=case.num_experts,
        expand=expand,
        expert_alignment=case.alignment,
    )
    assert handle is not None
    assert isinstance(recv_x, Tensor)
    assert recv_weights is not None
    assert counts == list(handle.num_recv_tokens_per_expert)
    return recv_x, recv_idx, recv_weights, handle


def check_rows(rank: int, backend: str, case: Case, expand: bool) -> None:
    """What arrives is what the definition says, row for row, with weights and expert ids."""
    buffer = buffer_of(backend)
    recv_x, recv_idx, recv_weights, handle = send(buffer, case, rank, expand, torch.bfloat16)
    expected = expected_rows(case, rank, expand)
    assert len(recv_x) == len(expected.rows) == handle.num_recv_rows
    assert list(handle.num_recv_tokens_per_expert) == expected.blocks
    xs = [case.x(source, torch.bfloat16) for source in range(case.num_ranks)]
    weights = [case.weights(source) for source in range(case.num_ranks)]
    idxs = [case.topk_idx(source) for source in range(case.num_ranks)]
    first = rank * case.experts_per_rank
    for at, row in enumerate(expected.rows):
        if row is None:
            assert not recv_x[at].any()
            assert recv_weights[at] == 0
            continue
        source, token, slot = row
        assert torch.equal(recv_x[at], xs[source][token])
        if expand:
            assert recv_weights[at] == weights[source][token, slot]
            continue
        assert recv_idx is not None
        assert recv_idx.dtype == case.idx_dtype
        local = idxs[source][token] - first
        is_local = (local >= 0) & (local < case.experts_per_rank)
        assert torch.equal(recv_idx[at], torch.where(is_local, local, -1).to(case.idx_dtype))
        assert torch.equal(recv_weights[at], torch.where(is_local, weights[source][token], 0.0))


def check_backends_agree(rank: int, case: Case, dtype: torch.dtype) -> None:
    """Shared memory gives the bits of the process group: handles, rows, sums, weights, biases."""
    reference = buffer_of("process_group")
    for expand in (False, True):
        for streaming_bytes in (0, 1 << 40):
            fast = buffer_of("shared_memory", streaming_bytes)
            ours = send(fast, case, rank, expand, dtype)
            theirs = send(reference, case, rank, expand, dtype)
            for mine, other in zip(ours[:3], theirs[:3], strict=True):
                assert (mine is None) == (other is None)
                if mine is not None and other is not None:
                    assert torch.equal(bits(mine), bits(other))
            for name in HANDLE_TENSORS:
                assert torch.equal(getattr(ours[3], name), getattr(theirs[3], name)), name
            for name in HANDLE_NUMBERS:
                assert getattr(ours[3], name) == getattr(theirs[3], name), name
            check_sums_agree(rank, fast, reference, (ours[3], theirs[3]), case, dtype)


def check_sums_agree(
    rank: int,
    fast: Buffer,
    reference: Buffer,
    handles: tuple[DispatchHandle, DispatchHandle],
    case: Case,
    dtype: torch.dtype,
) -> None:
    rng = torch.Generator().manual_seed(rank)
    shape = (handles[0].num_recv_rows, case.hidden)
    y = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    y.view(-1)[::7] = -0.0
    columns = shape[:1] if handles[0].expand else (shape[0], case.num_topk)
    weights = torch.randn(columns, generator=rng)
    biases = [case.x(rank, dtype) + 1, case.x(rank, dtype) * 3]
    for bias in (None, biases[0], tuple(biases)):
        ours = fast.combine(y, handles[0], topk_weights=weights, bias=bias)
        theirs = reference.combine(y, handles[1], topk_weights=weights, bias=bias)
        assert torch.equal(bits(ours[0]), bits(theirs[0]))
        assert ours[1] is not None
        assert theirs[1] is not None
        assert torch.equal(bits(ours[1]), bits(theirs[1]))
    sent = case.x(rank, dtype).flip(0)
    ours_again = fast.dispatch(sent, handles[0], topk_weights=case.weights(rank))
    theirs_again = reference.dispatch(sent, handles[1], topk_weights=case.weights(rank))
    for index in (0, 2):
        mine, other = ours_again[index], theirs_again[index]
        assert isinstance(mine, Tensor)
        assert isinstance(other, Tensor)
        assert torch.equal(bits(mine), bits(other))


def check_sum(rank: int, backend: str, case: Case) -> None:
    """Combine adds each token's rows, here recognisable ones, in float64."""
    buffer = buffer_of(backend)
    for expand in (False, True):
        *_, handle = send(buffer, case, rank, expand, torch.float64)
        rows = expected_rows(case, rank, expand).rows
        y = torch.zeros(len(rows), case.hidden, dtype=torch.float64)
        for at in range(len(rows)):
            y[at] = rank + 1 + 100 * at
        expected = torch.zeros(case.num_tokens[rank], case.hidden, dtype=torch.float64)
        for other in range(case.num_ranks):
            for at, row in enumerate(expected_rows(case, other, expand).rows):
                if row is not None and row[0] == rank:
                    expected[row[1]] += other + 1 + 100 * at
        assert torch.equal(buffer.combine(y, handle)[0], expected)


def check_adjoint(rank: int, backend: str, case: Case) -> None:
    """<dispatch(x), y> == <x, combine(y)>, summed over ranks: each is the other's transpose."""
    buffer = buffer_of(backend)
    for expand in (False, True):
        recv_x, _, _, handle = send(buffer, case, rank, expand, torch.float64)
        y = torch.randn(recv_x.shape, generator=torch.Generator().manual_seed(rank)).double()
        returned = buffer.combine(y, handle)[0]
        products = torch.stack([(recv_x * y).sum(), (case.x(rank, torch.float64) * returned).sum()])
        dist.all_reduce(products)
        torch.testing.assert_close(products[0], products[1], rtol=1e-12, atol=1e-12)


def check_fp8_rows(rank: int, backend: str) -> None:
    """Rows quantised by the caller travel with their scales, whatever the scales' strides."""
    case = Case("fp8", (6, 5), hidden=256, alignment=4)
    buffer = buffer_of(backend)
    data = case.x(rank, torch.float32).to(torch.float8_e4m3fn)
    scales = torch.rand(2, case.num_tokens[rank], generator=torch.Generator().manual_seed(rank)).T
    everyone = [
        (
            case.x(source, torch.float32).to(torch.float8_e4m3fn),
            torch.rand(2, case.num_tokens[source], generator=torch.Generator().manual_seed(source)),
        )
        for source in range(2)
    ]
    for expand in (False, True):
        received, _, _, _, handle, _ = buffer.dispatch(
            (data, scales),
            topk_idx=case.topk_idx(rank),
            num_experts=case.num_experts,
            expand=expand,
            expert_alignment=case.alignment,
        )
        assert isinstance(received, tuple)
        rows, recv_scales = received
        assert rows.dtype == torch.float8_e4m3fn
        for at, row in enumerate(expected_rows(case, rank, expand).rows):
            if row is None:
                assert not bits(rows[at]).any()
                assert not recv_scales[at].any()
                continue
            source, token, _ = row
            assert torch.equal(bits(rows[at]), bits(everyone[source][0][token]))
            assert torch.equal(recv_scales[at], everyone[source][1][:, token])
        again = buffer.dispatch((data, scales), handle)[0]
        assert isinstance(again, tuple)
        assert torch.equal(bits(again[0]), bits(rows))


def check_handles_are_values(rank: int, backend: str) -> None:
    """Several handles in flight, used in reverse order; strided input; a repeated combine."""
    buffer = buffer_of(backend)
    cases = [Case("a", (5, 7)), Case("b", (3, 0), num_topk=2), Case("c", (8, 8), style="holes")]
    sent = [send(buffer, case, rank, True, torch.float32) for case in cases]
    for case, (recv_x, _, _, handle) in zip(reversed(cases), reversed(sent), strict=True):
        num_used = (case.topk_idx(rank) >= 0).sum(1, keepdim=True)
        strided = torch.stack([recv_x, recv_x], dim=2)[:, :, 0]
        assert not strided.is_contiguous() or strided.numel() == 0
        for _ in range(2):
            combined = buffer.combine(strided, handle)[0]
            torch.testing.assert_close(combined, case.x(rank, torch.float32) * num_used)


@pytest.mark.parametrize("expand", [False, True], ids=["by_rank", "by_expert"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_rows_arrive_in_order(case: Case, backend: str, expand: bool) -> None:
    run_on_ranks(case.num_ranks, check_rows, backend, case, expand)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backends_give_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    run_on_ranks(case.num_ranks, check_backends_agree, case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_combine_sums_every_row_of_a_token(case: Case, backend: str) -> None:
    run_on_ranks(case.num_ranks, check_sum, backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_combine_is_the_adjoint_of_dispatch(case: Case, backend: str) -> None:
    run_on_ranks(case.num_ranks, check_adjoint, backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_rows_travel_with_their_scales(backend: str) -> None:
    run_on_ranks(2, check_fp8_rows, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_handles_are_values(backend: str) -> None:
    run_on_ranks(2, check_handles_are_values, backend)
