"""An emulated GPU as a `Device`, and ranks as threads: the CUDA backend on a CPU.

Kernels are the PTX out of the built extension; tests/emulator executes it. A rank's tensors are
ordinary CPU tensors, copied into emulated memory before a call and out of it after. A host that
waits for a report is a thread of a kernel of its own, so that it knows what its acquire tells it
and no more.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ep_megatron import _cuda
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.device import HostMemory, Launch, Memory
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.process_group import ProcessGroupBackend
from ep_megatron.config import BufferConfig
from tests.cuda.fatbin import embedded_ptx
from tests.emulator.machine import Machine

NUM_SMS = 3
HANG_SECONDS = 240
_HOST_STREAM = 1
_HOST = """.version 8.0
.target sm_90
.address_size 64
.visible .entry host_waits(.param .u64 word, .param .u32 epoch) {
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [word];
    ld.param.u32 %r1, [epoch];
look:
    ld.acquire.sys.global.u32 %r2, [%rd1];
    setp.ne.u32 %p1, %r2, %r1;
    @%p1 bra look;
    ret;
}
"""


@cache
def shipped_ptx() -> list[str]:
    """Return the PTX that the extension holds."""
    assert _cuda.__file__ is not None
    return embedded_ptx(Path(_cuda.__file__))


class EmulatedHostMemory:
    """See `HostMemory`; it lies in the machine like all else."""

    def __init__(self, machine: Machine, rank: int, num_bytes: int) -> None:
        self._machine, self._rank, self._num_bytes = machine, rank, num_bytes
        self.device_address = machine.allocate(rank, num_bytes, name="host memory")
        self.write(bytes(num_bytes))

    def read(self) -> bytes:
        data: bytes = self._machine.read(self._rank, self.device_address, self._num_bytes)
        return data

    def write(self, data: bytes) -> None:
        self._machine.write(self._rank, self.device_address, data)

    def word(self) -> int:
        return int.from_bytes(self.read()[:4], "little")


class EmulatedGraph:
    """What a rank has done while it was captured, to be done again with the memory of then."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []

    def replay(self) -> None:
        """Do it."""
        for step in self.steps:
            step()


