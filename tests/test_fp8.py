"""The FP8 reference against a scalar one in numpy, and its stated error bounds."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_megatron import fp8
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe

UE8M0 = Fp8Recipe(scales="ue8m0")
RECIPES = {"fp8": FP8, "ue8m0": UE8M0, "mxfp8": MXFP8, "blocks of 32": Fp8Recipe(block=32)}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
each_dtype = pytest.mark.parametrize(
    "dtype", fp8.INPUT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def decode_e4m3(byte: int) -> float:
    """Read a byte as e4m3fn by the format's definition."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 0xF, byte & 7
    if exponent == 0xF and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa * 2.0**-9)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


MAGNITUDES = np.array([decode_e4m3(byte) for byte in range(0x7F)])  # ascending, byte = index


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """Bytes of the nearest e4m3 numbers, ties to the even byte, saturated."""
    magnitude = np.abs(x.astype(np.float64))
    above = np.minimum(np.searchsorted(MAGNITUDES, magnitude), 0x7E)
    below = np.maximum(above - 1, 0)
    to_above, to_below = MAGNITUDES[above] - magnitude, magnitude - MAGNITUDES[below]
    is_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    return np.where(is_below, below, above) | np.where(np.signbit(x), 0x80, 0)


def reference(x: torch.Tensor, recipe: Fp8Recipe) -> tuple[np.ndarray, np.ndarray]:
    blocks = x.float().numpy().reshape(*x.shape[:-1], -1, recipe.block)
    amax = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(recipe.min_amax))
    if recipe.scales == "ue8m0":
        scales = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / 448))).astype(np.float32)
        scaled = blocks / scales
    else:
        scales = amax / np.float32(448)
        scaled = blocks * (np.float32(448) / amax)
    return nearest_e4m3(scaled).reshape(x.shape), scales[..., 0]


def random_rows(num_tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Gaussian blocks of very different size, some columns small in their block, one block 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=generator)
    exponent = torch.randint(-9, 9, (num_tokens, hidden // 128, 1), generator=generator)
    small = torch.randint(0, 14, (num_tokens, hidden // 128, 128), generator=generator)
    x = (x.view(num_tokens, -1, 128) * torch.exp2(exponent - small)).flatten(-2)
    x[0, :128] = 0
    return x.to(dtype)


def bytes_of(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8)


@each_recipe
@each_dtype
def test_quantize_is_the_scalar_reference_bit_for_bit(
    recipe: Fp8Recipe, dtype: torch.dtype
) -> None:
    x = random_rows(40, 1024, dtype, seed=1)
    data, scales = fp8.quantize(x, recipe)
    expected_data, expected_scales = reference(x, recipe)
    assert data.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert data.is_contiguous()
    assert scales.is_contiguous()
    np.testing.assert_array_equal(bytes_of(data).numpy(), expected_data)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)


@each_recipe
def test_every_bfloat16_magnitude_as_the_largest_of_its_block(
    recipe: Fp8Recipe,
) -> None:
    # 448 / amax and reciprocal(amax) * 448 differ for many of these: a wrong division is seen.
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[:, None] * torch.linspace(-1, 1, 128)
    data, scales = fp8.quantize(x, recipe)
    expected_data, expected_scales = reference(x, recipe)
    np.testing.assert_array_equal(bytes_of(data).numpy(), expected_data)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    amax = every.float().clamp(min=recipe.min_amax)
    limit = torch.full_like(amax, 448.0)
    assert not torch.equal(limit / amax, amax.reciprocal() * 448)


def test_the_worked_example() -> None:
    # The largest magnitude is 896: scale 2 in both formats, so data is x / 2, rounded to e4m3.
    # 17 / 2 = 8.5 is a tie of 8 and 9, even is 8; 19 / 2 = 9.5 of 9 and 10, even is 10;
    # 2^-9 / 2 = 2^-10 is a tie of 0 and the smallest subnormal, even is 0; -0.0 keeps its sign.
    x = torch.zeros(1, 256)
    x[0, :6] = torch.tensor([896.0, -896.0, 17.0, 19.0, 2.0**-9, -0.0])
    x[0, 128] = 1e-6  # scaled as if 1e-4 were there
    for recipe in (FP8, UE8M0):
        data, scales = fp8.quantize(x, recipe)
        assert scales[0, 0] == 2
        assert data[0, :6].float().tolist() == [448.0, -448.0, 8.0, 10.0, 0.0, -0.0]
        assert bytes_of(data)[0, 5] == 0x80
    small = torch.tensor(1e-4) / torch.tensor(448.0)
    assert fp8.quantize(x)[1][0, 1] == small
    assert fp8.quantize(x, UE8M0)[1][0, 1] == 2.0**-22
    assert 2.0**-23 < small < 2.0**-22


@each_recipe
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=repr)
def test_a_block_with_a_nan_or_infinity_becomes_nan_and_no_other(
    recipe: Fp8Recipe, dtype: torch.dtype, bad: float
) -> None:
    x = random_rows(3, 384, dtype, seed=2)
    clean_data, clean_scales = fp8.quantize(x, recipe)
    x[1, 200] = bad
    data, scales = fp8.quantize(x, recipe)
    block = 200 // recipe.block
    columns = slice(block * recipe.block, (block + 1) * recipe.block)
    assert (bytes_of(data)[1, columns] == 0x7F).all()
    assert scales[1, block].isnan()
    assert not scales[1, block].signbit()
    assert fp8.dequantize(data, scales)[1, columns].isnan().all()
    data[1, columns] = clean_data[1, columns]
    scales[1, block] = clean_scales[1, block]
    assert torch.equal(bytes_of(data), bytes_of(clean_data))
    assert torch.equal(scales, clean_scales)


@each_recipe
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=128
    ),
    dtype=st.sampled_from(fp8.OUTPUT_DTYPES),
)
def test_the_error_stays_in_the_bound(
    recipe: Fp8Recipe, values: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=torch.float64).repeat(128)[:128].float()[None]
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) * (1 - 2.0**-5)
    x = x.clamp(-largest, largest)
    data, scales = fp8.quantize(x, recipe)
    error = (fp8.dequantize(data, scales, dtype).double() - x.double()).abs()
    assert (error <= fp8.error_bound(x, scales, dtype).double()).all()


