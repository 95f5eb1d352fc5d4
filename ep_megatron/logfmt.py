"""LogFMT: bfloat16 rows as signs and logarithms, 10 bits a number, in plain torch.

This is the reference that the compiled kernels are compared with, bit for bit. A block is 128
neighbouring columns of a row. Between its smallest and its largest magnitude lie 511 levels, evenly
spaced in their logarithms; a number is its sign and its level, or zero.

Source: the format of DeepEP's low-latency combine (csrc/kernels/internode_ll.cu, MIT): when a block
is coded, the levels, where they round, and how 16 codes and 16 signs share 20 bytes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
NUM_LEVELS = 511
# The smallest level is at least this power of two below the largest.
MAX_RANGE = 32.0
# A coded and a plain block, without its extremes.
CODED_BYTES = BLOCK * 10 // 8
PLAIN_BYTES = BLOCK * 2

_SPACING = 1 / (NUM_LEVELS - 1)
_GROUP = 16  # numbers that share 20 bytes
_ONE = 0x3F80  # bits of bfloat16 1.0
_MIN_NORMAL = 0x0080
# log2(1 + m) = m (a + m (b + ...)) to 4e-7 for the 128 mantissas of a bfloat16, and likewise
# 2^-f - 1 for f from 0 to 1. Each product and each sum is rounded to float32.
_LOG2 = (
    1.442667841911316,
    -0.7205854058265686,
    0.4735531508922577,
    -0.32590124011039734,
    0.19429320096969604,
    -0.0795568972826004,
    0.015529675409197807,
)
_EXP2 = (
    -0.6931444406509399,
    0.24018670618534088,
    -0.05531669408082962,
    0.009228377602994442,
    -0.0009540333994664252,
)


@dataclass(frozen=True)
class LogRows:
    """Rows as they travel; a value.

    Attributes:
        extremes: `[M, H / 128, 2]` bfloat16, the largest and the smallest magnitude of each block.
        data: `[N]` uint8, the blocks one after the other: 160 bytes where the largest magnitude is
            below 1, else the block's 256 bytes of bfloat16.
    """

    extremes: Tensor
    data: Tensor


def check_rows(operation: str, x: Tensor) -> None:
    """Raise a ValueError unless `x` is `[M, H]` bfloat16 with H a multiple of 128."""
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] % BLOCK:
        raise ValueError(
            f"{operation}: expected x to be bfloat16 [M, H] with H a multiple of {BLOCK}, "
            f"got {x.dtype} {list(x.shape)}"
        )


def check_data(operation: str, rows: LogRows) -> None:
    """Raise a ValueError unless the data is as long as the extremes say."""
    needed = int(block_bytes(rows.extremes).sum())
    if len(rows.data) != needed:
        raise ValueError(
            f"{operation}: expected data to be {needed} bytes, as the extremes say, "
            f"got {len(rows.data)}"
        )


def is_coded(extremes: Tensor) -> Tensor:
    """Return which blocks travel as codes, `[...]` bool of extremes `[..., 2]`.

    Those whose magnitudes are all below 1; one with a NaN or an infinity is not, and keeps its
    bits.
    """
    return extremes[..., 0] < 1


def block_bytes(extremes: Tensor) -> Tensor:
    """Return the bytes of each block in `LogRows.data`, `[...]` int64 of extremes `[..., 2]`."""
    return torch.where(is_coded(extremes), CODED_BYTES, PLAIN_BYTES)


def error_bound(x: Tensor) -> Tensor:
    """Return how far coding and decoding may move each number of `x [M, H]`; float32 `[M, H]`.

    Half a step between levels, relative; and for what is 2^32 times smaller than the largest of
    its block, or no normal bfloat16, the number itself. Zero where a block is not coded.
    """
    extremes = encode(x).extremes
    step = _range(extremes)[..., None] * _SPACING
    largest = extremes[..., :1].float()
    blocks = x.float().view(*step.shape[:-1], BLOCK)
    relative = blocks.abs() * ((torch.exp2(step) - 1) / 2 + 2e-6)
    bound = torch.maximum(relative, largest * 2.0**-MAX_RANGE + 2.0**-126)
    return torch.where(is_coded(extremes)[..., None], bound, 0.0).view(x.shape)


@torch.no_grad()
def encode(x: Tensor) -> LogRows:
    """Cast rows to LogFMT.

    With `amax` and `amin` the extreme magnitudes of a coded block and `d = log2(amax / amin)`, at
    most 32, level n from 1 to 511 stands for `amax * 2^-((511 - n) * step)`, `step = d / 510`. A
    magnitude takes the nearest level, or 0 for zero below the middle of the smallest level and the
    one that would come next; what is no normal bfloat16 is zero. A block of equal magnitudes, and
    one of zeros, keeps its numbers.

    Args:
        x: `[M, H]` bfloat16, H a multiple of 128.

    Raises:
        ValueError: another dtype or H.
    """
    check_rows("encode", x)
    words = x.detach().contiguous().view(torch.int16).view(len(x), x.shape[1] // BLOCK, BLOCK)
    bits = words.int() & 0x7FFF
    # Magnitudes are in the order of their bits, and so is a NaN above all.
    both = torch.stack([bits.amax(-1), bits.amin(-1)], -1).to(torch.int16)
    extremes = both.view(torch.bfloat16)
    below = _log2_below(bits, extremes[..., :1])  # how many powers of two below the largest
    distance = _range(extremes)[..., None]
    step = distance * _SPACING
    # NOTE: tensor by tensor: torch may divide a number through a reciprocal, rounding twice.
    steps = torch.full_like(distance, NUM_LEVELS - 1) / distance
    steps = torch.where(distance > 0, steps, 0.0)
    # A level begins where it is as far to the next one above: (1 + 2^step) / 2, which is half a
    # step in logarithms, and for steps this small step^2 ln(2) / 8 more.
    middle = NUM_LEVELS + 0.5 - step * (math.log(2) / 8)
    codes = (middle - below * steps).clamp(min=0).int()
    codes = torch.where(bits < _MIN_NORMAL, 0, codes)
    coded = _pack(codes, words < 0)
    plain = words.contiguous().view(torch.uint8).view(*words.shape[:2], PLAIN_BYTES)
    coded = torch.nn.functional.pad(coded, (0, PLAIN_BYTES - CODED_BYTES))
    chosen = torch.where(is_coded(extremes)[..., None], coded, plain)
    is_used = torch.arange(PLAIN_BYTES) < block_bytes(extremes)[..., None]
    return LogRows(extremes, chosen[is_used])


@torch.no_grad()
def decode(rows: LogRows) -> Tensor:
    """Return the numbers that rows stand for, `[M, H]` float32.

    Raises:
        ValueError: if the data is not as long as the extremes say.
    """
    check_data("decode", rows)
    num_rows, num_blocks, _ = rows.extremes.shape
    sizes = block_bytes(rows.extremes).flatten()
    starts = sizes.cumsum(0) - sizes
    out = torch.empty(num_rows * num_blocks, BLOCK)
    coded = is_coded(rows.extremes).flatten()
    plain = rows.data[starts[~coded, None] + torch.arange(PLAIN_BYTES)]
    out[~coded] = plain.view(torch.bfloat16).float()
    codes, is_negative = _unpack(rows.data[starts[coded, None] + torch.arange(CODED_BYTES)])
    extremes = rows.extremes.view(-1, 2)[coded]
    step = _range(extremes)[:, None] * _SPACING
    below = (NUM_LEVELS - codes).float() * step
    whole = below.int()
    powers = ((1 + _polynomial(_EXP2, below - whole)).view(torch.int32) - (whole << 23)).view(
        torch.float32
    )
    values = torch.where(codes > 0, extremes[:, :1].float() * powers, 0.0)
    out[coded] = torch.where(is_negative, -values, values)
    return out.view(num_rows, num_blocks * BLOCK)


def _range(extremes: Tensor) -> Tensor:
    """Return `log2(amax / amin)`, at most 32, as float32 `[...]` of extremes `[..., 2]`."""
    smallest = extremes[..., 1].contiguous().view(torch.int16).int()
    below = _log2_below(smallest, extremes[..., 0]).clamp(max=MAX_RANGE)
    return torch.where(smallest < _MIN_NORMAL, MAX_RANGE, below)


def _log2_below(bits: Tensor, largest: Tensor) -> Tensor:
    """Return how far below `largest` the logarithms of magnitudes with these bits are."""
    top = largest.contiguous().view(torch.int16).int()
    exponents = ((top >> 7) - (bits >> 7)).float()
    return exponents + (_log2_mantissa(top) - _log2_mantissa(bits))


def _log2_mantissa(bits: Tensor) -> Tensor:
    return _polynomial(_LOG2, (bits & 0x7F).float() * 2.0**-7)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return x * total


def _pack(codes: Tensor, is_negative: Tensor) -> Tensor:
    """Return `[..., 160]` uint8: per 16 numbers their codes of 9 bits, lowest first, then signs."""
    shape = codes.shape[:-1]
    bits = codes.view(*shape, BLOCK // _GROUP, _GROUP, 1) >> torch.arange(9) & 1
    signs = is_negative.view(*shape, BLOCK // _GROUP, _GROUP).int()
    bits = torch.cat([bits.flatten(-2), signs], -1).view(*shape, CODED_BYTES, 8)
    return (bits << torch.arange(8)).sum(-1).to(torch.uint8)


def _unpack(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and signs `[..., 128]` of `_pack`."""
    shape, split = data.shape[:-1], 9 * _GROUP
    bits = data.view(*shape, CODED_BYTES, 1).int() >> torch.arange(8) & 1
    bits = bits.view(*shape, BLOCK // _GROUP, 10 * _GROUP)
    codes = bits[..., :split].view(*shape, BLOCK // _GROUP, _GROUP, 9) << torch.arange(9)
    return codes.sum(-1).view(*shape, BLOCK), bits[..., split:].flatten(-2) > 0
