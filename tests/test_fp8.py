"""The FP8 reference against a scalar one in numpy, and its stated error bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_megatron import fp8

FORMATS: list[fp8.ScaleFormat] = ["float32", "ue8m0"]
each_format = pytest.mark.parametrize("scale_format", FORMATS)
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


def reference(x: torch.Tensor, scale_format: str) -> tuple[np.ndarray, np.ndarray]:
    blocks = x.float().numpy().reshape(*x.shape[:-1], -1, 128)
    amax = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-4))
    if scale_format == "ue8m0":
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


@each_format
@each_dtype
def test_quantize_is_the_scalar_reference_bit_for_bit(
    scale_format: fp8.ScaleFormat, dtype: torch.dtype
) -> None:
    x = random_rows(40, 1024, dtype, seed=1)
    data, scales = fp8.quantize(x, scale_format)
    expected_data, expected_scales = reference(x, scale_format)
    assert data.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert data.is_contiguous()
    assert scales.is_contiguous()
    np.testing.assert_array_equal(bytes_of(data).numpy(), expected_data)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)


@each_format
def test_every_bfloat16_magnitude_as_the_largest_of_its_block(
    scale_format: fp8.ScaleFormat,
) -> None:
    # 448 / amax and reciprocal(amax) * 448 differ for many of these: a wrong division is seen.
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[:, None] * torch.linspace(-1, 1, 128)
    data, scales = fp8.quantize(x, scale_format)
    expected_data, expected_scales = reference(x, scale_format)
    np.testing.assert_array_equal(bytes_of(data).numpy(), expected_data)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    amax = every.float().clamp(min=1e-4)
    limit = torch.full_like(amax, 448.0)
    assert not torch.equal(limit / amax, amax.reciprocal() * 448)


def test_the_worked_example() -> None:
    # The largest magnitude is 896: scale 2 in both formats, so data is x / 2, rounded to e4m3.
    # 17 / 2 = 8.5 is a tie of 8 and 9, even is 8; 19 / 2 = 9.5 of 9 and 10, even is 10;
    # 2^-9 / 2 = 2^-10 is a tie of 0 and the smallest subnormal, even is 0; -0.0 keeps its sign.
    x = torch.zeros(1, 256)
    x[0, :6] = torch.tensor([896.0, -896.0, 17.0, 19.0, 2.0**-9, -0.0])
    x[0, 128] = 1e-6  # scaled as if 1e-4 were there
    for scale_format in FORMATS:
        data, scales = fp8.quantize(x, scale_format)
        assert scales[0, 0] == 2
        assert data[0, :6].float().tolist() == [448.0, -448.0, 8.0, 10.0, 0.0, -0.0]
        assert bytes_of(data)[0, 5] == 0x80
    small = torch.tensor(1e-4) / torch.tensor(448.0)
    assert fp8.quantize(x)[1][0, 1] == small
    assert fp8.quantize(x, "ue8m0")[1][0, 1] == 2.0**-22
    assert 2.0**-23 < small < 2.0**-22


@each_format
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=repr)
def test_a_block_with_a_nan_or_infinity_becomes_nan_and_no_other(
    scale_format: fp8.ScaleFormat, dtype: torch.dtype, bad: float
) -> None:
    x = random_rows(3, 384, dtype, seed=2)
    clean_data, clean_scales = fp8.quantize(x, scale_format)
    x[1, 200] = bad
    data, scales = fp8.quantize(x, scale_format)
    assert (bytes_of(data)[1, 128:256] == 0x7F).all()
    assert scales[1, 1].isnan()
    assert not scales[1, 1].signbit()
    assert fp8.dequantize(data, scales)[1, 128:256].isnan().all()
    data[1, 128:256] = clean_data[1, 128:256]
    scales[1, 1] = clean_scales[1, 1]
    assert torch.equal(bytes_of(data), bytes_of(clean_data))
    assert torch.equal(scales, clean_scales)


@each_format
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=128
    ),
    dtype=st.sampled_from(fp8.OUTPUT_DTYPES),
)
def test_the_error_stays_in_the_bound(
    scale_format: fp8.ScaleFormat, values: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=torch.float64).repeat(128)[:128].float()[None]
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) * (1 - 2.0**-5)
    x = x.clamp(-largest, largest)
    data, scales = fp8.quantize(x, scale_format)
    error = (fp8.dequantize(data, scales, dtype).double() - x.double()).abs()
    assert (error <= fp8.error_bound(x, scales, dtype).double()).all()


@each_format
def test_the_bound_is_reached_within_a_percent(scale_format: fp8.ScaleFormat) -> None:
    x = random_rows(64, 1024, torch.float32, seed=3)
    data, scales = fp8.quantize(x, scale_format)
    error = (fp8.dequantize(data, scales, torch.float32) - x).abs()
    ratio = error / fp8.error_bound(x, scales)
    assert 0.99 < ratio.max() <= 1
    is_normal = x.abs() >= scales.repeat_interleave(128, -1) * 2.0**-6
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
    again = fp8.dequantize(*fp8.quantize(x, "ue8m0"), dtype)
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


@each_format
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (2, 3, 128), (128,)], ids=str)
def test_empty_and_batched_shapes(scale_format: fp8.ScaleFormat, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    data, scales = fp8.quantize(x, scale_format)
    assert data.shape == x.shape
    assert scales.shape == (*shape[:-1], shape[-1] // 128)
    assert fp8.dequantize(data, scales).shape == x.shape
    flat_data, flat_scales = fp8.quantize(x.reshape(-1, 128), scale_format)
    assert torch.equal(bytes_of(data).flatten(), bytes_of(flat_data).flatten())
    assert torch.equal(scales.flatten(), flat_scales.flatten())


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
    scales = fp8.quantize(x, "ue8m0")[1]
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
    with pytest.raises(ValueError, match=r"quantize: expected scale_format .*, got 'e8m0'"):
        fp8.quantize(x, "e8m0")  # type: ignore[arg-type]
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
