"""The CUDA backend on emulated GPUs of several nodes: the reference's rows, the stated sums.

Rows cross by puts of emulated cards, late and in the order of their queue pair alone; see
tests/cuda/nic.py. Sums are compared with the definition that tests/test_hierarchical.py holds the
`hierarchical` backend to, bit for bit.
"""

import itertools
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast
from unittest.mock import MagicMock, patch

import pytest
import torch

from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.config import MAX_CHUNKS
from ep_megatron.fp8 import FP8, MXFP8
from tests.routing import Case
from tests.test_dispatch import HANDLE_NUMBERS
from tests.test_hierarchical import node_sums, node_weights

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")
pytest.importorskip("ep_megatron._nvshmem", reason="built without NVSHMEM")

from ep_megatron.backends.crossing import Crossing, Record, Traffic
from tests.cuda import nic
from tests.cuda.layers import Form, run_with_buffers
from tests.cuda.layers import check as check_layers
from tests.cuda.nic import EmulatedNvshmem, Nodes, gathered, post_ptx
from tests.test_cuda_backend import error_of, same, same_rows

CASES = {
    2: Case("two", (5, 4), num_topk=3, hidden=16),
    4: Case("four", (5, 0, 7, 3), num_topk=4, experts_per_rank=2, hidden=24, alignment=4),
    8: Case("eight", (3, 4, 0, 5, 2, 6, 1, 3), num_topk=5, experts_per_rank=2, hidden=8),
}
LAYOUTS = ["AB", "AABB", "AAAABBBB", "AABBCCDD", "ABBA", "AAAB", "AAAA"]


def check(
    backend: Backend, reference: Backend, case: Case, layout: str, dtype: torch.dtype, exact: bool
) -> None:
    """Dispatch, combine with and without biases, and a cached dispatch, in both row orders."""
    rank = backend.rank
    for expand in (False, True):
        routing = Routing(case.topk_idx(rank), case.num_experts, expand, case.alignment)
        sent = Rows(case.x(rank, dtype), topk_weights=case.weights(rank))
        (mine, handle), (other, other_handle) = (
            b.dispatch(sent, routing) for b in (backend, reference)
        )
        same_rows(mine, other)
        assert torch.equal(handle.routes, other_handle.routes)
        for name in HANDLE_NUMBERS:
            assert getattr(handle, name) == getattr(other_handle, name), name
        rng = torch.Generator().manual_seed(rank)
        y = torch.randn(handle.num_recv_rows, case.hidden, generator=rng, dtype=torch.float64)
        y.view(-1)[::7] = -0.0
        columns = (len(y),) if expand else (len(y), case.num_topk)
        rows = Rows(y.to(dtype), topk_weights=torch.randn(columns, generator=rng))
        assert rows.topk_weights is not None
        everyone, weights = gathered(reference, rows.x), gathered(reference, rows.topk_weights)
        biases = [case.x(rank, dtype) + 1, case.x(rank, dtype) * 3]
        wire = torch.float32 if exact else dtype
        for used in ([], biases[:1], biases):
            out, out_weights = backend.combine(rows, handle, used)
            same(out, node_sums(layout, other_handle, everyone, used, wire))
            same(out_weights, node_weights(layout, other_handle, weights))
        again = Rows(case.x(rank, dtype).flip(0), topk_weights=case.weights(rank, torch.float64))
        same_rows(
            backend.dispatch_again(again, handle), reference.dispatch_again(again, other_handle)
        )


def no_report(nodes: Nodes) -> None:
    assert nodes.machine.report() == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_references_and_sums_the_definitions(layout: str) -> None:
    nodes = Nodes(layout)
    for dtype in (torch.bfloat16, torch.float32):
        nodes.run(check, CASES[len(layout)], layout, dtype, False)
    no_report(nodes)


def test_sums_travel_in_float32_where_asked() -> None:
    nodes = Nodes("AABB", is_exact=True)
    nodes.run(check, CASES[4], "AABB", torch.bfloat16, True)
    no_report(nodes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["race", "weak"])
def test_no_interleaving_of_cards_and_kernels_races_or_changes_a_bit(mode: str, seed: int) -> None:
    nodes = Nodes("AABB", seed, mode)
    nodes.run(check, CASES[4], "AABB", torch.bfloat16, False)
    no_report(nodes)


def check_fp8(backend: Backend, reference: Backend, case: Case) -> None:
    routing = Routing(case.topk_idx(backend.rank), case.num_experts, True, case.alignment)
    for recipe in (FP8, replace(MXFP8, layout="column_major")):
        for widen_to in (None, torch.float32):
            x = case.x(backend.rank, torch.bfloat16)
            sent = Rows(x, topk_weights=case.weights(backend.rank), fp8=recipe, widen_to=widen_to)
            (mine, handle), (other, _) = (b.dispatch(sent, routing) for b in (backend, reference))
            same_rows(mine, other)
        same_rows(
            backend.dispatch_again(Rows(x, fp8=recipe), handle),
            reference.dispatch_again(Rows(x, fp8=recipe), _),
        )


