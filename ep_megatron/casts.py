"""The casts of `fp8.py` and `logfmt.py` by the fastest code that gives their bits.

Compiled kernels for rows on a CPU where the extension is built, the torch reference elsewhere; the
kernels give the reference's bits on every instruction set (tests/test_fp8_kernels.py and
tests/test_logfmt.py).
"""

import functools
from typing import Any, get_args

import torch
from torch import Tensor

from ep_megatron import fp8, logfmt
from ep_megatron.fp8 import Fp8Recipe, ScaleFormat
from ep_megatron.logfmt import LogRows


@functools.cache
def _kernels() -> Any:
    """Return the compiled side, or None: a machine without the extension has the reference."""
    try:
        from ep_megatron import _cpu
    except ImportError:
        return None
    return _cpu


def quantize(x: Tensor, recipe: Fp8Recipe = fp8.FP8) -> tuple[Tensor, Tensor]:
    """Cast rows to e4m3; see `fp8.quantize`, whose bits these are.

    Args:
        x: `[M, H]` bfloat16, float16 or float32.
        recipe: block, scales and their layout.

    Returns:
        data `[M, H]` float8_e4m3fn, and scales `[M, S]` in the recipe's layout.
    """
    recipe.check_rows("quantize", "x", x)
    kernels = _kernels() if x.device.type == "cpu" and x.dim() == 2 else None
    if kernels is None:
        return fp8.quantize(x, recipe)
    x = x.detach().contiguous()
    num_rows, hidden = x.shape
    data = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn)
    scales = recipe.new_scales(num_rows, hidden, "cpu")
    kernels.quantize_rows(
        "",
        dtype_name(x.dtype),
        format_of(recipe),
        data.data_ptr(),
        scales.data_ptr(),
        scale_strides(scales),
        x.data_ptr(),
        num_rows,
        hidden,
    )
    return data, scales


def dequantize(data: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply e4m3 rows by their scales; see `fp8.dequantize`, whose bits these are.

    Args:
        data: `[M, H]` float8_e4m3fn.
        scales: `[M, S]` float32 or packed int32, any strides.
        dtype: of the result: bfloat16, float16, float32 or float64.
    """
    is_plain = data.dtype == torch.float8_e4m3fn and dtype in fp8.INPUT_DTYPES and data.dim() == 2
    kernels = _kernels() if is_plain and data.device.type == "cpu" else None
    if kernels is None:
        return fp8.dequantize(data, scales, dtype)
    format_ = format_like("dequantize", data, scales)
    data = data.contiguous()
    out = torch.empty(data.shape, dtype=dtype)
    kernels.dequantize_rows(
        "",
        dtype_name(dtype),
        format_,
        out.data_ptr(),
        data.data_ptr(),
        scales.data_ptr(),
        scale_strides(scales),
        *data.shape,
    )
    return out


def encode_logfmt(x: Tensor) -> LogRows:
    """Cast rows `[M, H]` bfloat16 to LogFMT; see `logfmt.encode`, whose bits these are."""
    kernels = _kernels() if x.device.type == "cpu" else None
    if kernels is None:
        return logfmt.encode(x)
    logfmt.check_rows("encode_logfmt", x)
    x = x.detach().contiguous()
    num_rows, hidden = x.shape
    extremes = torch.empty(num_rows, hidden // logfmt.BLOCK, 2, dtype=torch.bfloat16)
    data = torch.empty(2 * x.numel(), dtype=torch.uint8)
    used = kernels.encode_logfmt(
        "", extremes.data_ptr(), data.data_ptr(), x.data_ptr(), num_rows, hidden
    )
    return LogRows(extremes, data[:used])


def decode_logfmt(rows: LogRows) -> Tensor:
    """Return the numbers of LogFMT rows, `[M, H]` float32; see `logfmt.decode`."""
    kernels = _kernels() if rows.data.device.type == "cpu" else None
    if kernels is None:
        return logfmt.decode(rows)
    logfmt.check_data("decode_logfmt", rows)
    extremes, data = rows.extremes.contiguous(), rows.data.contiguous()
    num_rows, hidden = len(extremes), extremes.shape[1] * logfmt.BLOCK
    out = torch.empty(num_rows, hidden)
    kernels.decode_logfmt(
        "", out.data_ptr(), extremes.data_ptr(), data.data_ptr(), num_rows, hidden
    )
    return out


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name as the kernels know it."""
    return str(dtype).removeprefix("torch.")


def format_of(recipe: Fp8Recipe) -> tuple[int, int, float]:
    """Return block, kind of scales and smallest amax as the kernels take them."""
    return recipe.block, get_args(ScaleFormat).index(recipe.scales), recipe.min_amax


def format_like(operation: str, data: Tensor, scales: Tensor) -> tuple[int, int, float]:
    """Return the same for rows that are there; raise a ValueError if the shapes do not fit."""
    block: Any = fp8.block_of(operation, "data", data, scales)
    kind: ScaleFormat = "packed_ue8m0" if scales.dtype == torch.int32 else "float32"
    return format_of(Fp8Recipe(block, kind))


def scale_strides(scales: Tensor) -> tuple[int, int]:
    """Return bytes from one row's scales to the next's, and from one scale to the next."""
    return scales.stride(0) * 4, scales.stride(1) * 4
