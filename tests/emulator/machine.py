"""The emulated machine as tests and backends use it."""

import gc
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulator import build

_emulator: Any = build.load()
Fault = _emulator.Fault
ParseError = _emulator.ParseError
# Machines that nobody uses lie in cycles of Python's, which does not see that they are large.
_MANY = 6
_living: "weakref.WeakSet[Machine]" = weakref.WeakSet()
SAMPLES = Path(__file__).parent / "samples"


class Machine(_emulator.Machine):
    """Several ranks with memory and streams that execute PTX.

    Args:
        num_ranks: how many devices there are.
        seed: decides every interleaving. The same launches with one seed run the same way.
        mode: "plain", "race" (data races are reported), "weak" (stores stay in buffers until
            something orders them) or "race+weak".

    Launches are asynchronous and run in order within a (rank, stream). `synchronize` may be called
    by one thread per rank at once; it and `run` raise `Fault` for what no kernel may do, hangs
    included. Everything less final is in `report()`, as pairs of a kind and a text. Ask for
    reports, counts and kernels while nothing runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See the class."""
        if len(_living) >= _MANY:
            gc.collect()
        super().__init__(*args, **kwargs)
        self._functions: dict[str, Callable[..., int | None]] = {}
        _living.add(self)

    def on_call(self, name: str, function: Callable[..., int | None]) -> None:
        """Let `function(rank, lane, arguments)` be what a kernel calls by that name."""
        # Kept here, where the collector sees that a function may hold its machine.
        self._functions[name] = function
        machine = weakref.ref(self)

        def call(rank: int, lane: int, arguments: tuple[int, ...]) -> int | None:
            called = machine()
            assert called is not None
            return called._functions[name](rank, lane, arguments)

        super().on_call(name, call)

    def load(self, ptx: str) -> None:
        """Parse a module; its kernels' names must be new."""
        super().load(ptx)
        self.parameters = {name: entry["parameters"] for name, entry in self.kernels().items()}

    def pack(self, kernel: str, *arguments: int | float | bytes) -> bytes:
        """Lay out arguments as the kernel's parameter list says."""
        parameters = self.parameters[kernel]
        if len(arguments) != len(parameters):
            raise ValueError(
                f"pack: expected {len(parameters)} arguments for {kernel}, got {len(arguments)}"
            )
        packed = bytearray()
        for (name, offset, num_bytes), argument in zip(parameters, arguments, strict=True):
            packed += bytes(offset - len(packed))
            if isinstance(argument, float):
                argument = struct.pack("<f" if num_bytes == 4 else "<d", argument)
            elif isinstance(argument, int):
                argument = argument.to_bytes(num_bytes, "little", signed=argument < 0)
            if len(argument) != num_bytes:
                raise ValueError(
                    f"pack: expected {num_bytes} bytes for {name}, got {len(argument)}"
                )
            packed += argument
        return bytes(packed)

    def place(
        self, rank: int, data: np.ndarray[Any, Any], symmetric: bool = False, name: str = "data"
    ) -> int:
        """Allocate memory for an array, copy it there and return its address."""
        address: int = self.allocate(rank, max(data.nbytes, 1), symmetric, name)
        self.write(rank, address, np.ascontiguousarray(data))
        return address

    def fetch(
        self, rank: int, address: int, shape: tuple[int, ...] | int, dtype: Any
    ) -> np.ndarray[Any, Any]:
        """Return a copy of memory as an array."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        flat = np.frombuffer(self.read(rank, address, num_bytes), dtype)
        array: np.ndarray[Any, Any] = flat.reshape(shape).copy()
        return array


def forms() -> list[str]:
    """Return the full names of all opcodes that only compute."""
    names: list[str] = _emulator.forms()
    return names


def sample(name: str) -> str:
    """Return the committed PTX of one of samples/*.cu."""
    return (SAMPLES / f"{name}.ptx").read_text()
