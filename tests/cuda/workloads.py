"""Calls in which every synchronising instruction of our kernels matters, for tests/cuda/mutants.py.

Each takes the PTX of all kernels, a seed and a mode of the emulator, raises where a result is
wrong, and returns what the machine reported.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.backends.crossing import Record, Traffic
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.cuda_nodes import CudaNodesBackend
from ep_megatron.backends.device import Launch
from ep_megatron.config import BufferConfig
from tests.cuda.emulated import Ranks, shipped_ptx
from tests.cuda.nic import Nodes
from tests.cuda.packed_workloads import PACKED, Reports, Workload
from tests.cuda.within import LATE, check_failures, check_within, routing_within
from tests.emulator.machine import Fault
from tests.routing import Case
from tests.test_cuda_nodes import CASES, check, lossy

# Enough tokens for several steps of a warp and, with more SMs, several blocks.
CASE = Case("mutants", (70, 20, 3), num_topk=4, experts_per_rank=6, hidden=8, alignment=4)
_SLOTS = 2  # of a post, which must be written again


def without_trap(kernels: list[str]) -> list[str]:
    """Let hosts read what a kernel says before it traps: the machine would stop there."""
    return [ptx.replace("trap;", "exit;") for ptx in kernels]


# -- one NVLink domain ----------------------------------------------------------------------------


def refused_calls(backend: Backend) -> list[Tensor]:
    """Return what a rank hears of calls that all must refuse: a bad index, and two dtypes."""
    rank = backend.rank
    x, topk_idx = CASE.x(rank, torch.float32), CASE.topk_idx(rank)
    bad = topk_idx.clone()
    if rank == 1:
        bad[2, 1] = CASE.num_experts
    heard = []
    for idx, rows in ((bad, x), (topk_idx, x.double() if rank == 2 else x)):
        try:
            backend.dispatch(Rows(rows), Routing(idx, CASE.num_experts))
            heard.append("nothing")
        except ValueError as error:
            heard.append(str(error))
    return [torch.tensor(list(text.encode())) for text in heard]


def calls(backend: Backend, _reference: Backend) -> list[Tensor]:
    """Return what some calls give on one rank, memory having been written again in between."""
    results: list[Tensor] = []
    x = CASE.x(backend.rank, torch.float32)
    for expand in (True, False) * _SLOTS:
        routing = Routing(CASE.topk_idx(backend.rank), CASE.num_experts, expand, CASE.alignment)
        rows, handle = backend.dispatch(Rows(x), routing)
        summed, _ = backend.combine(rows, handle)
        results += [rows.x.clone(), handle.routes, summed]
    return results + refused_calls(backend)


def calls_without_arrival(backend: Backend, _reference: Backend) -> list[Tensor]:
    """Return what the host of a rank finds when rank 1 does not arrive."""
    assert isinstance(backend, CudaBackend)
    meeting, device = backend._meeting, backend._device
    meeting.meet("mutants", None)
    if backend.rank == 1:
        return []
    meeting.arrive(waits=True)
    device.wait_for_word(meeting._arrive_error, meeting.ticket, 0)
    epoch, seen = _cuda.read_arrive_error(meeting._arrive_error.read(), meeting.num_ranks)
    return [torch.tensor([epoch, *seen])]


def _compared(ranks: Ranks, function: Callable[..., Any]) -> Reports:
    """Compare what all ranks return with a run of the shipped kernels."""
    expected = _expected(function)
    for mine, other in zip(ranks.run(function), expected, strict=True):
        assert len(mine) == len(other)
        assert all(map(torch.equal, mine, other))
    reports: Reports = ranks.machine.report()
    return reports


@functools.cache
def _expected(function: Callable[..., Any]) -> list[list[Tensor]]:
    return _ranks(function, shipped_ptx(), 0, "plain").run(function)


def _ranks(function: Callable[..., Any], kernels: list[str], seed: int, mode: str) -> Ranks:
    if function is calls:
        return Ranks(3, seed, mode, BufferConfig(timeout=1e9, num_sms=2), kernels)
    return Ranks(3, seed, mode, BufferConfig(timeout=3.0, num_sms=2), without_trap(kernels))


def arriving(kernels: list[str], seed: int, mode: str) -> Reports:
    """Dispatches and combines of three ranks, and dispatches that they refuse."""
    return _compared(_ranks(calls, kernels, seed, mode), calls)


def not_arriving(kernels: list[str], seed: int, mode: str) -> Reports:
    """A call in which one rank does not arrive."""
    ranks = _ranks(calls_without_arrival, kernels, seed, mode)
    return _compared(ranks, calls_without_arrival)


def within(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls of three ranks in which no host waits, and such that fail on the device."""
    ranks = Ranks(3, seed, mode, BufferConfig(timeout=1e9, num_sms=2), kernels)
    for expand in (True, False):
        ranks.run(check_within, CASE, torch.float32, expand)
    ranks.run(check_failures, LATE)
    reports: Reports = ranks.machine.report()
    return reports


