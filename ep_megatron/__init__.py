"""Expert-parallel dispatch and combine for Megatron-core."""

from ep_megatron.autograd import fused_combine, fused_dispatch
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.handle import DispatchHandle
from ep_megatron.streams import EventHandle, EventOverlap

__all__ = [
    "Buffer",
    "BufferConfig",
    "DispatchHandle",
    "EventHandle",
    "EventOverlap",
    "fused_combine",
    "fused_dispatch",
]
__version__ = "0.1.0"
