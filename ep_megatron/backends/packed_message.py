"""Rows of low-latency calls as bytes of a message, and back."""

import torch
from torch import Tensor

from ep_megatron import casts, logfmt
from ep_megatron.backends.packed import LowLatencyCall
from ep_megatron.logfmt import LogRows


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the same memory as bytes; `[..., n]` keeps its leading dimensions."""
    return tensor.view(torch.uint8)


def as_ints(data: Tensor) -> Tensor:
    """Return a copy of bytes as int32."""
    return data.clone().view(torch.int32)


def combine_message(call: LowLatencyCall, counts: Tensor, rows: Tensor) -> list[Tensor]:
    """Return what one rank gets of a combine: numbers of rows by expert, and the rows.

    Args:
        call: of the combine.
        counts: `[E/R]`.
        rows: `[M, H]` bfloat16.
    """
    own = torch.empty(len(counts), dtype=torch.int32).copy_(counts)
    if not call.use_logfmt:
        return [own, as_bytes(rows)]
    coded = casts.encode_logfmt(rows)
    return [own, as_bytes(coded.extremes), coded.data]


def combine_rows(call: LowLatencyCall, num_experts: int, message: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts `[num_experts]` int64 and rows `[M, H]` of such a message.

    Rows are bfloat16, or with LogFMT float32.
    """
    counts = as_ints(message[: 4 * num_experts]).to(torch.int64)
    data = message[4 * num_experts :]
    if not call.use_logfmt:
        return counts, data.view(torch.bfloat16).view(-1, call.hidden)
    shape = int(counts.sum()), call.hidden // logfmt.BLOCK, 2
    split = 2 * shape[0] * shape[1] * shape[2]
    extremes = data[:split].view(torch.bfloat16).view(shape)
    return counts, casts.decode_logfmt(LogRows(extremes, data[split:]))
