"""One GPU as a `Device`: memory by cudaMalloc and CUDA IPC, launches on a stream of its own.

Received rows are tensors over the arena, without a copy. Their memory returns with the last of
them; what the caller's stream still does with it then comes before the next call.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.device import HostMemory, Launch, Memory

_ALIGNMENT = 16


class GpuHostMemory:
    """See `HostMemory`."""

    def __init__(self, host_address: int, device_address: int, num_bytes: int) -> None:
        self.host_address, self.device_address = host_address, device_address
        self._bytes = memoryview((ctypes.c_char * num_bytes).from_address(host_address)).cast("B")

    def read(self) -> memoryview:
        """See `HostMemory.read`."""
        return self._bytes

    def write(self, data: bytes) -> None:
        """See `HostMemory.write`."""
        self._bytes[: len(data)] = data


class _SharedMemory:
    """GPU memory that torch looks at; freed when torch no longer does."""

    def __init__(self, address: int, num_bytes: int, free: Callable[[], None]) -> None:
        self._free = free
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._free()


class GpuDevice:
    """See `Device`.

    Args:
        ordinal: of the GPU, as torch counts.

    Raises:
        RuntimeError: no driver, no GPU, or one that the kernels are not compiled for.
    """

    device_type = "cuda"

    def __init__(self, ordinal: int) -> None:
        self._cuda = _cuda.Device(ordinal)
        if not torch.cuda.is_available():
            raise RuntimeError("cuda: expected a torch that is built with CUDA, got one without")
        self.ordinal, self._device = ordinal, torch.device("cuda", ordinal)
        self._stream = torch.cuda.Stream(self._device)
        self.num_sms = self._cuda.num_sms
        self._local: list[int] = []
        self._opened: list[int] = []
        self._host: list[int] = []

    @property
    def stream(self) -> int:
        """CUDA's handle of the stream that kernels are launched on."""
        handle: int = self._stream.cuda_stream
        return handle

    def allocate(self, num_bytes: int) -> int:
        """See `Device.allocate`."""
        address = self._cuda.allocate(num_bytes, True)
        self._local.append(address)
        return address

    def allocate_shared(self, num_bytes: int, is_zeroed: bool) -> tuple[int, bytes]:
        """See `Device.allocate_shared`."""
        # Never freed while the process lives: closing is local, and a peer may still read it.
        address = self._cuda.allocate(num_bytes, is_zeroed)
        return address, self._cuda.export_memory(address)

    def open_shared(self, handle: bytes) -> int:
        """See `Device.open_shared`."""
        address = self._cuda.open_memory(handle)
        self._opened.append(address)
        return address

    def allocate_host(self, num_bytes: int) -> HostMemory:
        """See `Device.allocate_host`."""
        host_address, device_address = self._cuda.allocate_host(num_bytes)
        self._host.append(host_address)
        return GpuHostMemory(host_address, device_address, num_bytes)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """See `Device.on_stream`."""
        caller: Any = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            yield
        finally:
            caller.wait_stream(self._stream)

    def launch(self, launch: Launch) -> None:
        """See `Device.launch`."""
        self._cuda.launch(launch, self._stream.cuda_stream)

    def is_capturing(self) -> bool:
        """See `Device.is_capturing`."""
        return torch.cuda.is_current_stream_capturing()

    def graph_id(self) -> int:
        """See `Device.graph_id`."""
        caller: Any = torch.cuda.current_stream(self._device)
        return self._cuda.graph_id(caller.cuda_stream)

    def wait_for_word(self, memory: HostMemory, epoch: int, timeout: float) -> bool:
        """See `Device.wait_for_word`."""
        assert isinstance(memory, GpuHostMemory)
        return _cuda.wait_for_word(memory.host_address, epoch, timeout)

    def input(self, tensor: Tensor) -> Memory:
        """See `Device.input`."""
        if tensor.device != self._device:
            raise ValueError(
                f"Buffer: expected tensors on {self._device}, got one on {tensor.device}"
            )
        tensor = tensor.contiguous()
        if tensor.data_ptr() % _ALIGNMENT:
            tensor = tensor.clone()
        return Memory(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor)

    def copy(self, tensor: Tensor) -> Tensor:
        """See `Device.copy`."""
        return tensor.clone()

    def arena_address(self, tensor: Tensor) -> int | None:
        """See `Device.arena_address`."""
        return tensor.data_ptr()

    def output(
        self, dtype: torch.dtype, shape: Sequence[int], into: Tensor | None = None
    ) -> Memory:
        """See `Device.output`."""
        tensor = into
        if tensor is None:
            tensor = torch.empty(*shape, dtype=dtype, device=self._device)
        return Memory(tensor.data_ptr(), dtype, shape, tensor)

    def tensor(self, output: Memory) -> Tensor:
        """See `Device.tensor`."""
        assert isinstance(output.owner, Tensor)
        return output.owner

    def views(self, address: int, num_bytes: int, free: Callable[[], None]) -> Tensor:
        """See `Device.views`."""
        if num_bytes == 0:
            free()
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        return torch.as_tensor(_SharedMemory(address, num_bytes, free), device=self._device)

    def close(self) -> None:
        """See `Device.close`."""
        self._cuda.synchronize(self._stream.cuda_stream)
        for address in self._opened:
            self._cuda.close_memory(address)
        for address in self._local:
            self._cuda.free(address)
        for address in self._host:
            self._cuda.free_host(address)
        self._opened, self._local, self._host = [], [], []
