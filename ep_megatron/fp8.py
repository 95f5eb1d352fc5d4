"""FP8 rows: e4m3 data with one scale per token and block of columns, in plain torch.

This is the reference that every compiled cast is compared with, bit for bit. A block is 128 or 32
neighbouring columns of one token; `x ~ data * scale`. `Fp8Recipe` says which, and what scales are.
"""

import struct
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

BlockSize = Literal[32, 128]
ScaleFormat = Literal["float32", "ue8m0", "packed_ue8m0"]
ScaleLayout = Literal["row_major", "column_major"]
WireDtype = Literal["bf16", "fp8", "mxfp8"]

MAX_E4M3 = 448.0
# A block of zeros or of almost nothing is scaled as if its largest magnitude were this.
MIN_AMAX = 1e-4
# The same for gradients, and for MXFP8, which has no floor of its own: scales, and their
# reciprocals, are still normal float32 numbers.
TINY_AMAX = 2.0**-110
# Column-major scales have their rows padded to a multiple of it: 16 bytes, as TMA wants.
COLUMN_ALIGNMENT = 4
# Half the distance of neighbours, relative to a normal and absolute for a subnormal e4m3 number.
RELATIVE_ERROR = 2.0**-4
SUBNORMAL_ERROR = 2.0**-10

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUTPUT_DTYPES = (*INPUT_DTYPES, torch.float64)


@dataclass(frozen=True)
class Fp8Recipe:
    """How rows become e4m3 and what their scales look like; a value.

    Attributes:
        block: columns that share a scale: 128 (DeepEP, DeepSeek-V3) or 32 (MXFP8).
        scales: `"float32"`; `"ue8m0"`, powers of two as float32; or `"packed_ue8m0"`, their
            exponents, four to an int32 (H a multiple of four blocks).
        layout: of the scales `[M, S]`: `"row_major"`, or `"column_major"` with strides
            `(1, M rounded up to a multiple of 4)`, which TMA can read.
        min_amax: blocks of smaller magnitudes are scaled as if their largest were this. From
            2^-110 to 2^110; activations take DeepEP's 1e-4, gradients are too small for it.

    Raises:
        ValueError: for another value of one of them.
    """

    block: BlockSize = 128
    scales: ScaleFormat = "float32"
    layout: ScaleLayout = "row_major"
    min_amax: float = MIN_AMAX

    def __post_init__(self) -> None:
        choices = (("block", BlockSize), ("scales", ScaleFormat), ("layout", ScaleLayout))
        for name, values in choices:
            if getattr(self, name) not in get_args(values):
                raise ValueError(
                    f"Fp8Recipe: expected {name} to be one of "
                    f"{', '.join(map(str, get_args(values)))}, got {getattr(self, name)!r}"
                )
        if not TINY_AMAX <= self.min_amax <= 1 / TINY_AMAX:
            raise ValueError(
                f"Fp8Recipe: expected min_amax to be from 2^-110 to 2^110, got {self.min_amax!r}"
            )

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scales tensor: int32 for packed ones, else float32."""
        return torch.int32 if self.scales == "packed_ue8m0" else torch.float32

    def num_scales(self, hidden: int) -> int:
        """Return S, the columns of the scales of rows `[M, hidden]`."""
        return hidden // (self.block * 4 if self.scales == "packed_ue8m0" else self.block)

    def check_rows(self, operation: str, name: str, x: Tensor) -> None:
        """Raise a ValueError unless rows `x [..., H]` can be quantised by this recipe."""
        if x.dtype not in INPUT_DTYPES:
            raise ValueError(
                f"{operation}: expected {name} to be bfloat16, float16 or float32, got {x.dtype}; "
                "cast it first, knowing its range"
            )
        multiple = self.block * (4 if self.scales == "packed_ue8m0" else 1)
        if x.dim() == 0 or x.shape[-1] % multiple:
            raise ValueError(
                f"{operation}: expected {name} to be [..., H] with H a multiple of {multiple}, "
                f"got {list(x.shape)}; pad the columns or send the rows unquantised"
            )
        if self.layout == "column_major" and x.dim() != 2:
            raise ValueError(
                f"{operation}: expected {name} to be [M, H] for column-major scales, "
                f"got {list(x.shape)}"
            )

    def new_scales(self, num_rows: int, hidden: int, device: torch.device | str) -> Tensor:
        """Return uninitialised scales `[num_rows, S]` in this layout; their padding is zero."""
        columns = self.num_scales(hidden)
        if self.layout == "row_major":
            return torch.empty(num_rows, columns, dtype=self.scale_dtype, device=device)
        return new_columns(num_rows, columns, self.scale_dtype, device)

    @property
    def code(self) -> int:
        """A positive number that only equal recipes share; `of_code` undoes it."""
        amax = struct.unpack("<I", struct.pack("<f", self.min_amax))[0]
        scales = get_args(ScaleFormat).index(self.scales)
        layout = get_args(ScaleLayout).index(self.layout)
        return int(amax << 16 | layout << 12 | scales << 8 | self.block)

    @staticmethod
    def of_code(code: int) -> "Fp8Recipe":
        """Return the recipe of a code; `min_amax` to seven digits."""
        return Fp8Recipe(
            32 if code & 0xFF == 32 else 128,
            get_args(ScaleFormat)[code >> 8 & 0xF],
            get_args(ScaleLayout)[code >> 12 & 0xF],
            float(f"{struct.unpack('<f', struct.pack('<I', code >> 16))[0]:.7g}"),
        )


FP8 = Fp8Recipe()
MXFP8 = Fp8Recipe(block=32, scales="ue8m0", min_amax=TINY_AMAX)


def wire_recipe(name: WireDtype, *, is_gradient: bool = False) -> Fp8Recipe | None:
    """Return how rows travel for a config's word: `bf16` (as they are), `fp8` or `mxfp8`."""
    if name not in get_args(WireDtype):
        raise ValueError(
            f"wire_recipe: expected one of {', '.join(get_args(WireDtype))}, got {name!r}"
        )
    if name == "bf16":
        return None
    recipe = FP8 if name == "fp8" else MXFP8
    return replace(recipe, min_amax=TINY_AMAX) if is_gradient else recipe


