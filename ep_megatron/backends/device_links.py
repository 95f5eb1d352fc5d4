"""Rows of one token on one rank: copied to all of their places, or summed into the first.

The kernels are in csrc/cuda/expand.cu and combine.cu; links are described in csrc/cuda/protocol.h.
"""

import math
from collections.abc import Sequence

import torch

from ep_megatron import _cuda
from ep_megatron.backends.device import Device, Memory
from ep_megatron.backends.device_arena import align
from ep_megatron.backends.device_rows import RowLayout

SUM_DTYPES = {
    torch.bfloat16: _cuda.DType.bfloat16,
    torch.float16: _cuda.DType.float16,
    torch.float32: _cuda.DType.float32,
    torch.float64: _cuda.DType.float64,
}


def address_of(memory: Memory | None) -> int:
    """Return where memory is; 0 for none."""
    return 0 if memory is None else memory.address


def expand(
    device: Device, layout: RowLayout, starts: Sequence[int], num_rows: int, num_sms: int
) -> None:
    """Copy what has crossed once to all of its places.

    Args:
        device: this rank's.
        layout: of received rows.
        starts: where the layout's parts start.
        num_rows: received.
        num_sms: most blocks of the kernel.
    """
    if layout.links is None or num_rows == 0:
        return
    x, scales, _, _, links, _ = starts
    args = _cuda.ExpandArgs(
        x=x,
        scales=scales,
        links=links,
        num_rows=num_rows,
        row_bytes=layout.x.num_bytes,
        scale_bytes=0 if layout.scales is None else layout.scales.num_bytes,
    )
    device.launch(_cuda.plan_expand(args, num_sms))


def stage(
    device: Device,
    x: Memory | None,
    weights: Memory | None,
    start: int,
    links: Memory | None,
    num_sms: int,
    num_rows_at: int = 0,
) -> None:
    """Copy rows, or their sums by `links`, to where peers reach them, and weights behind them.

    `num_rows_at`: where the device knows how many of the rows there are; all, if that is 0.
    """
    num_bytes = 0 if x is None else x.num_bytes
    args = _cuda.StageArgs(
        rows=address_of(x),
        to_rows=start,
        num_row_bytes=num_bytes,
        weights=address_of(weights),
        to_weights=start + align(num_bytes, 64),
        num_weight_bytes=0 if weights is None else weights.num_bytes,
        num_rows=num_rows_at,
        row_bytes=_row_bytes(x),
        weight_row_bytes=_row_bytes(weights),
    )
    if x is None or links is None:
        device.launch(_cuda.plan_stage(args, num_sms))
        return
    sums = _cuda.ReduceArgs(
        stage=args, links=links.address, num_rows=x.shape[0], row_bytes=_row_bytes(x)
    )
    device.launch(_cuda.plan_reduce(sums, SUM_DTYPES[x.dtype], num_sms))


def _row_bytes(rows: Memory | None) -> int:
    return 0 if rows is None else math.prod(rows.shape[1:]) * rows.dtype.itemsize
