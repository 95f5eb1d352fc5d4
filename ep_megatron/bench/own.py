"""Our own implementations under measurement."""

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.bench.case import Case, Maker, Step
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import Fp8Recipe

_buffers: dict[tuple[str, bool], Buffer] = {}


def buffer_of(backend: str, low_latency: bool = False) -> Buffer:
    """Return this process's buffer of that kind; cases share it, as layers do in training."""
    kind = backend, low_latency
    if kind not in _buffers:
        assert dist.group.WORLD is not None
        config = BufferConfig(backend=backend)
        _buffers[kind] = Buffer(dist.group.WORLD, low_latency_mode=low_latency, config=config)
    return _buffers[kind]


def exchange(backend: str, expand: bool, fp8: Fp8Recipe | None = None) -> Maker:
    """Return a maker of steps: dispatch with weights, then combine; backward the two again.

    With `fp8` what dispatch sends, forwards and backwards, is cast, and widened where it arrives.

    The received rows are combined as they came: what experts would cost is left out for all
    implementations alike.
    """

    def make(case: Case, rank: int) -> dict[str, Step]:
        buffer = buffer_of(backend)
        x, topk_idx = case.x(rank), case.topk_idx(rank)
        topk_weights = case.topk_weights(rank)
        widen_to = None if fp8 is None else x.dtype

        def forward() -> tuple[Tensor, object, Tensor]:
            recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                num_experts=case.num_experts,
                expand=expand,
                fp8=fp8,
                widen_to=widen_to,
            )
            assert isinstance(recv_x, Tensor)
            assert handle is not None
            assert recv_weights is not None
            combined, _, _ = buffer.combine(recv_x, handle)
            return combined, handle, recv_weights

        def forward_backward() -> None:
            combined, handle, recv_weights = forward()
            grad_rows = buffer.dispatch(combined, handle, fp8=fp8, widen_to=widen_to)[0]  # type: ignore[arg-type]
            assert isinstance(grad_rows, Tensor)
            buffer.combine(grad_rows, handle, topk_weights=recv_weights)  # type: ignore[arg-type]

        return {"forward": forward, "forward_backward": forward_backward}

    return make


def packed_exchange(backend: str, use_fp8: bool = False, use_logfmt: bool = False) -> Maker:
    """Return a maker of steps: a low-latency dispatch, then a combine of bfloat16 rows; forward.

    With FP8 experts would make bfloat16 rows of what arrives, and for LogFMT rows are to be below
    one; other rows stand for them.
    """

    def make(case: Case, rank: int) -> dict[str, Step]:
        buffer = buffer_of(backend, low_latency=True)
        x, topk_idx = case.x(rank), case.topk_idx(rank)
        topk_weights = case.topk_weights(rank)
        local, rows = case.num_experts // case.num_ranks, case.num_ranks * case.num_tokens
        made = None
        if use_fp8 or use_logfmt:
            made = torch.zeros(local, rows, case.hidden, dtype=x.dtype)

        def forward() -> Tensor:
            recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
                x, topk_idx, case.num_tokens, case.num_experts, use_fp8=use_fp8
            )
            y = recv_x if made is None else made
            assert isinstance(y, Tensor)
            return buffer.low_latency_combine(
                y, topk_idx, topk_weights, handle, use_logfmt=use_logfmt
            )[0]

        return {"forward": forward}

    return make
