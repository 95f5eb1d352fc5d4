"""Expert-parallel dispatch and combine for Megatron-core."""

from ep_megatron.autograd import Fp8Rows, fused_combine, fused_dispatch, fused_dispatch_fp8
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import DispatchHandle
from ep_megatron.streams import EventHandle, EventOverlap

__all__ = [
    "Buffer",
    "BufferConfig",
    "DispatchHandle",
    "EventHandle",
    "EventOverlap",
    "Fp8Recipe",
    "Fp8Rows",
    "fused_combine",
    "fused_dispatch",
    "fused_dispatch_fp8",
]
__version__ = "0.1.0"