def column_rows(num_rows: int) -> int:
    """Return the words of each column of column-major scales, padding included."""
    return -(-num_rows // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def new_columns(
    num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return zeros `[num_rows, num_columns]`, column-major, each padded to a multiple of 4."""
    stride = column_rows(num_rows)
    return torch.zeros(num_columns, stride, dtype=dtype, device=device).T[:num_rows]


def in_columns(scales: Tensor) -> Tensor:
    """Return a copy of scales `[M, S]` in the column-major layout."""
    num_rows, num_columns = scales.shape
    return new_columns(num_rows, num_columns, scales.dtype, scales.device).copy_(scales)


@torch.no_grad()
def quantize(x: Tensor, recipe: Fp8Recipe = FP8) -> tuple[Tensor, Tensor]:
    """Cast rows to e4m3 with one scale per token and block.

    With `amax` the largest magnitude of a block, at least `min_amax`:

    * float32 scales: `scale = amax / 448`, `data = x * (448 / amax)`;
    * ue8m0: `scale` is the smallest power of two not below `amax / 448`, `data = x / scale`.

    All in float32, each operation rounded to nearest even, and `data` to e4m3 likewise; it never
    exceeds 448, and -0.0 keeps its sign. A block that holds a NaN or an infinity, neither of which
    can be scaled, becomes NaN as a whole (every byte 0x7f, scale NaN); no other block of the row
    is touched by it.

    Not differentiable, not collective, and does not wait for the device.

    Args:
        x: `[..., H]` bfloat16, float16 or float32, any strides; H a multiple of the block (of four
            for packed scales).
        recipe: block, scales and their layout.

    Returns:
        data: `[..., H]` float8_e4m3fn, contiguous.
        scales: `[..., H / block]` float32, or int32 with a quarter of the columns.

    Raises:
        ValueError: another dtype or H.

    Source: the FP8 cast of DeepEP (csrc/kernels/utils.cuh, calculate_fp8_scales). Its kernel
        multiplies by 1/448 where its tests, and this function, divide: a float32 scale may
        differ from the kernel's in the last bit; data and ue8m0 scales do not. MXFP8 is Transformer
        Engine's (common/util/ptx.cuh, float_to_e8m0): the exponent of `amax * (1/448)` rounded up,
        which for every float32 is that of `amax / 448`. There only zeros and magnitudes below
        2^-110 have other scales, and a NaN or infinity does not spread over its block.
    """
    recipe.check_rows("quantize", "x", x)
    blocks = _as_blocks(x.float(), recipe.block)  # [..., H / block, block]
    amax = blocks.abs().amax(-1, keepdim=True)
    is_finite = amax.isfinite()  # amax of a block with a NaN is NaN
    amax = torch.where(is_finite, amax.clamp(min=recipe.min_amax), torch.nan)
    # NOTE: tensor by tensor: torch may divide by a number through its reciprocal, rounding twice.
    limit = torch.full_like(amax, MAX_E4M3)
    if recipe.scales == "float32":
        scales = amax / limit
        scaled = blocks * (limit / amax)
    else:
        scales = _round_up_to_power_of_two(amax / limit)
        scaled = blocks / scales
    # No magnitude exceeds 448 by more than two float32 roundings, so e4m3 saturates by rounding.
    scaled = torch.where(is_finite, scaled, torch.nan)  # one NaN, whatever signs x had
    scales = scales.squeeze(-1)
    if recipe.scales == "packed_ue8m0":
        scales = pack_ue8m0(scales)
    if recipe.layout == "column_major":
        scales = in_columns(scales)
    return scaled.to(torch.float8_e4m3fn).flatten(-2), scales


@torch.no_grad()
def dequantize(data: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply e4m3 rows by their scales: one product in float32, one rounding to `dtype`.

    A NaN becomes the positive quiet NaN without payload. Not differentiable, not collective, and
    does not wait for the device.

    Args:
        data: `[..., H]` float8_e4m3fn.
        scales: `[..., H / 128]` or `[..., H / 32]` float32, or a quarter of the columns as packed
            int32; any strides.
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
    block = block_of("dequantize", "data", data, scales)
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales)
    x = (_as_blocks(data.float(), block) * scales.unsqueeze(-1)).flatten(-2).to(dtype)
    # Which NaN a cast gives depends on torch's kernel.
    return torch.where(x.isnan(), torch.nan, x)


@torch.no_grad()
def error_bound(x: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bound |x - dequantize(quantize(x))| element by element.

    The relative error is at most 2^-4 where |x| is at least 2^-6 scale (normal e4m3 numbers). Below
    that the absolute error is at most 2^-10 scale, which is 2^-10 / 448 of the largest magnitude
    of the block (ue8m0: twice that). Float32 roundings add 2^-21 |x|, `dtype` adds its own.

    Holds while the result does not overflow `dtype`: a ue8m0 block whose largest magnitude is
    within 1/32 of the largest number of `dtype` may round up to infinity.

    Args:
        x: `[..., H]` the rows before quantize.
        scales: as quantize gave them, by any recipe.
        dtype: what dequantize is asked for.

    Returns:
        bound: `[..., H]` float32; NaN in blocks that quantize made NaN.

    Raises:
        ValueError: shapes that do not belong together, scales of another dtype.
    """
    block = block_of("error_bound", "x", x, scales)
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales)
    magnitude = _as_blocks(x.float().abs(), block)
    info = torch.finfo(dtype)
    bound = torch.maximum(magnitude * RELATIVE_ERROR, scales.unsqueeze(-1) * SUBNORMAL_ERROR)
    rounding = (magnitude + bound) * (info.eps / 2) + info.smallest_normal * info.eps / 2
    return (bound + magnitude * 2.0**-21 + rounding).flatten(-2)