def test_rows_are_cast_once_before_they_cross() -> None:
    nodes = Nodes("AABB")
    nodes.run(check_fp8, Case("fp8", (3, 4, 0, 5), num_topk=3, hidden=256, alignment=4))
    no_report(nodes)


def test_a_token_crosses_once_per_node() -> None:
    """Whatever experts it has there; and nothing crosses that stays."""
    nodes = Nodes("AABB")
    topk_idx = torch.tensor([[4, 5, 6, 7], [0, 1, 2, 3], [0, 4, 2, 6]])

    def send(backend: Backend, _reference: Backend, idx: torch.Tensor) -> None:
        idx = idx[: 0 if backend.rank else None]
        backend.dispatch(Rows(torch.zeros(len(idx), 512, dtype=torch.bfloat16)), Routing(idx, 8))

    crossed = [0]
    for idx in (topk_idx % 4, topk_idx):  # in the first call posts alone cross
        nodes.run(send, idx)
        crossed.append(nodes.machine.counts()["nic_put"]["peer_written"])
    record = 1024 + 4 * 16  # beside the row rank, row and column of each slot, and its expert
    signals = 2 + 1
    assert crossed[2] - 2 * crossed[1] == 2 * record + 8 * signals
    no_report(nodes)


@pytest.mark.parametrize(("chunk_bytes", "num_puts"), [(1, 6), (3 * 64, 4), (1 << 20, 1)])
def test_rows_cross_in_chunks_of_the_bytes_that_were_asked_for(
    chunk_bytes: int, num_puts: int
) -> None:
    """At most eight from one rank to another: 12 rows of 64 bytes, at least two at once."""
    nodes = Nodes("AB", chunk_bytes=chunk_bytes)

    def send(backend: Backend, _reference: Backend) -> None:
        idx = torch.full((12 * (backend.rank == 0), 1), 1)
        backend.dispatch(Rows(torch.zeros(len(idx), 16)), Routing(idx, 2))

    nodes.run(send)
    # Beside rows there is one more, and a post of each rank.
    assert nodes.machine.counts()["nic_put"]["launches"] == num_puts + 1 + 2


def test_the_first_chunk_is_forwarded_while_the_last_is_on_its_way() -> None:
    nodes = Nodes("AB")
    num_rows, hidden = 16, 16
    x = torch.arange(1.0, 1 + num_rows * hidden).view(num_rows, hidden)
    sender, receiver = (cast(Any, backend) for backend in nodes.backends)
    put, held = sender.network.put_signal, []

    def hold_the_last(*arguments: int) -> None:
        last_row = sender._crossing._outbox + x.nbytes - x[0].nbytes
        source, num_bytes = arguments[1], arguments[3]
        if source <= last_row < source + num_bytes:
            held.append(arguments)
        else:
            put(*arguments)

    def rows_there() -> torch.Tensor:
        arena = receiver._inside._arena
        data = nodes.machine.read(1, arena.address(0, 0), x.nbytes)
        return torch.frombuffer(bytearray(data), dtype=x.dtype).view(num_rows, hidden)

    def send(backend: Backend, _reference: Backend) -> torch.Tensor | None:
        mine = x[: num_rows * (backend.rank == 0)]
        received, _ = backend.dispatch(Rows(mine), Routing(torch.ones(len(mine), 1).int(), 2))
        if backend.rank == 1:
            return received.x
        deadline = time.monotonic() + 60
        first = num_rows - num_rows // MAX_CHUNKS
        while not torch.equal(rows_there()[:first], x[:first]):
            assert time.monotonic() < deadline, "no chunk is forwarded before all are there"
            nodes.machine.advance(1)
        assert not (rows_there()[first:] == x[first:]).any()
        (last,) = held
        put(*last)
        return None

    sender.network.put_signal = hold_the_last
    assert torch.equal(nodes.run(send)[1], x)
    no_report(nodes)


def test_gradients_cross() -> None:
    """Where each rank is a node the sums are the process group's."""
    nodes = Nodes("AB")
    forms = [
        Form(torch.float64, expand=True, weights=torch.float64, is_strided=True),
        Form(torch.float32, expand=False, recipe=MXFP8, is_handed_on=True),
    ]
    run_with_buffers(nodes, check_layers, replace(CASES[2], num_topk=2), forms)
    no_report(nodes)


