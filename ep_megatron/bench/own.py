"""Our own implementations under measurement."""

import torch.distributed as dist
from torch import Tensor

from ep_megatron.bench.case import Case, Maker, Step
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import Fp8Recipe

_buffers: dict[str, Buffer] = {}


def buffer_of(backend: str) -> Buffer:
    """Return this process's buffer of that backend; cases share it, as layers do in training."""
    if backend not in _buffers:
        assert dist.group.WORLD is not None
        _buffers[backend] = Buffer(dist.group.WORLD, config=BufferConfig(backend=backend))
    return _buffers[backend]


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