# -- several nodes --------------------------------------------------------------------------------


def crossing(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls between two nodes."""
    nodes = Nodes("AB", seed, mode, kernels=kernels)
    for _ in range(_SLOTS):
        nodes.run(check, CASES[2], "AB", torch.float32, False)
    reports: Reports = nodes.machine.report()
    return reports


def rows_that_are_lost(backend: Backend, _reference: Backend) -> None:
    """Exchange a row with every rank of the other node; what rank 2 sends does not come."""
    crossing: Any = getattr(backend, "_crossing")  # noqa: B009
    rank = backend.rank
    num_rows = {(a, b): 1 for a in range(4) for b in range(4) if a // 2 != b // 2}
    exchange = crossing.begin("exchange", Record(16, ()), Traffic.of(rank, num_rows))
    with crossing._device.on_stream():
        exchange.put_all_rows()
        exchange.wait_for_all()
    if rank < 2:  # this host is to learn of it by the kernel's word alone
        crossing._device.wait_for_word(crossing._error, crossing._epoch, 0)
        with pytest.raises(RuntimeError, match="got nothing from rank 2;"):
            crossing.check("exchange")


def not_crossing(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rows that do not come: the host learns whose."""
    nodes = Nodes("AABB", seed, mode, timeout=0.02, kernels=without_trap(kernels))
    lossy(nodes, 2)
    nodes.run(rows_that_are_lost)
    reports: Reports = nodes.machine.report()
    return reports


def crossing_within(kernels: list[str], seed: int, mode: str) -> Reports:
    """Calls of two nodes in which no host waits, and such that fail on the device."""
    nodes = Nodes("AAB", seed, mode, kernels=kernels)
    for expand in (True, False):
        nodes.run(check_within, CASE, torch.float32, expand)
    nodes.run(check_failures, LATE)
    reports: Reports = nodes.machine.report()
    return reports


def not_crossing_within(kernels: list[str], seed: int, mode: str) -> Reports:
    """Rows of such a call that do not come: the host learns whose."""
    nodes = Nodes("AB", seed, mode, timeout=0.05, kernels=without_trap(kernels))
    lose_within(nodes, 0)
    backend: Any = nodes.backends[1]
    device, launch = nodes.devices[1], nodes.devices[1].launch

    def look_behind(launched: Launch) -> None:  # this host learns of it by the kernel's word alone
        launch(launched)
        if launched.kernel == "ep_cross_await_kernel":
            device.wait_for_word(backend._crossing._error, backend._everyone.ticket, 0)
            backend._crossing.check("dispatch")

    device.launch = look_behind  # type: ignore[assignment]
    errors = nodes.run(check_lost_within, CASES[2])
    assert "got nothing from rank 0;" in errors[1]
    reports: Reports = nodes.machine.report()
    return reports


def lose_within(nodes: Nodes, rank: int) -> None:
    """Let nothing come that a rank puts in a call that no host waits for, but its posts."""
    backend: Any = nodes.backends[rank]
    crossing, put = backend._within._crossing, nodes.machine._functions["ep_put_signal"]
    end = crossing._signals + 8 * _cuda.NUM_CROSS_PARTS * crossing.num_ranks

    def lose(source: int, lane: int, arguments: tuple[int, ...]) -> None:
        if source != rank or not crossing._signals <= arguments[3] < end:
            put(source, lane, arguments)

    nodes.machine.on_call("ep_put_signal", lose)


def check_lost_within(backend: Backend, _reference: Backend, case: Case) -> str:
    """Nobody waits on the host for what rank 0 sends; the next call says that it did not come."""
    assert isinstance(backend, CudaNodesBackend)
    rank, x = backend.rank, Rows(case.x(backend.rank, torch.float32))
    try:
        _, handle = backend.dispatch_within(x, routing_within(case, rank, False, 20))
        handle.numbers.tolist()
        if rank == 1:
            backend.dispatch_within(x, routing_within(case, rank, False, 20))
    except (Fault, RuntimeError) as error:  # a trap stops the machine, and all of its ranks
        return str(error)
    return ""


WORKLOADS: dict[str, list[Workload]] = {
    "ep_count_kernel": [arriving],
    "ep_route_kernel": [arriving, crossing],
    "ep_notify_kernel": [arriving, crossing, within, not_arriving, crossing_within],
    "ep_arrive_kernel": [arriving, not_arriving],
    "ep_packed_": PACKED,
    "ep_cross_wait_kernel": [crossing, not_crossing],
    "ep_cross_await_kernel": [crossing_within, not_crossing_within],
}