@pytest.mark.parametrize("number", [0, 1, MAX_CHUNKS])
def test_a_wait_that_is_left_out_is_noticed(number: int) -> None:
    """Of a chunk of rows, or of what is beside them."""
    wait = Crossing.wait

    def wait_but_one(self: Crossing, epoch: int, index: int, sources: Sequence[int]) -> None:
        if index != number:
            wait(self, epoch, index, sources)

    def is_noticed(seed: int) -> bool:
        nodes = Nodes("AB", seed, "race")
        try:
            nodes.run(check, CASES[2], "AB", torch.float32, False)
        except (AssertionError, RuntimeError):
            return True
        return bool(nodes.machine.report())

    with patch.object(Crossing, "wait", wait_but_one):
        assert any(map(is_noticed, range(3)))


def check_errors(backend: Backend, _reference: Backend, case: Case) -> list[str]:
    """Each of these raises on all ranks, and the next call goes on."""
    rank = backend.rank
    x, idx = case.x(rank, torch.bfloat16), case.topk_idx(rank)
    routing = Routing(idx, case.num_experts)
    wrong = idx.clone()
    if rank == 2:
        wrong[2, 1] = case.num_experts
    other = torch.float16 if rank == 0 else torch.bfloat16
    errors = [
        error_of(lambda: backend.dispatch(Rows(x), replace(routing, topk_idx=wrong))),
        error_of(lambda: backend.dispatch(Rows(x.to(other)), routing)),
    ]
    _, handle = backend.dispatch(Rows(x), routing)
    plain = replace(handle, hop=None) if rank == 3 else handle
    y = torch.zeros(handle.num_recv_rows, case.hidden)
    with pytest.raises(ValueError, match="of this backend"):
        backend.combine(Rows(y), plain)
    assert not backend.combine(Rows(y), handle)[0].any()
    return errors


def test_bad_calls_raise_on_every_rank_and_the_next_goes_on() -> None:
    nodes = Nodes("AABB")
    errors = nodes.run(check_errors, CASES[4])
    assert errors[0] == errors[1]
    assert "rank 2: expected topk_idx to be in [0, 8)" in errors[0][0]
    assert "float16 on rank 0 and bfloat16 on rank 1, 2, 3" in errors[0][1]
    no_report(nodes)


def check_late(backend: Backend, _reference: Backend, case: Case) -> str:
    if backend.rank == 2:
        return ""
    routing = Routing(case.topk_idx(backend.rank), case.num_experts)
    x = case.x(backend.rank, torch.bfloat16)
    with pytest.raises(RuntimeError) as late:
        backend.dispatch(Rows(x), routing)
    with pytest.raises(RuntimeError, match="got one that broke down"):
        backend.dispatch(Rows(x), routing)
    return str(late.value)