@each_recipe
def test_the_bound_is_reached_within_a_percent(recipe: Fp8Recipe) -> None:
    x = random_rows(64, 1024, torch.float32, seed=3)
    data, scales = fp8.quantize(x, recipe)
    error = (fp8.dequantize(data, scales, torch.float32) - x).abs()
    ratio = error / fp8.error_bound(x, scales)
    assert 0.99 < ratio.max() <= 1
    is_normal = x.abs() >= scales.repeat_interleave(recipe.block, -1) * 2.0**-6
    relative = (error / x.abs())[is_normal].max()
    assert 0.99 / 17 < relative < fp8.RELATIVE_ERROR * (1 + 1e-5)


def test_the_bound_of_a_nan_block_is_nan() -> None:
    x = torch.full((1, 256), torch.inf)
    x[0, 128:] = 1
    bound = fp8.error_bound(x, fp8.quantize(x)[1])
    assert bound[0, :128].isnan().all()
    assert bound[0, 128:].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    codes=st.lists(
        st.integers(0, 255).filter(lambda byte: byte & 0x7F != 0x7F), min_size=1, max_size=128
    ),
    exponent=st.integers(-22, 100),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_quantised_values_survive_another_round_trip_exactly(
    codes: list[int], exponent: int, dtype: torch.dtype
) -> None:
    codes = (codes * 128)[:128]
    data = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = fp8.dequantize(data, torch.full((1, 1), 2.0**exponent), dtype)
    again = fp8.dequantize(*fp8.quantize(x, UE8M0), dtype)
    assert torch.equal(again, x)
    # With float32 scales all but the last bit of the scale survives: the data are the same.
    if 0x7E in codes or 0xFE in codes:
        same, scales = fp8.quantize(x)
        assert torch.equal(bytes_of(same), bytes_of(data))
        assert scales.item() == 2.0**exponent


def test_dequantize_multiplies_in_float32_and_rounds_once() -> None:
    data = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)[None]
    scales = torch.tensor([[0.1, 3.0]])
    values = np.array([decode_e4m3(byte) for byte in range(256)], dtype=np.float32)
    product = torch.from_numpy(values * np.repeat(scales.numpy(), 128))[None]
    for dtype in fp8.OUTPUT_DTYPES:
        x = fp8.dequantize(data, scales, dtype)
        assert x.dtype == dtype
        assert torch.equal(x.nan_to_num(-1), product.to(dtype).nan_to_num(-1))


