"""The public `Buffer` over emulated GPUs, of one node or several, one thread per rank."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ep_megatron import Buffer, _cuda
from ep_megatron.backends.base import Backend
from ep_megatron.backends.packed_cuda import PackedCuda
from ep_megatron.config import BufferConfig
from tests.cuda.emulated import NUM_SMS, Ranks, ThreadMeeting
from tests.cuda.nic import Nodes, far_ptx

WINDOW_BYTES = 1 << 20


class EmulatedBuffer(Buffer):
    """A Buffer whose ranks are threads, and which is given its backends."""

    def __init__(self, backend: Backend, packed: PackedCuda, enable_shrink: bool) -> None:
        self.config, self.enable_shrink = BufferConfig(), enable_shrink
        self._serve(backend, packed)


class _WithBuffers(Ranks):
    """Ranks that have a Buffer each."""

    buffers: list[EmulatedBuffer]

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return every rank's `function(rank, buffer, *args)`; raise the first error."""
        return self._on_threads(lambda rank: function(rank, self.buffers[rank], *args))


class Buffers(_WithBuffers):
    """Emulated GPUs with a Buffer on each; arguments as those of `Ranks`."""

    def __init__(
        self,
        num_ranks: int,
        seed: int = 0,
        mode: str = "plain",
        *,
        timeout: float = 1e9,
        enable_shrink: bool = False,
        window_bytes: int = WINDOW_BYTES,
        kernels: Sequence[str] = (),
    ) -> None:
        config = BufferConfig(timeout=timeout, num_sms=NUM_SMS)
        super().__init__(num_ranks, seed, mode, config, kernels)

        def make(rank: int) -> EmulatedBuffer:
            meeting, backend = ThreadMeeting(rank, self._tables[0]), self.backends[rank]
            device = self.devices[rank]
            packed = PackedCuda(meeting, device, config, window_bytes, enable_shrink=enable_shrink)
            return EmulatedBuffer(backend, packed, enable_shrink)

        self.buffers = self._on_threads(make)

    def come_after(self, number: int) -> None:
        """Let the next low-latency call be the one behind `number`, as if all before were done."""
        words = np.full(4 * _cuda.MAX_RANKS, number, np.uint64)  # sent, done
        for rank, buffer in enumerate(self.buffers):
            packed: Any = buffer._low_latency
            kernels = packed._kernels
            count = kernels._state + _cuda.PACKED_NUM_CALLS_AT
            self.machine.write(rank, count, words[:1])
            self.machine.write(rank, kernels._controls[rank], words)
        self.machine.meet()


class NodeBuffers(Nodes, _WithBuffers):
    """Emulated GPUs of several nodes, for low-latency calls; arguments as those of `Buffers`."""

    def __init__(
        self,
        layout: str,
        seed: int = 0,
        mode: str = "plain",
        *,
        timeout: float = 1e9,
        enable_shrink: bool = False,
        window_bytes: int = WINDOW_BYTES,
        kernels: Sequence[str] = (),
    ) -> None:
        super().__init__(layout, seed, mode, timeout=timeout, kernels=kernels)
        for ptx in far_ptx():
            self.machine.load(ptx)
        nodes, config = self.fabric.nodes, BufferConfig(timeout=timeout, num_sms=NUM_SMS)

        def make(rank: int) -> EmulatedBuffer:
            backend: Any = self.backends[rank]
            near = nodes.members[nodes.host_of[rank]]
            packed = PackedCuda(
                ThreadMeeting(rank, self._tables[0]),
                self.devices[rank],
                config,
                window_bytes,
                enable_shrink=enable_shrink,
                far=(backend.network, near),
            )
            return EmulatedBuffer(backend, packed, enable_shrink)

        self.buffers = self._on_threads(make)
