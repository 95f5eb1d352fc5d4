"""Checks of what users pass to the low-latency verbs; see `arguments`. Names as in `packed`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ep_megatron.arguments import check_topk_idx, check_topk_range
from ep_megatron.backends.packed import BLOCK, LowLatencyCall, LowLatencyHandle
from ep_megatron.fp8 import Fp8Recipe

_MAX_ROWS = (1 << 31) - 1
_READABLE = {"cpu": "CPU", "cuda": "GPU"}


def _error(name: str, what: str, expected: str, actual: object) -> ValueError:
    return ValueError(f"{name}: expected {what} to be {expected}, got {actual}")


def check_hook(name: str, async_finish: bool, return_recv_hook: bool) -> None:
    """Raise if a call shall both be queued and return a hook."""
    if async_finish and return_recv_hook:
        raise _error(name, "async_finish", "False with return_recv_hook", True)


def check_logfmt(name: str, use_logfmt: bool, zero_copy: bool, device: str) -> None:
    """Raise unless rows of a combine can be cast to LogFMT, where that is asked for."""
    if use_logfmt and zero_copy:
        raise _error(name, "use_logfmt", "False with zero_copy", True)
    if use_logfmt and device != "cpu":
        raise _error(name, "use_logfmt", f"False on a {_READABLE.get(device, device)}", True)


def check_tensor(
    name: str,
    what: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    dense: bool = False,
    device: str = "cpu",
) -> None:
    """Raise unless a tensor of this type of device has this shape and dtype."""
    if tensor.device.type != device:
        raise _error(name, what, f"on a {_READABLE.get(device, device)}", tensor.device)
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise _error(name, what, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if dense and not tensor.is_contiguous():
        raise _error(name, what, "contiguous", f"strides {tensor.stride()}")


def check_packed_rows(name: str, x: Tensor, device: str) -> None:
    """Raise unless `x` is `[T, H]` bfloat16 with H a multiple of 128."""
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % BLOCK:
        raise _error(name, "x", f"[T, H] with H a multiple of {BLOCK}", list(x.shape))
    check_tensor(name, "x", x, x.shape, torch.bfloat16, device=device)


def check_routing(
    name: str,
    topk_idx: Tensor,
    num_rows: int,
    num_max: int,
    num_experts: int,
    num_ranks: int,
    device: str,
) -> None:
    """Raise unless `topk_idx` fits `num_rows` tokens, and those fit `num_max`."""
    check_topk_idx(name, topk_idx, num_experts, num_ranks)
    if topk_idx.device.type != device or len(topk_idx) != num_rows:
        got = f"{topk_idx.device} {list(topk_idx.shape)}"
        raise _error(name, "topk_idx", f"[{num_rows}, K] on a {_READABLE.get(device, device)}", got)
    what = "num_max_dispatch_tokens_per_rank"
    if num_max < 1 or num_ranks * num_max > _MAX_ROWS:
        raise _error(name, what, f"from 1 to {_MAX_ROWS} / ranks", num_max)
    if num_rows > num_max:
        raise _error(name, "the number of tokens", f"at most {what} = {num_max}", num_rows)


def check_stats(
    name: str,
    stats: tuple[Tensor | None, Tensor | None],
    num_local: int,
    num_ranks: int,
    device: str,
) -> None:
    """Raise unless the statistics that are given can be added to."""
    if stats[0] is not None:
        what = "cumulative_local_expert_recv_stats"
        check_tensor(name, what, stats[0], (num_local,), torch.int32, device=device)
    if stats[1] is not None:
        what = "the wait statistics"
        check_tensor(name, what, stats[1], (num_ranks,), torch.int64, device=device)


def recipe_of(
    name: str, use_fp8: bool, round_scale: bool, use_ue8m0: bool, hidden: int
) -> Fp8Recipe | None:
    """Return how rows are cast, or raise."""
    if use_ue8m0 and not (round_scale and use_fp8):
        raise _error(name, "use_ue8m0", "False without use_fp8 and round_scale", True)
    if not use_fp8:
        return None
    if use_ue8m0 and hidden % (4 * BLOCK):
        raise _error(name, "hidden", f"a multiple of {4 * BLOCK} with use_ue8m0", hidden)
    return Fp8Recipe(scales="packed_ue8m0" if use_ue8m0 else "ue8m0" if round_scale else "float32")


def check_packed_handle(
    name: str, handle: LowLatencyHandle | tuple[Any, ...], num_ranks: int, device: str
) -> tuple[int, int, int]:
    """Return C, H and E of a handle, or raise."""
    if not isinstance(handle, tuple) or len(handle) != len(LowLatencyHandle._fields):
        raise _error(name, "handle", "that of a low_latency_dispatch", type(handle).__name__)
    src_info, layout_range, num_tokens, hidden, num_experts = handle
    local = num_experts // num_ranks
    what = "the handle's packed_recv_src_info"
    shape = (local, num_ranks * num_tokens)
    check_tensor(name, what, src_info, shape, torch.int32, device=device)
    what, shape = "the handle's packed_recv_layout_range", (local, num_ranks)
    check_tensor(name, what, layout_range, shape, torch.int64, dense=True, device=device)
    return num_tokens, hidden, num_experts


def check_counts(name: str, topk_idx: Tensor, call: LowLatencyCall) -> None:
    """Raise unless all experts exist and none gets more rows from here than there are slots."""
    check_topk_range(name, topk_idx, call.num_experts)
    counts = torch.bincount(
        topk_idx.reshape(-1).to(torch.int64) + 1, minlength=call.num_experts + 1
    )[1:]
    limit = call.num_max_dispatch_tokens_per_rank
    if len(counts) and int(counts.max()) > limit:
        expert = int(counts.argmax())
        raise _error(name, f"expert {expert}", f"named at most {limit} times", int(counts[expert]))
