"""What the CUDA backend needs of a GPU. A real one fulfils it, and one that tests emulate.

Kernels of one device run one after the other, in the order of their launches.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Launch(Protocol):
    """One kernel launch; see csrc/cuda/launch.h."""

    @property
    def kernel(self) -> str:
        """Name of the kernel."""

    @property
    def grid(self) -> int:
        """Blocks."""

    @property
    def block(self) -> int:
        """Threads of a block."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""

    @property
    def params(self) -> bytes:
        """The one struct that the kernel takes, byte for byte."""


class HostMemory(Protocol):
    """Zeroed host memory that kernels reach."""

    device_address: int

    def read(self) -> bytes | memoryview:
        """Return its bytes as they are now."""

    def write(self, data: bytes) -> None:
        """Put bytes at its start."""


@dataclass(frozen=True)
class Memory:
    """A tensor's memory as kernels see it.

    Attributes:
        address: where it starts; a multiple of 16.
        dtype: of its elements.
        shape: contiguous.
        owner: keeps the memory.
    """

    address: int
    dtype: torch.dtype
    shape: Sequence[int]
    owner: object

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Device(Protocol):
    """See the module. Methods raise RuntimeError with the system's reason.

    Attributes:
        num_sms: streaming multiprocessors.
        device_type: of the tensors it takes and gives, as torch names it.
    """

    num_sms: int
    device_type: str

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory of this device."""

    def allocate_shared(self, num_bytes: int, is_zeroed: bool) -> tuple[int, bytes]:
        """Return the address of memory that peers can map, and what they need for it."""

    def open_shared(self, handle: bytes) -> int:
        """Map a peer's memory; return its address here."""

    def allocate_host(self, num_bytes: int) -> HostMemory:
        """Return zeroed host memory that kernels reach."""

    def on_stream(self) -> AbstractContextManager[None]:
        """Launch inside this: after the caller's work, and before what the caller does later."""

    def launch(self, launch: Launch) -> None:
        """Launch a kernel, inside `on_stream`."""

    def is_capturing(self) -> bool:
        """Return whether launches go into a graph now, to be made later, again and again."""

    def graph_id(self) -> int:
        """Return a number of the graph that launches go into now; 0 for none."""

    def wait_for_word(self, memory: HostMemory, epoch: int, timeout: float) -> bool:
        """Wait until the first word of `memory` reaches `epoch`; False after `timeout` seconds.

        Frees the GIL and hears Ctrl-C.
        """

    def input(self, tensor: Tensor) -> Memory:
        """Return a contiguous tensor as memory that kernels read, aligned to 16 bytes.

        Called before `on_stream`, for it may copy.
        """

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy, made where `input` would read."""

    def arena_address(self, tensor: Tensor) -> int | None:
        """Return where a tensor lies, for a look whether that is in shared memory; None if not."""

    def output(
        self, dtype: torch.dtype, shape: Sequence[int], into: Tensor | None = None
    ) -> Memory:
        """Return uninitialised memory for a result, or for one that `into` is to hold."""

    def tensor(self, output: Memory) -> Tensor:
        """Return a result, after `on_stream`, as a tensor."""

    def views(self, address: int, num_bytes: int, free: Callable[[], None]) -> Tensor:
        """Return shared memory as a uint8 tensor, after `on_stream`; `free` it with its last view.

        A device whose tensors cannot lie there returns a copy and frees at once.
        """

    def close(self) -> None:
        """Free what peers do not reach, after the last kernel; the rest is theirs to read."""


def check_not_capturing(device: Device, operation: str, advice: str) -> None:
    """Raise a RuntimeError where a call that waits on the host would go into a graph."""
    if device.is_capturing():
        raise RuntimeError(
            f"{operation}: expected a call that waits for nothing on the host while a CUDA graph "
            f"is captured, got one that does; {advice}"
        )
