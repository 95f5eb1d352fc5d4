"""FP8 rows: e4m3 data with one scale per token and 128 columns, in plain torch.

This is the reference that every compiled cast is compared with, bit for bit. A block, here, is 128
neighbouring columns of one token; `x ~ data * scale`.
"""

from typing import Literal, get_args

import torch

ScaleFormat = Literal["float32", "ue8m0"]

BLOCK = 128
MAX_E4M3 = 448.0
# A block of zeros or of almost nothing is scaled as if its largest magnitude were this.
MIN_AMAX = 1e-4
# Half the distance of neighbours, relative to a normal and absolute for a subnormal e4m3 number.
RELATIVE_ERROR = 2.0**-4
SUBNORMAL_ERROR = 2.0**-10

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUTPUT_DTYPES = (*INPUT_DTYPES, torch.float64)


@torch.no_grad()
def quantize(
    x: torch.Tensor, scale_format: ScaleFormat = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast rows to e4m3 with one scale per token and 128 columns.

    With `amax` the largest magnitude of a block, at least 1e-4:

    * `"float32"`: `scale = amax / 448`, `data = x * (448 / amax)`;
    * `"ue8m0"`: `scale` is the smallest power of two not below `amax / 448`, `data = x / scale`.

    All in float32, each operation rounded to nearest even, and `data` to e4m3 likewise; it never
    exceeds 448. A block that holds a NaN or an infinity, neither of which can be scaled, becomes
    NaN as a whole (every byte 0x7f, scale NaN); no other block of the row is touched by it.

    Not differentiable, not collective, and does not wait for the device.

    Args:
        x: `[..., H]` bfloat16, float16 or float32, any strides; H a multiple of 128.
        scale_format: `"float32"` or `"ue8m0"`.

    Returns:
        data: `[..., H]` float8_e4m3fn, contiguous.
        scales: `[..., H / 128]` float32, contiguous; powers of two for `"ue8m0"`.

    Raises:
        ValueError: another dtype, H not a multiple of 128, an unknown format.

    Source: the FP8 cast of DeepEP (csrc/kernels/utils.cuh, calculate_fp8_scales). Its kernel
        multiplies by 1/448 where its tests, and this function, divide: a float32 scale may
        differ from the kernel's in the last bit; data and ue8m0 scales do not.
    """
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(
            f"quantize: expected x to be bfloat16, float16 or float32, got {x.dtype}; "
            "cast it first, knowing its range"
        )
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"quantize: expected x to be [..., H] with H a multiple of {BLOCK}, "
            f"got {list(x.shape)}; pad the columns or send the rows unquantised"
        )
    if scale_format not in get_args(ScaleFormat):
        raise ValueError(
            f"quantize: expected scale_format to be one of {', '.join(get_args(ScaleFormat))}, "
            f"got {scale_format!r}"
        )
    blocks = _as_blocks(x.float())  # [..., H / 128, 128]
    amax = blocks.abs().amax(-1, keepdim=True)
    is_finite = amax.isfinite()  # amax of a block with a NaN is NaN
    amax = torch.where(is_finite, amax.clamp(min=MIN_AMAX), torch.nan)
    # NOTE: tensor by tensor: torch may divide by a number through its reciprocal, rounding twice.
    limit = torch.full_like(amax, MAX_E4M3)
    if scale_format == "ue8m0":
        scales = _round_up_to_power_of_two(amax / limit)
        scaled = blocks / scales
    else:
        scales = amax / limit
        scaled = blocks * (limit / amax)
    # No magnitude exceeds 448 by more than two float32 roundings, so e4m3 saturates by rounding.
    scaled = torch.where(is_finite, scaled, torch.nan)  # one NaN, whatever signs x had
    return scaled.to(torch.float8_e4m3fn).flatten(-2), scales.squeeze(-1)


@torch.no_grad()
def dequantize(
    data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Multiply e4m3 rows by their scales: one product in float32, one rounding to `dtype`.

    Not differentiable, not collective, and does not wait for the device.

    Args:
        data: `[..., H]` float8_e4m3fn.
        scales: `[..., H / 128]` float32, any strides.
        dtype: of the result: bfloat16, float16, float32 or float64.

    Returns:
        x: `[..., H]` of that dtype, contiguous.

    Raises:
        ValueError: another dtype, or shapes that do not belong together.
    """
    if data.dtype != torch.float8_e4m3fn:
        raise ValueError(f"dequantize: expected data to be float8_e4m3fn, got {data.dtype}")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"dequantize: expected dtype to be bfloat16, float16, float32 or float64, got {dtype}"
        )
    _check_scales("dequantize", "data", data, scales)
    return (_as_blocks(data.float()) * scales.unsqueeze(-1)).flatten(-2).to(dtype)