def test_a_rank_that_does_not_come_is_named_on_every_node() -> None:
    nodes = Nodes("AABB", timeout=0.05)
    errors = nodes.run(check_late, CASES[4])
    for error in (errors[0], errors[1], errors[3]):
        assert "got nothing from rank 2;" in error
    no_report(nodes)


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_post_that_is_not_put_is_missed(left_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler makes two calls of it, with and without counts."""
    (ptx,) = post_ptx()
    calls = list(re.finditer(r"call\.uni\s+ep_put_signal,\s+\([^)]*\)\s*;", ptx))
    assert len(calls) == 2
    less = ptx[: calls[left_out].start()] + ptx[calls[left_out].end() :]
    monkeypatch.setattr(nic, "post_ptx", lambda: [less])
    nodes = Nodes("AB", timeout=0.05)

    def call(backend: Backend, _reference: Backend) -> None:
        rows, handle = backend.dispatch(Rows(torch.zeros(1, 16)), Routing(torch.tensor([[1]]), 2))
        backend.combine(rows, handle)

    with pytest.raises(RuntimeError, match="got nothing from rank"):
        nodes.run(call)


def test_a_post_may_be_overtaken_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 needs nothing of rank 1 but its posts, so it may be a call ahead of its own."""
    nodes = Nodes("AB")
    put, late = EmulatedNvshmem.put_from_kernel, []

    def put_second_late(self: EmulatedNvshmem, *arguments: int) -> None:
        if self._meeting.rank == 1 or arguments[-2] != 2:
            put(self, *arguments)
            return
        late.append(threading.Timer(0.3, put, (self, *arguments)))
        late[0].start()

    monkeypatch.setattr(EmulatedNvshmem, "put_from_kernel", put_second_late)

    def call(backend: Backend, _reference: Backend) -> None:
        idx = torch.full((3, 2), 2 * backend.rank)  # of the rank itself
        for number in range(4):
            x = torch.full((3, 16), float(number))
            assert torch.equal(backend.dispatch(Rows(x), Routing(idx, 4))[0].x, x)

    nodes.run(call)
    assert len(late) == 1
    no_report(nodes)


def test_ranks_with_another_config_are_refused() -> None:
    with pytest.raises(RuntimeError, match="between_hosts to be the same on all ranks, got 1 on"):
        Nodes("AB", chunk_bytes=(1, 2))


def test_room_that_is_not_found_is_not_taken_for_found() -> None:
    class Full:
        def allocate(self, num_bytes: int) -> int:
            if num_bytes > 1 << 20:
                raise RuntimeError("no room")
            return 4096

    device, meeting = MagicMock(), MagicMock(rank=0, num_ranks=2)
    crossing = Crossing(device, cast(Any, Full()), meeting, 1.0, 1)

    def begin(num_rows: int) -> None:
        rows = {(0, 1): num_rows, (1, 0): num_rows}
        crossing.begin("dispatch", Record(1024, ()), Traffic.of(0, rows))

    begin(100)
    for num_rows in (1000, 600, 1000):
        with pytest.raises(RuntimeError, match="no room"):
            begin(num_rows)
    begin(100)


def check_no_room(backend: Any, _reference: Backend, case: Case, operation: str) -> str:
    """A node without room for one call; the others' next call goes on, or ends as it must."""
    rank = backend.rank
    routing = Routing(case.topk_idx(rank), case.num_experts)
    x = case.x(rank, torch.float32)
    received, handle = backend.dispatch(Rows(x), routing)
    arena, num_bytes = backend._inside._arena, 1 << 62
    if rank < 2:
        arena._max_bytes = 0
        arena.allocate_largest()  # nothing is left
    error = ""
    try:
        if operation == "dispatch":
            backend.dispatch_again(Rows(x), handle)
        else:
            backend.combine(Rows(received.x.clone()), handle)
    except RuntimeError as refused:
        error = str(refused)
    arena._max_bytes = num_bytes
    if operation == "dispatch":  # what was on its way is in no later call
        for _ in range(3):
            again = backend.dispatch_again(Rows(x), handle)
            assert torch.equal(again.x, received.x)
    return error


def test_a_node_without_room_raises_and_later_rows_are_their_own() -> None:
    nodes = Nodes("AABB")
    errors = nodes.run(check_no_room, CASES[4], "dispatch")
    assert ["max_bytes" in error for error in errors] == [True, True, False, False]
    no_report(nodes)


def test_a_node_that_has_not_summed_breaks_down() -> None:
    """The others wait for its sums in vain."""
    nodes = Nodes("AABB", timeout=0.02)
    backends: list[Any] = nodes.backends

    def call(backend: Any, reference: Backend) -> str:
        try:
            return check_no_room(backend, reference, CASES[4], "combine")
        except Exception as error:  # a trap stops the machine
            return str(error)

    errors = nodes.run(call)
    assert ["max_bytes" in error for error in errors] == [True, True, False, False]
    assert any("trap" in error for error in errors[2:])
    for backend in backends[:2]:
        with pytest.raises(RuntimeError, match="was not summed"):
            backend.fail("dispatch", "something")


def lossy(nodes: Nodes, rank: int, only: int | None = None) -> None:
    """Let the card of a rank lose what it is given; `only`: nothing but that put."""
    backend: Any = nodes.backends[rank]
    put, count = backend.network.put_signal, itertools.count()

    def lose(*arguments: int) -> None:
        if only is not None and next(count) != only:
            put(*arguments)

    backend.network.put_signal = lose


def test_who_sent_no_rows_is_named_where_that_has_ended_the_gpu() -> None:
    """The host is in the next meeting when a kernel of the call before traps."""
    nodes = Nodes("AB")
    backend: Any = nodes.backends[0]
    ended, late = RuntimeError("no answer of the GPU"), RuntimeError("got nothing from rank 1")
    rows, routing = Rows(torch.zeros(1, 16)), Routing(torch.zeros(1, 1).int(), 2)
    for part, name in ((backend._crossing, "check"), (backend._inside, "check_arrivals")):
        with (
            patch.object(backend._everyone, "meet", side_effect=ended),
            patch.object(backend._crossing, "check"),
            patch.object(part, name, side_effect=[None, late] if name == "check" else late),
            pytest.raises(RuntimeError, match="got nothing from rank 1"),
        ):
            backend.dispatch(rows, routing)


def check_lost(backend: Backend, _reference: Backend, case: Case) -> str:
    routing = Routing(case.topk_idx(backend.rank), case.num_experts)
    try:
        backend.dispatch(Rows(case.x(backend.rank, torch.bfloat16)), routing)
    except Exception as error:  # a trap stops the machine, and all of its ranks
        return str(error)
    return ""


@pytest.mark.parametrize("put", [None, 0, 1, 3])
def test_rows_that_do_not_come_end_the_kernels_that_would_read_them(put: int | None) -> None:
    """None at all, or not what is beside them, or not one chunk."""
    nodes = Nodes("AB", timeout=0.02)
    lossy(nodes, 0, put)
    errors = nodes.run(check_lost, CASES[2])
    assert "trap" in errors[1]
