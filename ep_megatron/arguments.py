"""Checks of what users pass to a Buffer: once, here, with what was expected and what came.

Only shapes, dtypes and devices are looked at: what a tensor holds may not be written yet.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_megatron import fp8
from ep_megatron.backends.base import DTYPES, MAX_EXPERTS, Routing, Rows
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import AnyHandle, CapacityHandle, DispatchHandle

SUM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_ROWS = (1 << 31) - 1  # addresses are int32
MAX_TOPK = 128


def check_rows(operation: str, name: str, x: Tensor, num_rows: int | None = None) -> Tensor:
    """Return `x`, or raise: `[num_rows, H]`, known dtype, rows of 16-byte multiples."""
    _check_tensor(operation, name, x)
    if x.ndim != 2 or (num_rows is not None and x.shape[0] != num_rows):
        expected = "*" if num_rows is None else str(num_rows)
        raise _error(operation, name, f"[{expected}, hidden]", str(list(x.shape)))
    if x.dtype not in DTYPES:
        raise _error(operation, name, f"one of {_names(DTYPES[1:])}", _names([x.dtype]))
    if x.shape[1] == 0 or x.shape[1] * x.element_size() % 16:
        raise _error(
            operation,
            f"the row size of {name}",
            "a multiple of 16 bytes",
            f"{x.shape[1]} x {x.element_size()} bytes",
        )
    return x


def check_sum_dtype(operation: str, name: str, x: Tensor) -> None:
    """Raise unless rows of this dtype can be summed."""
    if x.dtype not in SUM_DTYPES:
        raise _error(operation, name, f"one of {_names(SUM_DTYPES)}", _names([x.dtype]))


def check_topk_idx(operation: str, topk_idx: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Return `topk_idx`, or raise: `[T, K]` int32 or int64. See `check_topk_range`."""
    _check_tensor(operation, "topk_idx", topk_idx)
    if topk_idx.ndim != 2 or not 1 <= topk_idx.shape[1] <= MAX_TOPK:
        raise _error(operation, "topk_idx", f"[*, 1..{MAX_TOPK}]", str(list(topk_idx.shape)))
    if topk_idx.dtype not in (torch.int64, torch.int32):
        raise _error(operation, "topk_idx", "int64 or int32", _names([topk_idx.dtype]))
    if topk_idx.numel() > MAX_ROWS:
        raise _error(operation, "topk_idx", f"at most {MAX_ROWS} slots", str(topk_idx.numel()))
    check_num_experts(operation, num_experts, num_ranks)
    return topk_idx


def check_topk_range(operation: str, topk_idx: Tensor, num_experts: int) -> None:
    """Raise unless every entry is in `[-1, num_experts)`; a compiled plan finds out by itself."""
    if topk_idx.numel():
        low, high = (int(value) for value in torch.aminmax(topk_idx))
        if low < -1 or high >= num_experts:
            raise _error(
                operation,
                "topk_idx",
                f"in [0, {num_experts}), or -1 for an unused slot",
                str(low if low < -1 else high),
            )


def check_num_experts(operation: str, num_experts: int, num_ranks: int) -> None:
    """Raise unless the experts divide evenly over the ranks."""
    if num_experts < 1 or num_experts % num_ranks or num_experts > MAX_EXPERTS:
        raise _error(
            operation,
            "num_experts",
            f"a multiple of {num_ranks} (the ranks of the group), at most {MAX_EXPERTS}",
            str(num_experts),
        )


def check_alignment(operation: str, alignment: int) -> None:
    """Raise unless rows can be padded to a multiple of `alignment`."""
    if not 1 <= alignment <= 1 << 20:
        raise _error(operation, "expert_alignment", "from 1 to 1048576", str(alignment))


