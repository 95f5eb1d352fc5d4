"""An emulated network: puts and signals by cards that come late, between nodes.

A put is a kernel of its own on a stream of a queue pair, which waits for a bell that the rank's own
stream rings. So it reads its source and writes its target at any time between the bell and the end
of what waits for its signal, in pieces, as the machine's seed wants it; and races and weak stores
are seen as those of any kernel. There are several queue pairs for a pair of ranks, taken in turn:
of two puts, either may be first. So it is with those that kernels start by themselves.
"""

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ep_megatron.backends.base import Backend
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.cuda_nodes import CudaNodesBackend
from ep_megatron.backends.device import Launch
from ep_megatron.backends.nvshmem import NvshmemNetwork
from ep_megatron.config import BufferConfig
from ep_megatron.hosts import Hosts
from tests.cuda.emulated import _HOST as HOST_PTX
from tests.cuda.emulated import (
    NUM_SMS,
    EmulatedDevice,
    Ranks,
    ThreadMeeting,
    ThreadReference,
    _Table,
    shipped_ptx,
)
from tests.cuda.fatbin import embedded_ptx
from tests.emulator.machine import Machine

_QUEUE_PAIRS = 16  # the first of their streams
_KERNELS_QUEUE_PAIRS = 1000  # of puts that kernels start
_PAIRS_PER_PEER = 3
_CARD = """.version 8.0
.target sm_90
.address_size 64
.visible .entry nic_ring(.param .u64 bell, .param .u32 count) {
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [bell];
    ld.param.u32 %r1, [count];
    st.release.sys.global.u32 [%rd1], %r1;
    ret;
}
.visible .entry nic_put(.param .u64 bell, .param .u32 count, .param .u64 source,
    .param .u64 target, .param .u64 bytes, .param .u64 signal, .param .u64 value) {
    .reg .pred %p<4>;
    .reg .b32 %r<10>;
    .reg .b64 %rd<10>;
    ld.param.u64 %rd1, [bell];
    ld.param.u32 %r1, [count];
    ld.param.u64 %rd2, [source];
    ld.param.u64 %rd3, [target];
    ld.param.u64 %rd4, [bytes];
    ld.param.u64 %rd5, [signal];
    ld.param.u64 %rd9, [value];
look:
    ld.acquire.sys.global.u32 %r3, [%rd1];
    sub.s32 %r4, %r3, %r1;
    setp.lt.s32 %p1, %r4, 0;
    @%p1 bra look;
    mov.u32 %r5, %tid.x;
    mul.wide.u32 %rd6, %r5, 16;
copy:
    setp.ge.u64 %p2, %rd6, %rd4;
    @%p2 bra copied;
    add.s64 %rd7, %rd2, %rd6;
    add.s64 %rd8, %rd3, %rd6;
    ld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%rd7];
    st.global.v4.u32 [%rd8], {%r6, %r7, %r8, %r9};
    add.s64 %rd6, %rd6, 512;
    bra copy;
copied:
    bar.warp.sync 0xffffffff;
    setp.ne.u32 %p3, %r5, 0;
    @%p3 bra done;
    st.release.sys.global.u64 [%rd5], %rd9;
done:
    ret;
}
"""


@cache
def _ptx_with(kernels: str) -> list[str]:
    path = import_module("ep_megatron._nvshmem").__file__
    assert path is not None
    return [ptx for ptx in embedded_ptx(Path(path)) if f".entry {kernels}" in ptx]


def far_ptx() -> list[str]:
    """Return the PTX of `_nvshmem` with our low-latency kernels, and nothing of NVSHMEM."""
    return _ptx_with("ep_packed_")


def post_ptx() -> list[str]:
    """Return the PTX of `_nvshmem` with what brings posts to far ranks; likewise."""
    return _ptx_with("ep_notify_")


def cross_ptx() -> list[str]:
    """Return the PTX of `_nvshmem` with what puts rows in calls that no host waits for."""
    return _ptx_with("ep_cross_put")


@dataclass(frozen=True)
class _Launch:
    """See `Launch`."""

    kernel: str
    grid: int
    block: int
    params: bytes
    shared_bytes: int = 0