class EmulatedDevice:
    """See `Device`. Launches, and copies in and out of the machine, can be captured."""

    num_sms = 132  # the config takes fewer
    device_type = "cpu"

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine, self._rank = machine, rank
        self.has_failed = threading.Event()  # whether another rank has: it does not come any more
        self.launches: list[Launch] = []
        self._views: dict[int, tuple[int, int]] = {}  # memory here: bytes, where they came from
        self._graph: EmulatedGraph | None = None
        self._num_graphs = 0

    @contextmanager
    def capture(self) -> Iterator[EmulatedGraph]:
        """Let all that happens inside go into a graph instead."""
        self._graph = graph = EmulatedGraph()
        self._num_graphs += 1
        try:
            yield graph
        finally:
            self._graph = None

    def do(self, step: Callable[[], object]) -> None:
        """Do what is part of a captured computation, now or in replays."""
        if self._graph is None:
            step()
        else:
            self._graph.steps.append(step)

    def allocate(self, num_bytes: int) -> int:
        address: int = self._machine.allocate(self._rank, num_bytes, name="workspace")
        self._machine.write(self._rank, address, bytes(num_bytes))
        return address

    def allocate_shared(self, num_bytes: int, is_zeroed: bool) -> tuple[int, bytes]:
        address = self._machine.allocate(self._rank, num_bytes, symmetric=True, name="shared")
        if is_zeroed:
            self._machine.write(self._rank, address, bytes(num_bytes))
        return address, address.to_bytes(8, "little")

    def open_shared(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    def allocate_host(self, num_bytes: int) -> HostMemory:
        return EmulatedHostMemory(self._machine, self._rank, num_bytes)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        yield

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)
        self.do(
            lambda: self._machine.launch(
                self._rank,
                launch.kernel,
                launch.grid,
                launch.block,
                launch.shared_bytes,
                launch.params,
            )
        )

    def is_capturing(self) -> bool:
        return self._graph is not None

    def graph_id(self) -> int:
        return 0 if self._graph is None else self._num_graphs

    def wait_for_word(self, memory: HostMemory, epoch: int, timeout: float) -> bool:
        assert isinstance(memory, EmulatedHostMemory)
        assert not self.is_capturing(), "a host waits for what is not launched"
        params = self._machine.pack("host_waits", memory.device_address, epoch)
        self._machine.launch(self._rank, "host_waits", 1, 1, 0, params, _HOST_STREAM, on_host=True)
        self._synchronize(_HOST_STREAM)
        return memory.word() == epoch

    def input(self, tensor: Tensor) -> Memory:
        address = self._machine.allocate(self._rank, max(tensor.nbytes, 16), name="input")

        def write() -> None:
            data = tensor.contiguous().view(-1).view(torch.uint8)
            self._machine.write(self._rank, address, data.numpy())

        if tensor.nbytes:
            self.do(write)
        return Memory(address, tensor.dtype, tensor.shape, self)

    def copy(self, tensor: Tensor) -> Tensor:
        copied = torch.empty_like(tensor)
        self.do(lambda: copied.copy_(tensor))
        return copied

    def arena_address(self, tensor: Tensor) -> int | None:
        """Bring what the caller has made of received rows back to where they came from."""
        start = tensor.data_ptr()
        for first, (num_bytes, address) in list(self._views.items()):
            if first <= start and start + tensor.nbytes <= first + num_bytes and tensor.nbytes:
                at = address + start - first

                def bring(at: int = at) -> None:
                    self._synchronize()
                    data = tensor.reshape(-1).view(torch.uint8).numpy()
                    self._machine.write(self._rank, at, data)

                self.do(bring)
                return at
        return None

    def output(
        self, dtype: torch.dtype, shape: Sequence[int], into: Tensor | None = None
    ) -> Memory:
        num_bytes = max(torch.Size(shape).numel() * dtype.itemsize, 16)
        address = self._machine.allocate(self._rank, num_bytes, name="output")
        return Memory(address, dtype, shape, into)

    def tensor(self, output: Memory) -> Tensor:
        into = output.owner
        if not isinstance(into, Tensor):
            into = torch.zeros(*output.shape, dtype=output.dtype)

        def read() -> None:
            data = self._read(output.address, output.num_bytes)
            into.copy_(data.view(output.dtype).view(*output.shape))

        self.do(read)
        return into

    def views(self, address: int, num_bytes: int, free: Callable[[], None]) -> Tensor:
        assert not self.is_capturing(), "received rows of a graph would be given back"
        data = self._read(address, num_bytes)
        if num_bytes == 0:
            free()
            return data
        # Held by the tensor's storage, hence by its last view.
        array = data.numpy().copy()
        start = array.ctypes.data
        self._views[start] = num_bytes, address

        def forget() -> None:
            del self._views[start]
            free()

        weakref.finalize(array, forget)
        return torch.from_numpy(array)

    def close(self) -> None:
        self._synchronize()

    def _synchronize(self, stream: int = -1) -> None:
        """Run until this rank's kernels have ended; a rank may be long in launching its own.

        Of what they wrote, the host then knows what the kernels of `stream` knew.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while self._machine.advance(self._rank) and time.monotonic() < deadline:
            if self.has_failed.is_set():
                raise threading.BrokenBarrierError
            time.sleep(0)
        self._machine.synchronize(self._rank, stream)

    def _read(self, address: int, num_bytes: int) -> Tensor:
        self._synchronize()
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        data = self._machine.read(self._rank, address, num_bytes)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class _Table:
    """Where threads that are ranks lay their messages for each other."""

    def __init__(self, num_ranks: int, when_all_met: Callable[[], None] | None = None) -> None:
        self.messages: list[Any] = [None] * num_ranks
        self.barrier = threading.Barrier(num_ranks, action=when_all_met)

    def lay(self, rank: int, message: Any) -> list[Any]:
        """Return all ranks' messages; a second wait must follow before the next."""
        self.messages[rank] = message
        self.barrier.wait(120)
        return list(self.messages)