@each_recipe
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (2, 3, 128), (128,)], ids=str)
def test_empty_and_batched_shapes(recipe: Fp8Recipe, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    data, scales = fp8.quantize(x, recipe)
    assert data.shape == x.shape
    assert scales.shape == (*shape[:-1], shape[-1] // recipe.block)
    assert fp8.dequantize(data, scales).shape == x.shape
    flat_data, flat_scales = fp8.quantize(x.reshape(-1, 128), recipe)
    assert torch.equal(bytes_of(data).flatten(), bytes_of(flat_data).flatten())
    assert torch.equal(scales.flatten(), flat_scales.flatten())


@pytest.mark.parametrize("scales", ["float32", "ue8m0", "packed_ue8m0"])
@pytest.mark.parametrize("num_rows", [0, 1, 4, 7])
def test_column_major_scales_are_the_same_with_padded_columns(
    scales: fp8.ScaleFormat, num_rows: int
) -> None:
    x = random_rows(8, 1024, torch.bfloat16, seed=6)[:num_rows]
    data, rows = fp8.quantize(x, Fp8Recipe(scales=scales))
    same, columns = fp8.quantize(x, Fp8Recipe(scales=scales, layout="column_major"))
    assert torch.equal(bytes_of(data), bytes_of(same))
    assert torch.equal(rows, columns)
    assert columns.dtype == rows.dtype == Fp8Recipe(scales=scales).scale_dtype
    if num_rows:
        assert columns.stride() == (1, -(-num_rows // 4) * 4)
        padded = columns.as_strided((-(-num_rows // 4) * 4, columns.shape[1]), columns.stride())
        assert not padded[num_rows:].any()
    assert torch.equal(fp8.dequantize(data, columns), fp8.dequantize(data, rows))


@pytest.mark.parametrize("block", [32, 128])
def test_packed_recipes_are_ue8m0_ones_packed(block: fp8.BlockSize) -> None:
    x = random_rows(5, 1024, torch.bfloat16, seed=7)
    x[2, 300] = torch.nan
    data, scales = fp8.quantize(x, Fp8Recipe(block, "ue8m0"))
    same, packed = fp8.quantize(x, Fp8Recipe(block, "packed_ue8m0"))
    assert torch.equal(bytes_of(data), bytes_of(same))
    assert torch.equal(packed, fp8.pack_ue8m0(scales))
    # Its bytes are what Transformer Engine calls rowwise_scale_inv: one exponent per block.
    exponents = packed.view(torch.uint8)
    assert exponents.shape == scales.shape
    assert torch.equal(exponents.int() << 23 & 0x7F800000, scales.view(torch.int32) & 0x7F800000)
    widened, expected = fp8.dequantize(data, packed), fp8.dequantize(data, scales)
    assert torch.equal(widened.view(torch.int16), expected.view(torch.int16))


def test_mxfp8_exponents_are_those_of_transformer_engine_for_every_mantissa() -> None:
    # There the exponent comes from amax times the rounded 1/448, here from amax / 448.
    bits = torch.arange(1 << 23, dtype=torch.int32) | 127 << 23
    amax = bits.view(torch.float32)
    product = amax * torch.tensor(1 / 448, dtype=torch.float32)
    quotient = amax / torch.full_like(amax, 448.0)
    for exponent in (product, quotient):
        exponent.view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000)
    assert torch.equal(product, quotient)


def test_recipes_are_values_with_codes_of_their_own() -> None:
    recipes = [
        Fp8Recipe(block, scales, layout, min_amax)
        for block in get_args(fp8.BlockSize)
        for scales in get_args(fp8.ScaleFormat)
        for layout in get_args(fp8.ScaleLayout)
        for min_amax in (fp8.MIN_AMAX, fp8.TINY_AMAX, 1.0)
    ]
    codes = [recipe.code for recipe in recipes]
    assert len(set(codes)) == len(recipes)
    assert all(0 < code < 1 << 63 for code in codes)
    assert [Fp8Recipe.of_code(code).code for code in codes] == codes
    assert Fp8Recipe.of_code(FP8.code) == FP8
    assert fp8.wire_recipe("bf16") is None
    assert fp8.wire_recipe("fp8") == FP8
    assert fp8.wire_recipe("mxfp8", is_gradient=True) == MXFP8


def test_strided_and_differentiable_rows_are_read_as_they_are() -> None:
    x = random_rows(6, 512, torch.bfloat16, seed=4)
    data, scales = fp8.quantize(x)
    strided_data, strided_scales = fp8.quantize(x.t().contiguous().t().requires_grad_())
    assert not strided_scales.requires_grad
    assert strided_data.is_contiguous()
    assert torch.equal(bytes_of(strided_data), bytes_of(data))
    column_major = scales.t().contiguous().t()
    assert torch.equal(fp8.dequantize(data, column_major), fp8.dequantize(data, scales))


def test_packed_scales_are_the_exponents_lowest_byte_first() -> None:
    scales = torch.tensor([[1.0, 2.0, 0.5, 2.0**127, 0.0, 2.0**-126, torch.nan, -torch.nan]])
    packed = fp8.pack_ue8m0(scales)
    assert packed.dtype == torch.int32
    octets = [bytes([127, 128, 126, 254]), bytes([0, 1, 255, 255])]
    assert packed.tolist() == [[int.from_bytes(word, "little", signed=True) for word in octets]]
    unpacked = fp8.unpack_ue8m0(packed)
    assert torch.equal(unpacked[0, :6], scales[0, :6])
    assert unpacked[0, 6:].isnan().all()


def test_scales_of_quantize_survive_packing() -> None:
    x = random_rows(5, 1024, torch.bfloat16, seed=5)
    x[2, 300] = torch.nan
    scales = fp8.quantize(x, UE8M0)[1]
    packed = fp8.pack_ue8m0(scales)
    assert packed.shape == (5, 2)
    torch.testing.assert_close(fp8.unpack_ue8m0(packed), scales, rtol=0, atol=0, equal_nan=True)
    column_major = packed.t().contiguous().t()
    assert torch.equal(fp8.unpack_ue8m0(column_major).nan_to_num(-1), scales.nan_to_num(-1))
    assert fp8.unpack_ue8m0(fp8.pack_ue8m0(torch.zeros(3, 0))).shape == (3, 0)


@pytest.mark.parametrize("bad", [3.0, -1.0, -0.0, torch.inf, 2.0**-127], ids=str)
def test_packing_refuses_what_has_no_exponent_byte(bad: float) -> None:
    scales = torch.ones(2, 4)
    scales[1, 2] = bad
    with pytest.raises(ValueError, match=r"pack_ue8m0: expected scales to be powers of two"):
        fp8.pack_ue8m0(scales)


def test_bad_arguments_are_named() -> None:
    x, scales = torch.zeros(2, 256), torch.ones(2, 2)
    data = x.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"quantize: expected x .*float32, got torch.float64"):
        fp8.quantize(x.double())
    with pytest.raises(
        ValueError, match=r"quantize: expected x .* multiple of 128, got \[2, 200\]"
    ):
        fp8.quantize(x[:, :200])
    with pytest.raises(ValueError, match=r"Fp8Recipe: expected scales .*, got 'e8m0'"):
        Fp8Recipe(scales="e8m0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Fp8Recipe: expected block to be one of 32, 128, got 64"):
        Fp8Recipe(block=64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Fp8Recipe: expected min_amax .*, got 0"):
        Fp8Recipe(min_amax=0)
    with pytest.raises(ValueError, match=r"quantize: .* multiple of 512, got \[2, 256\]"):
        fp8.quantize(x, Fp8Recipe(scales="packed_ue8m0"))
    with pytest.raises(ValueError, match=r"quantize: .* \[M, H\] for column-major .*\[1, 2, 256\]"):
        fp8.quantize(x[None], Fp8Recipe(layout="column_major"))
    with pytest.raises(ValueError, match=r"wire_recipe: expected one of .*, got 'fp4'"):
        fp8.wire_recipe("fp4")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"dequantize: expected data to be float8_e4m3fn, got .*32"
    ):
        fp8.dequantize(x, scales)
    with pytest.raises(ValueError, match=r"dequantize: expected dtype .*, got torch.int32"):
        fp8.dequantize(data, scales, torch.int32)
    with pytest.raises(
        ValueError, match=r"dequantize: expected scales .* \[2, 2\] .*got .*\[2, 1\]"
    ):
        fp8.dequantize(data, scales[:, :1])
    with pytest.raises(ValueError, match=r"dequantize: expected data .* got \[2, 100\]"):
        fp8.dequantize(data[:, :100], scales)
    with pytest.raises(ValueError, match=r"error_bound: expected scales to be float32"):
        fp8.error_bound(x, scales.double())
    with pytest.raises(ValueError, match=r"pack_ue8m0: expected scales to be float32, got .*64"):
        fp8.pack_ue8m0(scales.double())
    with pytest.raises(ValueError, match=r"pack_ue8m0: expected .* multiple of 4 .*got \[2, 2\]"):
        fp8.pack_ue8m0(scales)
    with pytest.raises(ValueError, match=r"unpack_ue8m0: expected packed .* got \[2, 2\] torch.fl"):
        fp8.unpack_ue8m0(scales)