@dataclass
class Fabric:
    """Which memory is whose, for all ranks of a machine."""

    nodes: Hosts
    shared: list[tuple[int, int, int]] = field(default_factory=list)  # node, address, end

    def check(self, rank: int, launch: Launch) -> None:
        """No kernel but a card's may know of another node's memory."""
        count = len(launch.params) // 8
        for (word,) in struct.iter_unpack("<Q", launch.params[: 8 * count]):
            for node, begin, end in self.shared:
                if begin <= word < end:
                    assert node == self.nodes.host_of[rank], (launch.kernel, rank, node)


class NodeDevice(EmulatedDevice):
    """A GPU of one of several nodes. The host waits for its own stream alone, not for cards."""

    fabric: Fabric
    stream = 0

    def allocate_shared(self, num_bytes: int, is_zeroed: bool) -> tuple[int, bytes]:
        address, handle = super().allocate_shared(num_bytes, is_zeroed)
        node = self.fabric.nodes.host_of[self._rank]
        self.fabric.shared.append((node, address, address + num_bytes))
        return address, handle

    def launch(self, launch: Launch) -> None:
        self.fabric.check(self._rank, launch)
        super().launch(launch)

    def _synchronize(self, stream: int = 0) -> None:
        self._machine.synchronize(self._rank, stream)


class EmulatedNvshmem:
    """One rank's `ep_megatron._nvshmem`; tests/test_nvshmem.py compares the signatures."""

    UNIQUE_ID_BYTES = 128

    def __init__(self, machine: Machine, device: NodeDevice, meeting: ThreadMeeting) -> None:
        self._machine, self._device, self._meeting = machine, device, meeting
        self._regions: list[tuple[list[int], int]] = []
        self._world: tuple[bytes, int, int] | None = None
        self._bell = device.allocate(4)
        self.num_puts = self._num_from_kernels = 0

    def version(self) -> str:
        return "0.0.0"

    def unique_id(self) -> bytes:
        return secrets.token_bytes(self.UNIQUE_ID_BYTES)

    def join(self, unique_id: bytes, rank: int, num_ranks: int, device: int) -> None:
        assert self._world is None
        self._world = (unique_id, rank, num_ranks)

    def world(self) -> tuple[bytes, int, int] | None:
        return self._world

    def allocate(self, num_bytes: int) -> int:
        address, _ = self._device.allocate_shared(num_bytes, True)
        texts = self._meeting.gather_text("network", f"{address} {num_bytes}")
        assert len({text.split()[1] for text in texts}) == 1, "not symmetric"
        self._regions.append(([int(text.split()[0]) for text in texts], num_bytes))
        return address

    def peer_address(self, address: int, peer: int) -> int:
        nodes = self._device.fabric.nodes
        is_near = nodes.host_of[peer] == nodes.host_of[self._meeting.rank]
        return self._at(peer, address, 1) if is_near else 0

    def launch(self, kernel: str, grid: int, block: int, params: bytes, stream: int) -> None:
        assert stream == self._device.stream
        self._device.launch(_Launch(kernel, grid, block, params))

    def put_from_kernel(
        self, target: int, source: int, num_bytes: int, signal: int, value: int, peer: int
    ) -> None:
        """Copy (nothing, where it is only a signal) and then signal, by some queue pair."""
        machine, rank = self._machine, self._meeting.rank
        assert num_bytes % 16 == source % 16 == target % 16 == signal % 8 == 0
        if num_bytes:
            self._at(rank, source, num_bytes)
            target = self._at(peer, target, num_bytes)
        there = self._at(peer, signal, 8)
        params = machine.pack("nic_put", self._bell, 0, source, target, num_bytes, there, value)
        self._num_from_kernels += 1
        pair = _PAIRS_PER_PEER * peer + self._num_from_kernels % _PAIRS_PER_PEER
        machine.launch(rank, "nic_put", 1, 32, 0, params, _KERNELS_QUEUE_PAIRS + pair)

    def put_signal(
        self,
        peer: int,
        source: int,
        target: int,
        num_bytes: int,
        signal: int,
        value: int,
        stream: int,
    ) -> None:
        assert stream == self._device.stream
        machine, rank = self._machine, self._meeting.rank
        assert num_bytes % 16 == source % 16 == target % 16 == signal % 8 == 0
        assert num_bytes > 0
        self._at(rank, source, num_bytes)  # registered
        self.num_puts += 1
        params = machine.pack(
            "nic_put",
            self._bell,
            self.num_puts,
            source,
            self._at(peer, target, num_bytes),
            num_bytes,
            self._at(peer, signal, 8),
            value,
        )
        ring = machine.pack("nic_ring", self._bell, self.num_puts)
        pair = _PAIRS_PER_PEER * peer + self.num_puts % _PAIRS_PER_PEER
        machine.launch(rank, "nic_put", 1, 32, 0, params, _QUEUE_PAIRS + pair)
        machine.launch(rank, "nic_ring", 1, 1, 0, ring)

    def _at(self, peer: int, address: int, num_bytes: int) -> int:
        for addresses, size in self._regions:
            offset = address - addresses[self._meeting.rank]
            if offset >= 0 and offset + num_bytes <= size:
                return addresses[peer] + offset
        raise AssertionError("put: expected memory of the network")