@torch.no_grad()
def pack_ue8m0(scales: Tensor) -> Tensor:
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
            f"got {scales[~is_valid][0].item():g}; quantise with ue8m0 scales"
        )
    first, second, third, fourth = (bits >> 23).unflatten(-1, (bits.shape[-1] // 4, 4)).unbind(-1)
    packed: Tensor = first | second << 8 | third << 16 | fourth << 24
    return packed


@torch.no_grad()
def unpack_ue8m0(packed: Tensor) -> Tensor:
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


def block_of(operation: str, name: str, x: Tensor, scales: Tensor) -> int:
    """Return how many columns of `x [..., H]` share one of `scales`, or raise a ValueError."""
    if x.dim() == 0 or x.shape[-1] % 32:
        raise ValueError(
            f"{operation}: expected {name} to be [..., H] with H a multiple of 128 or 32, "
            f"got {list(x.shape)}"
        )
    is_known = scales.dtype in (torch.float32, torch.int32)
    if is_known and scales.dim() == x.dim() and scales.shape[:-1] == x.shape[:-1]:
        num_scales = scales.shape[-1] * (4 if scales.dtype == torch.int32 else 1)
        for block in get_args(BlockSize):
            if num_scales * block == x.shape[-1]:
                return int(block)
    sizes = " or ".join(str([*x.shape[:-1], x.shape[-1] // block]) for block in (128, 32))
    raise ValueError(
        f"{operation}: expected scales to be float32 {sizes} for {name} {list(x.shape)}, "
        f"or int32 with a quarter of the columns, got {scales.dtype} {list(scales.shape)}"
    )


def _as_blocks(x: Tensor, block: int) -> Tensor:
    blocks: Tensor = x.unflatten(-1, (x.shape[-1] // block, block))
    return blocks


def _round_up_to_power_of_two(x: Tensor) -> Tensor:
    """Round positive normal float32 numbers up; a NaN stays one."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFFFF & 0x7F800000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)
