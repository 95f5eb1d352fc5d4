"""FP8 dispatch on every backend: rows, scales and widened rows are the reference's, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ep_megatron import Buffer, DispatchHandle, fp8
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.ranks import run_on_ranks
from tests.routing import CASES, Case, expected_rows
from tests.test_dispatch import BACKENDS, bits, buffer_of

FP8_CASES = [replace(case, hidden=512 if case.hidden == 40 else case.hidden) for case in CASES]
RECIPES = [
    FP8,
    Fp8Recipe(scales="packed_ue8m0", layout="column_major"),
    replace(MXFP8, layout="column_major"),
    replace(MXFP8, scales="packed_ue8m0"),
]


def sent_rows(case: Case, rank: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes; one has a NaN, one an infinity."""
    x = case.x(rank, torch.float64)
    x *= torch.exp2(torch.arange(case.hidden) % 37 - 18 - torch.arange(len(x))[:, None] % 5)
    x = x.to(dtype)
    x[3:4, 100], x[4:5, 200] = torch.nan, -torch.inf
    return x


def expected_fp8(
    case: Case, rank: int, expand: bool, recipe: Fp8Recipe, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantise explicitly, then put every row where it belongs; padding is zeros."""
    quantised = [
        fp8.quantize(sent_rows(case, source, dtype), replace(recipe, layout="row_major"))
        for source in range(case.num_ranks)
    ]
    rows = expected_rows(case, rank, expand).rows
    data = torch.zeros(len(rows), case.hidden, dtype=torch.uint8)
    scales = torch.zeros(len(rows), recipe.num_scales(case.hidden), dtype=recipe.scale_dtype)
    for at, row in enumerate(rows):
        if row is not None:
            data[at] = quantised[row[0]][0].view(torch.uint8)[row[1]]
            scales[at] = quantised[row[0]][1][row[1]]
    return data.view(torch.float8_e4m3fn), scales


def check_received(received: object, expected: tuple[Tensor, Tensor], recipe: Fp8Recipe) -> None:
    assert isinstance(received, tuple)
    data, scales = received
    assert data.dtype == torch.float8_e4m3fn
    assert torch.equal(bits(data), bits(expected[0]))
    assert scales.dtype == recipe.scale_dtype
    assert scales.shape == expected[1].shape
    assert torch.equal(bits(scales.reshape(-1)), bits(expected[1].reshape(-1)))
    if recipe.layout == "row_major":
        assert scales.is_contiguous()
    elif len(scales):
        padded = fp8.column_rows(len(scales))
        assert scales.stride() == (1, padded)
        rest = scales.as_strided((padded, scales.shape[1]), (1, padded))[len(scales) :]
        assert not rest.any()


def check_fp8(rank: int, backend: str, case: Case, recipes: list[Fp8Recipe]) -> None:
    buffer = buffer_of(backend)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for index, recipe in enumerate(recipes):
        for expand in (False, True):
            dtype = dtypes[(index + expand) % 3]
            x = sent_rows(case, rank, dtype)
            expected = expected_fp8(case, rank, expand, recipe, dtype)
            received, idx, weights, _, handle, _ = buffer.dispatch(
                x,
                topk_idx=case.topk_idx(rank),
                topk_weights=case.weights(rank),
                num_experts=case.num_experts,
                expand=expand,
                expert_alignment=case.alignment,
                fp8=recipe,
            )
            assert handle is not None
            check_received(received, expected, recipe)
            check_received(buffer.dispatch(x, handle, fp8=recipe)[0], expected, recipe)
            check_widened(rank, buffer, case, handle, recipe, (x, expected))
            plain = buffer.dispatch(x, handle, topk_weights=case.weights(rank))
            assert weights is not None
            assert plain[2] is not None
            assert torch.equal(weights, plain[2])
            assert (idx is None) == expand


def check_widened(
    rank: int,
    buffer: Buffer,
    case: Case,
    handle: DispatchHandle,
    recipe: Fp8Recipe,
    sent: tuple[Tensor, tuple[Tensor, Tensor]],
) -> None:
    """Widened rows, of fresh and cached dispatches, and of rows that the caller quantised."""
    x, expected = sent
    for dtype in fp8.INPUT_DTYPES:
        wide = fp8.dequantize(*expected, dtype)
        rows, idx, weights, _, _, _ = buffer.dispatch(
            x,
            topk_idx=case.topk_idx(rank),
            topk_weights=case.weights(rank),
            num_experts=case.num_experts,
            expand=handle.expand,
            expert_alignment=case.alignment,
            fp8=recipe,
            widen_to=dtype,
        )
        pair = fp8.quantize(x, replace(recipe, layout="row_major"))
        cached = buffer.dispatch(x, handle, fp8=recipe, widen_to=dtype)[0]
        by_caller = buffer.dispatch(pair, handle, widen_to=dtype)[0]
        for each in (rows, cached, by_caller):
            assert isinstance(each, Tensor)
            assert each.dtype == dtype
            assert torch.equal(bits(each), bits(wide))
        assert (idx is None) == handle.expand
        assert weights is not None
        assert len(weights) == len(wide)


def check_arena_is_returned(rank: int) -> None:
    """Widened rows, and the weights beside them, do not hold the FP8 rows they came from."""
    case = Case("arena", (600, 500), num_topk=4, hidden=2048)
    buffer = buffer_of("shared_memory")
    backend = buffer._backend
    before = backend.num_bytes_in_use  # type: ignore[attr-defined]
    rows, _, weights, _, _, _ = buffer.dispatch(
        case.x(rank, torch.bfloat16),
        topk_idx=case.topk_idx(rank),
        topk_weights=case.weights(rank),
        num_experts=case.num_experts,
        fp8=FP8,
        widen_to=torch.bfloat16,
    )
    assert isinstance(rows, Tensor)
    assert weights is not None
    held = backend.num_bytes_in_use - before  # type: ignore[attr-defined]
    assert rows.nbytes <= held < 1.25 * rows.nbytes
    del rows
    assert backend.num_bytes_in_use == before  # type: ignore[attr-defined]


def check_errors(rank: int, backend: str) -> None:
    """What one rank gets wrong is a ValueError on both, and the buffer goes on."""
    case = Case("errors", (4, 4), hidden=256)
    buffer = buffer_of(backend)
    x, options = case.x(rank, torch.bfloat16), {"num_experts": case.num_experts}
    pair = fp8.quantize(x)

    def fails(match: str, x: object = x, **changes: object) -> None:
        with pytest.raises(ValueError, match=match):
            buffer.dispatch(x, topk_idx=case.topk_idx(rank), **options, **changes)  # type: ignore[arg-type]

    fails("dispatch: expected fp8 to be an Fp8Recipe or None, got str", fp8="fp8")
    fails("dispatch: expected x to be a tensor when fp8 is given", pair, fp8=FP8)
    fails(r"x to be \[..., H\] with H a multiple of 128, got \[4, 64\]", x[:, :64], fp8=FP8)
    fails(r"H a multiple of 512", fp8=Fp8Recipe(scales="packed_ue8m0"))
    fails(r"expected x to be bfloat16, float16 or float32, got torch.float64", x.double(), fp8=FP8)
    fails("expected widen_to to be None for rows that are not FP8", widen_to=torch.bfloat16)
    fails("expected widen_to to be one of bfloat16.*float64", pair, widen_to=torch.float64)
    fails("expected scales to be float32", (pair[0], pair[1][:, :1]), widen_to=torch.bfloat16)
    fails("the FP8 recipe to be the same on all ranks.*block=128.*block=32", fp8=(FP8, MXFP8)[rank])
    fails("the FP8 recipe to be the same on all ranks.*none on rank 1", fp8=(FP8, None)[rank])
    fails("H a multiple of 128", x[:, : (256, 64)[rank]], fp8=FP8)
    received = buffer.dispatch(x, topk_idx=case.topk_idx(rank), **options, fp8=FP8)[0]  # type: ignore[arg-type]
    check_received(received, expected_of(case, rank), FP8)


def expected_of(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    rows = expected_rows(case, rank, False).rows
    quantised = [fp8.quantize(case.x(source, torch.bfloat16)) for source in range(case.num_ranks)]
    data = [quantised[row[0]][0].view(torch.uint8)[row[1]] for row in rows if row]
    scales = [quantised[row[0]][1][row[1]] for row in rows if row]
    return torch.stack(data).view(torch.float8_e4m3fn), torch.stack(scales)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FP8_CASES[:-1], ids=lambda case: case.name)
def test_rows_arrive_as_the_reference_quantises_them(case: Case, backend: str) -> None:
    run_on_ranks(case.num_ranks, check_fp8, backend, case, RECIPES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_wide_rows(backend: str) -> None:
    case = replace(FP8_CASES[-1], num_tokens=(150, 250), hidden=2048)
    run_on_ranks(2, check_fp8, backend, case, [RECIPES[1]])


def test_widened_rows_return_the_fp8_rows_to_the_arena() -> None:
    run_on_ranks(2, check_arena_is_returned)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_what_was_expected_on_all_ranks(backend: str) -> None:
    run_on_ranks(2, check_errors, backend)