def serve_kernels(machine: Machine, natives: Sequence[EmulatedNvshmem]) -> None:
    """Let kernels put and signal by the cards of their ranks."""

    def put(rank: int, lane: int, arguments: tuple[int, ...]) -> None:
        if lane == 0:
            natives[rank].put_from_kernel(*arguments)

    def signal(rank: int, lane: int, arguments: tuple[int, int, int]) -> None:
        address, value, peer = arguments
        natives[rank].put_from_kernel(0, 0, 0, address, value, peer)

    machine.on_call("ep_put_signal", put)
    machine.on_call("ep_signal", signal)


class Nodes(Ranks):
    """Emulated GPUs of several nodes, with the CUDA backend over a network.

    Args:
        layout: one letter per rank: its node.
        seed: of the interleaving.
        mode: see tests/emulator/README.md.
        is_exact: `float32_between_hosts`.
        timeout: of waits, in seconds of the emulated clock.
        chunk_bytes: `chunk_bytes_between_hosts`, of all ranks or by rank.
        kernels: PTX in place of what the extension holds.
    """

    def __init__(
        self,
        layout: str,
        seed: int = 0,
        mode: str = "plain",
        *,
        is_exact: bool = False,
        timeout: float = 1e9,
        chunk_bytes: int | Sequence[int] = 1,
        kernels: Sequence[str] = (),
    ) -> None:
        num_ranks = self.num_ranks = len(layout)
        self.machine = Machine(num_ranks, seed=seed, mode=mode)
        for ptx in (HOST_PTX, _CARD, *(kernels or shipped_ptx()), *post_ptx(), *cross_ptx()):
            self.machine.load(ptx)
        hosts = Hosts.from_ids(layout)
        self.fabric = Fabric(hosts)
        whole = _Table(num_ranks, self.machine.meet)
        inside = [_Table(len(members), self.machine.meet) for members in hosts.members]
        self._tables = [whole, _Table(num_ranks), *inside]
        devices = [NodeDevice(self.machine, rank) for rank in range(num_ranks)]
        for device in devices:
            device.fabric = self.fabric
        self.devices = list(devices)
        self._fail_together()
        config = BufferConfig(
            timeout=timeout,
            num_sms=NUM_SMS,
            float32_between_hosts=is_exact,
        )
        by_rank = [chunk_bytes] * num_ranks if isinstance(chunk_bytes, int) else chunk_bytes
        configs = [replace(config, chunk_bytes_between_hosts=size) for size in by_rank]

        def make(rank: int) -> CudaNodesBackend:
            device, meeting = devices[rank], ThreadMeeting(rank, whole)
            table = inside[hosts.host_of[rank]]
            backend = CudaBackend(ThreadMeeting(hosts.index_of[rank], table), device, config)
            native = natives[rank] = EmulatedNvshmem(self.machine, device, meeting)
            network = NvshmemNetwork(meeting, rank, device.stream, lambda: native)
            return CudaNodesBackend(meeting, backend, device, network, configs[rank], layout)

        natives: dict[int, EmulatedNvshmem] = {}
        self.backends = self._on_threads(make)
        serve_kernels(self.machine, [natives[rank] for rank in range(num_ranks)])
        self.references = [ThreadReference(rank, self._tables[1]) for rank in range(num_ranks)]


def gathered(reference: Backend, tensor: Tensor) -> list[Tensor]:
    """Return every rank's tensor."""
    assert isinstance(reference, ThreadReference)
    tensors = reference._table.lay(reference.rank, tensor)
    reference._table.barrier.wait(120)
    return [torch.as_tensor(t) for t in tensors]