class ThreadMeeting(Meeting):
    """A `Meeting` of threads."""

    def __init__(self, rank: int, table: _Table) -> None:
        self.rank, self.num_ranks, self.timeout = rank, len(table.messages), 120.0
        self._table = table

    def exchange(self, operation: str, message: Tensor, at_most: int | None = None) -> Tensor:
        messages = self._table.lay(self.rank, message.clone())
        if at_most is not None:
            messages = [pad(one, (0, at_most - len(one))) for one in messages]
        received = torch.stack(messages)
        self._table.barrier.wait(self.timeout)
        return received


class ThreadReference(ProcessGroupBackend):
    """The process group backend, whose bits are the reference, between threads."""

    def __init__(self, rank: int, table: _Table) -> None:
        self._meeting = ThreadMeeting(rank, table)
        self.rank, self.num_ranks = rank, len(table.messages)
        self._num_calls, self._broken, self._table = 0, "", table
        self._process = os.getpid()

    def _count(self, operation: str) -> None:
        """A reference counts nothing."""

    def _all_to_all(
        self,
        values: Sequence[Tensor],
        send_counts: tuple[int, ...],
        recv_counts: tuple[int, ...],
    ) -> list[Tensor]:
        sent = self._table.lay(self.rank, [value.split(send_counts) for value in values])
        received = [
            torch.cat([parts[index][self.rank] for parts in sent]) for index in range(len(values))
        ]
        assert all(len(value) == sum(recv_counts) for value in received)
        self._table.barrier.wait(self._meeting.timeout)
        return received


class Ranks:
    """`num_ranks` emulated GPUs with the CUDA backend on each, and the reference beside it.

    Args:
        num_ranks: of threads, and GPUs.
        seed: of the interleaving.
        mode: see tests/emulator/README.md.
        config: of the backends.
        kernels: PTX in place of what the extension holds.
    """

    def __init__(
        self,
        num_ranks: int,
        seed: int = 0,
        mode: str = "plain",
        config: BufferConfig | None = None,
        kernels: Sequence[str] = (),
    ) -> None:
        self.machine = Machine(num_ranks, seed=seed, mode=mode)
        for ptx in (_HOST, *(kernels or shipped_ptx())):
            self.machine.load(ptx)
        self.num_ranks = num_ranks
        self._tables = [_Table(num_ranks, self.machine.meet), _Table(num_ranks)]
        self.devices = [EmulatedDevice(self.machine, rank) for rank in range(num_ranks)]
        self._fail_together()
        config = config or BufferConfig(timeout=1e9, num_sms=NUM_SMS)
        self.backends: list[CudaBackend] = self._on_threads(
            lambda rank: CudaBackend(
                ThreadMeeting(rank, self._tables[0]), self.devices[rank], config
            )
        )

        self.references = [ThreadReference(rank, self._tables[1]) for rank in range(num_ranks)]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return every rank's `function(backend, reference, *args)`; raise the first error."""
        return self._on_threads(
            lambda rank: function(self.backends[rank], self.references[rank], *args)
        )

    def _fail_together(self) -> None:
        """Let the failure of one rank end the waits of all."""
        self._has_failed = threading.Event()
        for device in self.devices:
            device.has_failed = self._has_failed

    def _on_threads(self, action: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.num_ranks
        errors: list[BaseException | None] = [None] * self.num_ranks

        def work(rank: int) -> None:
            try:
                results[rank] = action(rank)
            except BaseException as error:
                errors[rank] = error
                self._has_failed.set()
                for table in self._tables:
                    table.barrier.abort()

        threads = [
            threading.Thread(target=work, args=(rank,), daemon=True)
            for rank in range(self.num_ranks)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 300
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a rank did not come to an end"
        self._has_failed.clear()
        for table in self._tables:
            table.barrier.reset()
        # A broken barrier is what the others see of a rank's error.
        first = [e for e in errors if e and not isinstance(e, threading.BrokenBarrierError)]
        if first:
            raise first[0]
        return results
