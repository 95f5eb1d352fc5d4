"""Faults of ranks on two hosts: named on both, in time. Rank 0 is on one host, 1 and 2 on another.

Rank 0's gateway is rank 1.
"""

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.backends import host_counts
from ep_megatron.backends.hierarchical import HierarchicalBackend
from ep_megatron.backends.host_plan import HostPlan
from ep_megatron.config import MIB
from tests.mortal_ranks import CASE, TIMEOUT, Ranks
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import send
from tests.test_faults import (
    be_interrupted,
    come_late,
    die,
    never_come,
    raise_between,
    start_again,
    use_after,
    use_in_fork,
)

BACKEND = "hierarchical"


def inside(buffer: Buffer) -> Any:
    assert isinstance(buffer._backend, HierarchicalBackend)
    return buffer._backend._inside


def die_before_the_sums(rank: int, buffer: Buffer, victim: int) -> None:
    """All have agreed on a combine; the victim ends before it takes part in its host's sums."""
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    if rank == victim:
        inside(buffer).combine = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    buffer.combine(recv_x, handle)


def first_dies_before_the_sums(rank: int, buffer: Buffer) -> None:
    die_before_the_sums(rank, buffer, 1)


def last_dies_before_the_sums(rank: int, buffer: Buffer) -> None:
    die_before_the_sums(rank, buffer, 2)


def die_before_the_rows(rank: int, buffer: Buffer) -> None:
    """All have agreed on a dispatch; rank 0, alone on its host, ends before it sends a row."""
    assert isinstance(buffer._backend, HierarchicalBackend)
    if rank == 0:
        buffer._backend._cross = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    send(buffer, CASE, rank, True, torch.float32)


def stop_before_the_rows(rank: int, buffer: Buffer) -> None:
    """As above, but rank 0 sleeps; what it finds later is an error too."""
    assert isinstance(buffer._backend, HierarchicalBackend)
    if rank == 0:
        cross = buffer._backend._cross

        def late(*arguments: Any) -> Any:
            time.sleep(2 * TIMEOUT + 3)
            return cross(*arguments)

        buffer._backend._cross = late  # type: ignore
    send(buffer, CASE, rank, True, torch.float32)


def die_before_the_answers(rank: int, buffer: Buffer) -> None:
    """In a large group, rank 0 ends between what it tells and what it answers."""

    def answer(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    host_counts.MANY_COUNTS = 0  # type: ignore[attr-defined]  # the process is this test's own
    if rank == 0:
        HostPlan.answer = answer  # type: ignore
    send(buffer, CASE, rank, True, torch.float32)


def test_a_killed_rank_is_named() -> None:
    with Ranks(BACKEND, die) as ranks:
        ranks.go()
        ranks.others_name(1, within=TIMEOUT, says="got no answer from rank 1 (")


@pytest.mark.parametrize(
    ("role", "victim"),
    [
        (first_dies_before_the_sums, 1),
        (last_dies_before_the_sums, 2),
        (die_before_the_rows, 0),
        (die_before_the_answers, 0),
    ],
)
def test_a_rank_killed_between_hops_is_named_on_both_hosts(role: Any, victim: int) -> None:
    with Ranks(BACKEND, role) as ranks:
        ranks.go()
        ranks.others_name(victim, within=TIMEOUT + 2)


def test_a_rank_that_stops_between_hops_is_named_by_those_who_wait_for_it() -> None:
    with Ranks(BACKEND, stop_before_the_rows) as ranks:
        ranks.go()
        ranks.others_name(0, within=TIMEOUT + 4)
        assert ranks.answer(0)[0] == "RuntimeError"


def test_a_rank_that_never_comes_is_named_at_the_deadline() -> None:
    with Ranks(BACKEND, never_come) as ranks:
        ranks.go()
        for rank in (0, 2):
            kind, message, seconds = ranks.answer(rank)
            assert kind == "RuntimeError"
            assert "rank 1" in message
            assert TIMEOUT - 0.5 < seconds < TIMEOUT + 2
        assert ranks.answer(1)[0] == "RuntimeError"


@pytest.mark.parametrize("role", [come_late, use_in_fork, start_again])
def test_what_is_no_fault_or_can_be_mended_goes_on(role: Any) -> None:
    with Ranks(BACKEND, role) as ranks:
        ranks.go()
        for rank in range(3):
            kind, message, _ = ranks.answer(rank)
            assert kind == "returned", message


def test_a_rank_that_leaves_is_named() -> None:
    with Ranks(BACKEND, raise_between) as ranks:
        ranks.go()
        assert ranks.answer(1)[0] == "KeyError"
        ranks.others_name(1)


def test_a_wait_hears_ctrl_c() -> None:
    with Ranks(BACKEND, be_interrupted) as ranks:
        ranks.go()
        time.sleep(0.5)
        os.kill(ranks.pid(0), signal.SIGINT)
        kind, _, seconds = ranks.answer(0)
        assert kind == "KeyboardInterrupt"
        assert seconds < 1.5
        for rank in (1, 2):
            kind, message, _ = ranks.answer(rank)
            assert kind in ("RuntimeError", "returned"), message


def test_a_broken_buffer_says_so() -> None:
    with Ranks(BACKEND, use_after) as ranks:
        ranks.go()
        for rank in (0, 2):
            assert ranks.answer(rank)[:2] == ("returned", "said so")


def check_memory_is_short(rank: int) -> None:
    """Sums that find no room on one host raise on every rank, and the Buffer goes on."""
    assert dist.group.WORLD is not None
    config = BufferConfig(
        backend=BACKEND,
        timeout=30,
        initial_bytes=0,
        max_bytes=64 * MIB if rank == 0 else 4 * MIB,
        host_id="A" if rank == 0 else "B",
    )
    buffer = Buffer(dist.group.WORLD, config=config)
    case = Case("small", (200, 150, 150), hidden=1024, experts_per_rank=2)
    for _ in range(2):
        recv_x, _, _, handle = send(buffer, case, rank, False, torch.float32)
        assert len(recv_x) == handle.num_recv_rows
        rows = torch.zeros(handle.num_recv_rows, 1024, dtype=torch.float64)
        with pytest.raises(
            RuntimeError, match=r"combine: expected room for all rows, got rank [12]"
        ):
            buffer.combine(rows, handle)
        del recv_x, handle
    small = Case("tiny", (9, 8, 7))
    recv_x, _, _, handle = send(buffer, small, rank, True, torch.float32)
    used = (small.topk_idx(rank) >= 0).sum(1, keepdim=True)
    combined = buffer.combine(recv_x, handle)[0]
    torch.testing.assert_close(combined, small.x(rank, torch.float32) * used)


def test_memory_that_does_not_suffice_is_an_error_on_every_rank() -> None:
    run_on_ranks(3, check_memory_is_short)