@torch.no_grad()
def error_bound(
    x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Bound |x - dequantize(quantize(x))| element by element.

    The relative error is at most 2^-4 where |x| is at least 2^-6 scale (normal e4m3 numbers). Below
    that the absolute error is at most 2^-10 scale, which is 2^-10 / 448 of the largest magnitude
    of the block (ue8m0: twice that). Float32 roundings add 2^-21 |x|, `dtype` adds its own.

    Holds while the result does not overflow `dtype`: a ue8m0 block whose largest magnitude is
    within 1/32 of the largest number of `dtype` may round up to infinity.

    Args:
        x: `[..., H]` the rows before quantize.
        scales: `[..., H / 128]` float32, from quantize in either format.
        dtype: what dequantize is asked for.

    Returns:
        bound: `[..., H]` float32; NaN in blocks that quantize made NaN.

    Raises:
        ValueError: shapes that do not belong together, scales that are not float32.
    """
    _check_scales("error_bound", "x", x, scales)
    magnitude = _as_blocks(x.float().abs())
    info = torch.finfo(dtype)
    bound = torch.maximum(magnitude * RELATIVE_ERROR, scales.unsqueeze(-1) * SUBNORMAL_ERROR)
    rounding = (magnitude + bound) * (info.eps / 2) + info.smallest_normal * info.eps / 2
    return (bound + magnitude * 2.0**-21 + rounding).flatten(-2)


@torch.no_grad()
def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Pack the exponents of power-of-two scales, four to an int32, the first in the lowest byte.

    A byte is the biased exponent of the float32, as DeepEP packs it: 2^k becomes k + 127, NaN 255,
    and 0.0 (the scale of a padding row) 0. Not differentiable; waits for the device to check.

    Args:
        scales: `[..., S]` float32, each 0, NaN or 2^k with -126 <= k <= 127; S a multiple of 4
            (H a multiple of 512).

    Returns:
        packed: `[..., S / 4]` int32, contiguous.

    Raises:
        ValueError: another dtype or S, or a scale that is no such number.
    """
    if scales.dtype != torch.float32:
        raise ValueError(f"pack_ue8m0: expected scales to be float32, got {scales.dtype}")
    if scales.dim() == 0 or scales.shape[-1] % 4:
        raise ValueError(
            "pack_ue8m0: expected scales to be [..., S] with S a multiple of 4 (H of 512), "
            f"got {list(scales.shape)}"
        )
    bits = scales.abs().view(torch.int32)  # a NaN without its sign is byte 255 alone
    is_power = (bits & 0x7FFFFF == 0) & scales.isfinite() & ~scales.signbit()
    is_valid = is_power | scales.isnan()
    if not is_valid.all():
        raise ValueError(
            "pack_ue8m0: expected scales to be powers of two from 2^-126, 0 or NaN, "
            f'got {scales[~is_valid][0].item():g}; quantise with scale_format="ue8m0"'
        )
    first, second, third, fourth = (bits >> 23).unflatten(-1, (bits.shape[-1] // 4, 4)).unbind(-1)
    packed: torch.Tensor = first | second << 8 | third << 16 | fourth << 24
    return packed


@torch.no_grad()
def unpack_ue8m0(packed: torch.Tensor) -> torch.Tensor:
    """Undo pack_ue8m0: byte 255 gives NaN, byte 0 gives 0.0.

    Not differentiable, not collective, and does not wait for the device.

    Args:
        packed: `[..., P]` int32, any strides.

    Returns:
        scales: `[..., 4 * P]` float32, contiguous.

    Raises:
        ValueError: another dtype.
    """
    if packed.dtype != torch.int32 or packed.dim() == 0:
        raise ValueError(
            f"unpack_ue8m0: expected packed to be [..., P] int32, "
            f"got {list(packed.shape)} {packed.dtype}"
        )
    exponents = torch.stack([packed >> shift & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(-2)
    scales = (exponents << 23).view(torch.float32)
    return torch.where(exponents == 0xFF, torch.nan, scales)


def _as_blocks(x: torch.Tensor) -> torch.Tensor:
    blocks: torch.Tensor = x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    return blocks


def _round_up_to_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """Round positive normal float32 numbers up; a NaN stays one."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFFFF & 0x7F800000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


def _check_scales(operation: str, name: str, x: torch.Tensor, scales: torch.Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"{operation}: expected {name} to be [..., H] with H a multiple of {BLOCK}, "
            f"got {list(x.shape)}"
        )
    expected = [*x.shape[:-1], x.shape[-1] // BLOCK]
    if scales.dtype != torch.float32 or list(scales.shape) != expected:
        raise ValueError(
            f"{operation}: expected scales to be float32 {expected} for {name} {list(x.shape)}, "
            f"got {scales.dtype} {list(scales.shape)}; unpack_ue8m0 turns packed scales into these"
        )
