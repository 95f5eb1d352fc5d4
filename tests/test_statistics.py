"""What a Buffer counts: bytes exactly, and the slow rank by name on all ranks."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer
from ep_megatron.statistics import BufferStatistics, OperationStatistics, PeerStatistics
from tests.ranks import run_on_ranks
from tests.routing import Case, expected_rows
from tests.test_dispatch import send

CASE = Case("statistics", (40, 30, 20), hidden=64)
NUM_CALLS = 6
PAUSE = 0.3


def count(rank: int, backend: str) -> Any:
    buffer = Buffer(dist.group.WORLD, backend=backend)
    for expand in (True, False):
        for _ in range(NUM_CALLS // 2):
            dist.barrier()
            if rank == 1:
                time.sleep(PAUSE)
            recv_x, _, _, handle = send(buffer, CASE, rank, expand, torch.float32)
            buffer.combine(recv_x, handle)
    # A call that failed is not counted.
    with pytest.raises(ValueError, match="topk_idx"):
        buffer.dispatch(torch.ones(1, 64), topk_idx=torch.tensor([[99]]), num_experts=9)
    return buffer.statistics()


def test_bytes_are_exact_and_the_slow_rank_is_named_on_all_ranks() -> None:
    all_statistics = run_on_ranks(3, count, "shared_memory")
    for rank, statistics in enumerate(all_statistics):
        assert statistics.rank == rank
        dispatch, combine = (statistics.operations[name] for name in ("dispatch", "combine"))
        assert dispatch.num_calls == combine.num_calls == NUM_CALLS
        assert statistics.operations["cached dispatch"].num_calls == 0
        for peer in range(3):
            rows = {
                expand: sum(
                    row is not None and row[0] == rank
                    for row in expected_rows(CASE, peer, expand).rows
                )
                for expand in (True, False)
            }
            # A row of 64 float32 and its weight; by rank it has 3 weights and 3 expert ids.
            moved = rows[True] * (256 + 4) + rows[False] * (256 + 3 * (4 + 8))
            assert dispatch.peers[peer].num_bytes == NUM_CALLS // 2 * moved
            assert combine.peers[peer].num_bytes == NUM_CALLS // 2 * 256 * sum(rows.values())
        assert sum(peer.num_last for peer in dispatch.peers) == NUM_CALLS
        assert dispatch.peers[rank].seconds_waited == 0
        assert dispatch.seconds_waiting >= max(p.seconds_waited for p in dispatch.peers) - 1e-6
        # Most calls: another rank may be held up by the machine now and then.
        assert dispatch.peers[1].num_last > NUM_CALLS / 2
        assert dispatch.peers[1].seconds_behind > NUM_CALLS / 2 * PAUSE / 2
        if rank != 1:
            assert dispatch.peers[1].seconds_waited > NUM_CALLS / 2 * PAUSE / 2
        assert statistics.slow_ranks()[0].startswith("rank 1 came last to ")
        shared = [(p.num_last, p.seconds_behind) for p in dispatch.peers]
        first = all_statistics[0].operations["dispatch"].peers
        assert shared == [(p.num_last, p.seconds_behind) for p in first]


def test_a_backend_that_does_not_count_says_so() -> None:
    assert run_on_ranks(2, refuse) == [None, None]


def refuse(rank: int) -> None:
    buffer = Buffer(dist.group.WORLD, backend="process_group")
    with pytest.raises(NotImplementedError, match="statistics: expected a backend that counts"):
        buffer.statistics()


def test_sentences() -> None:
    even = PeerStatistics(num_last=25, seconds_behind=0.025, seconds_waited=0, num_bytes=0)
    calls = OperationStatistics(100, 0, 0, (even,) * 4)
    assert BufferStatistics(0, {"dispatch": calls}).slow_ranks() == []
    late = replace(even, num_last=83, seconds_behind=83 * 0.012)
    rest = tuple(replace(even, num_last=n) for n in (6, 6, 5))
    calls = replace(calls, peers=(*rest, late))
    assert BufferStatistics(0, {"dispatch": calls}).slow_ranks() == [
        "rank 3 came last to 83% of 100 calls of dispatch, 12 ms after the median rank"
    ]
    none = replace(calls, num_calls=0, peers=(replace(even, num_last=0),) * 4)
    assert BufferStatistics(0, {"combine": none}).slow_ranks() == []