def check_weights(
    operation: str, topk_weights: Tensor, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return `topk_weights`, or raise: `shape`, float32 or float64, on `device`."""
    _check_tensor(operation, "topk_weights", topk_weights, device)
    if list(topk_weights.shape) != list(shape):
        raise _error(operation, "topk_weights", str(list(shape)), str(list(topk_weights.shape)))
    if topk_weights.dtype not in (torch.float32, torch.float64):
        raise _error(operation, "topk_weights", "float32 or float64", _names([topk_weights.dtype]))
    return topk_weights


def check_scales(operation: str, scales: Tensor, x: Tensor) -> Tensor:
    """Return `scales`, or raise: `[T, S]` float32 or int32 beside 1-byte rows."""
    _check_tensor(operation, "x_scales", scales, x.device)
    if scales.ndim != 2 or len(scales) != len(x) or scales.shape[1] == 0:
        raise _error(operation, "x_scales", f"[{len(x)}, scales]", str(list(scales.shape)))
    if scales.dtype not in (torch.float32, torch.int32):
        raise _error(operation, "x_scales", "float32 or int32", _names([scales.dtype]))
    if x.element_size() != 1:
        raise _error(operation, "x beside x_scales", "a 1-byte dtype", _names([x.dtype]))
    return scales


def dispatch_rows(
    operation: str,
    x: Tensor | tuple[Tensor, Tensor],
    topk_weights: Tensor | None,
    routing: Routing | AnyHandle,
    num_ranks: int,
    recipe: Fp8Recipe | None = None,
    widen_to: torch.dtype | None = None,
) -> tuple[Rows, Routing | AnyHandle]:
    """Check everything that a fresh or cached dispatch takes, without reading it."""
    data, scales = x if isinstance(x, tuple) else (x, None)
    if isinstance(routing, Routing):
        topk_idx = check_topk_idx(operation, routing.topk_idx, routing.num_experts, num_ranks)
        check_alignment(operation, routing.expert_alignment)
        num_tokens, num_topk = topk_idx.shape
        worst = routing.num_worst_tokens
        if not 0 <= worst <= MAX_ROWS:
            raise _error(operation, "num_worst_tokens", f"from 0 to {MAX_ROWS}", str(worst))
        if isinstance(data, Tensor) and topk_idx.device != data.device:
            raise _error(operation, "topk_idx", f"on {data.device} like x", str(topk_idx.device))
    else:
        check_handle(operation, routing, num_ranks)
        num_tokens, num_topk = routing.num_tokens, routing.num_topk
    data = check_rows(operation, "x", data, num_tokens)
    if scales is not None:
        scales = check_scales(operation, scales, data)
    check_fp8(operation, data, scales, recipe, widen_to)
    if topk_weights is not None:
        shape = (num_tokens, num_topk)
        topk_weights = check_weights(operation, topk_weights, shape, data.device)
    return Rows(data, scales, topk_weights, fp8=recipe, widen_to=widen_to), routing


def check_fp8(
    operation: str,
    x: Tensor,
    scales: Tensor | None,
    recipe: Fp8Recipe | None,
    widen_to: torch.dtype | None,
) -> None:
    """Raise unless rows can be cast by `recipe`, and widened where they arrive."""
    if recipe is not None:
        if not isinstance(recipe, Fp8Recipe):
            raise _error(operation, "fp8", "an Fp8Recipe or None", type(recipe).__name__)
        if scales is not None:
            raise _error(operation, "x", "a tensor when fp8 is given", "a pair with x_scales")
        recipe.check_rows(operation, "x", x)
    if widen_to is None:
        return
    if widen_to not in fp8.INPUT_DTYPES:
        raise _error(operation, "widen_to", f"one of {_names(fp8.INPUT_DTYPES)}", str(widen_to))
    if recipe is None:
        if scales is None or x.dtype != torch.float8_e4m3fn:
            raise _error(
                operation, "widen_to", "None for rows that are not FP8", _names([widen_to])
            )
        fp8.block_of(operation, "x", x, scales)


def combine_rows(
    operation: str,
    x: Tensor,
    topk_weights: Tensor | None,
    biases: Sequence[Tensor],
    handle: AnyHandle,
    num_ranks: int,
) -> tuple[Rows, Sequence[Tensor]]:
    """Check everything that combine takes, without reading it."""
    check_handle(operation, handle, num_ranks)
    x = check_rows(operation, "x", x, handle.num_recv_rows)
    check_sum_dtype(operation, "x", x)
    if topk_weights is not None:
        shape = [handle.num_recv_rows] + ([] if handle.expand else [handle.num_topk])
        topk_weights = check_weights(operation, topk_weights, shape, x.device)
    if len(biases) > 2:
        raise _error(operation, "bias", "at most two tensors", str(len(biases)))
    for bias in biases:
        check_rows(operation, "bias", bias, handle.num_tokens)
        if bias.shape[1] != x.shape[1] or bias.dtype != x.dtype or bias.device != x.device:
            raise _error(
                operation,
                "bias",
                f"{_names([x.dtype])} [{handle.num_tokens}, {x.shape[1]}] on {x.device}",
                f"{_names([bias.dtype])} {list(bias.shape)} on {bias.device}",
            )
    return Rows(x, topk_weights=topk_weights), biases


def check_handle(operation: str, handle: AnyHandle, num_ranks: int) -> None:
    """Raise unless `handle` can be one of this group's."""
    if not isinstance(handle, DispatchHandle | CapacityHandle):
        raise _error(operation, "handle", "a DispatchHandle", type(handle).__name__)
    if handle.num_ranks != num_ranks:
        raise _error(
            operation, "handle", f"of a group of {num_ranks} ranks", f"{handle.num_ranks} ranks"
        )


def _check_tensor(
    operation: str, name: str, value: object, device: torch.device | None = None
) -> None:
    if not isinstance(value, Tensor):
        raise _error(operation, name, "a tensor", type(value).__name__)
    if value.layout != torch.strided:
        raise _error(operation, name, "a dense tensor", str(value.layout))
    if device is not None and value.device != device:
        raise _error(operation, name, f"on {device} like x", str(value.device))


def _names(dtypes: Sequence[torch.dtype | None]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _error(operation: str, name: str, expected: str, actual: str) -> ValueError:
    return ValueError(f"{operation}: expected {name} to be {expected}, got {actual}")
