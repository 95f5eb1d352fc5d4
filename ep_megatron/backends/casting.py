"""FP8 rows where a backend moves rows that have been cast already, and their scales by row."""

from dataclasses import replace

from ep_megatron import casts, fp8
from ep_megatron.backends.base import Rows


def cast_rows(rows: Rows) -> Rows:
    """Return rows as they travel: cast by their recipe where they have one, scales by row."""
    if rows.fp8 is None:
        return rows
    x, scales = casts.quantize(rows.x, replace(rows.fp8, layout="row_major"))
    return Rows(x, scales, rows.topk_weights, widen_to=rows.widen_to)


def as_asked(received: Rows, sent: Rows) -> Rows:
    """Widen received rows, or bring their scales into the layout of the recipe."""
    x, scales = received.x, received.scales
    if scales is None:
        return received
    if sent.widen_to is not None:
        return replace(received, x=casts.dequantize(x, scales, sent.widen_to), scales=None)
    if sent.fp8 is not None and sent.fp8.layout == "column_major":
        return replace(received, scales=fp8.in_columns(scales))
    return received


def copy_rows(target: Rows, source: Rows) -> None:
    """Copy every part of `source` that is there to the head of its part in `target`."""
    for to, part in zip(target.tensors(), source.tensors(), strict=True):
        if to is not None and part is not None:
            to[: len(part)].copy_(part)
