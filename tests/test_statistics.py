"""What a Buffer counts: bytes exactly, and the slow rank by name on all ranks."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from ep_megatron import Buffer, BufferConfig
from ep_megatron.cli import app
from ep_megatron.live import SECONDS_BETWEEN, live_report, read_folder
from ep_megatron.statistics import (
    BufferStatistics,
    OperationStatistics,
    PeerStatistics,
    expert_loads,
    load_sentences,
    wait_table,
)
from tests.packed_cases import PackedCase
from tests.ranks import run_on_ranks
from tests.routing import Case, expected_rows
from tests.test_dispatch import send

CASE = Case("statistics", (40, 30, 20), hidden=64)
PACKED = PackedCase((6, 7, 8))
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


def count_over_gloo(rank: int, backend: str) -> Any:
    config = BufferConfig(backend=backend, timeout=60, host_id=f"host {rank % 2}")
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True, config=config)
    for _ in range(NUM_CALLS):
        dist.barrier()
        if rank == 1:
            time.sleep(PAUSE)
        recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
        buffer.dispatch(CASE.x(rank, torch.float32), handle=handle)
        buffer.combine(recv_x, handle)
    for number in range(NUM_CALLS):
        dist.barrier()
        if rank == 1:
            time.sleep(PAUSE)
        idx = PACKED.topk_idx(rank, number)
        recv, _, packed, _, _ = buffer.low_latency_dispatch(
            PACKED.x(rank, number), idx, PACKED.capacity, PACKED.num_experts, use_fp8=False
        )
        assert isinstance(recv, torch.Tensor)
        buffer.low_latency_combine(recv, idx, PACKED.weights(rank, number), packed)
    return buffer.statistics()


@pytest.mark.parametrize("backend", ["process_group", "hierarchical"])
def test_other_backends_and_low_latency_calls_count_too(backend: str) -> None:
    all_statistics = run_on_ranks(3, count_over_gloo, backend)
    for rank, statistics in enumerate(all_statistics):
        for name in ("dispatch", "cached dispatch", "combine"):
            calls = statistics.operations[name]
            assert calls.num_calls == NUM_CALLS
            for peer in range(3):
                tokens = sum(
                    any(e // CASE.experts_per_rank == peer for e in token if e >= 0)
                    for token in CASE.topk_idx(rank).tolist()
                )
                # Plain rows of 64 float32; over a process group ids and weights, 3 of each, too.
                if backend == "process_group":
                    beside = 3 * (8 + 4) if name == "dispatch" else 0
                    assert calls.peers[peer].num_bytes == NUM_CALLS * tokens * (256 + beside)
                elif peer % 2 == rank % 2:
                    assert calls.peers[peer].num_bytes == 0
        packed = statistics.operations["low_latency_dispatch"]
        assert packed.num_calls == NUM_CALLS
        sent = sum(
            int((PACKED.topk_idx(rank, n) // PACKED.experts_per_rank == 2).sum())
            for n in range(NUM_CALLS)
        )
        assert packed.peers[2].num_bytes == sent * 2 * PACKED.hidden
        dispatch = statistics.operations["dispatch"]
        assert dispatch.peers[1].num_last > NUM_CALLS / 2
        if rank != 1:
            for calls in (dispatch, packed):
                assert calls.peers[1].seconds_waited > NUM_CALLS / 2 * PAUSE / 2
        assert any(s.startswith("rank 1 came last to ") for s in statistics.slow_ranks())
        first = all_statistics[0].operations["dispatch"].peers
        assert [p.num_last for p in dispatch.peers] == [p.num_last for p in first]
        assert sum(statistics.expert_rows[CASE.num_experts]) == NUM_CALLS * sum(
            row is not None for row in expected_rows(CASE, rank, True).rows
        )
        assert BufferStatistics.from_json(statistics.to_json()) == statistics
    loads = expert_loads(all_statistics)[CASE.num_experts]
    used = torch.cat([CASE.topk_idx(rank).flatten() for rank in range(3)])
    expected = torch.bincount(used[used >= 0], minlength=CASE.num_experts) * NUM_CALLS
    assert loads == expected.tolist()
    assert f"expert {loads.index(max(loads))} of 9 got " in load_sentences(all_statistics)[0]
    table = wait_table(all_statistics, "dispatch")
    assert len(table.splitlines()) == 5
    waited = [float(line.split()[2]) for line in table.splitlines()[2:]]  # for rank 1
    assert waited[1] == 0
    assert min(waited[0], waited[2]) > 1e3 * PAUSE / 4


def test_a_backend_that_does_not_count_says_so() -> None:
    buffer = Buffer.__new__(Buffer)
    buffer._backend = cast(Any, SimpleNamespace(name="cuda"))
    with pytest.raises(NotImplementedError, match="expected a backend that counts, got cuda"):
        buffer.statistics()


def write_files(rank: int, folder: str) -> None:
    config = BufferConfig(backend="shared_memory", timeout=60, statistics_dir=folder)
    buffer = Buffer(dist.group.WORLD, config=config)
    for _ in range(2):
        recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
        time.sleep(SECONDS_BETWEEN + 0.1)
    buffer.combine(recv_x, handle)


def test_running_ranks_are_read_from_files(tmp_path: Path) -> None:
    run_on_ranks(3, write_files, str(tmp_path / "live"))
    found, unreadable = read_folder(tmp_path / "live")
    assert not unreadable
    assert [rank.statistics.rank for rank in found] == [0, 1, 2]
    assert all(rank.is_alive and rank.num_ranks == 3 for rank in found)
    assert all(rank.statistics.operations["combine"].num_calls == 1 for rank in found)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "live").iterdir()} == {0o600}
    (tmp_path / "live/0.json").write_text('{"format": 9}')
    (tmp_path / "live/1.json").write_text("[1, 2")
    report = live_report(tmp_path / "live")
    assert "rank 2 of 3 (shared_memory, process " in report
    assert "2 dispatch, 1 combine" in report
    assert "dispatch: mean milliseconds that a rank (row) waited for a rank (column)" in report
    assert "0.json: ValueError: format 9" in report
    assert "1.json: JSONDecodeError" in report
    assert live_report(tmp_path / "none") == f"no statistics in {tmp_path / 'none'}"
    result = CliRunner().invoke(app, ["doctor", "--live", str(tmp_path / "live")])
    assert result.exit_code == 0
    assert "rank 0 of 3" in result.stdout


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
