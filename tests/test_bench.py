"""The benchmark: every row that was asked for, from implementations that give right answers."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from ep_megatron.bench import own, peers
from ep_megatron.bench.case import FP8_RECIPES, Case
from ep_megatron.bench.table import print_table
from ep_megatron.bench.two_hosts import HostsUnavailableError, two_hosts
from tests.ranks import run_on_ranks

CASE = Case(num_ranks=2, num_tokens=24, hidden=128, num_topk=3, num_experts=8)
FIELDS = {
    "implementation",
    "direction",
    "num_ranks",
    "num_tokens",
    "hidden",
    "num_topk",
    "num_experts",
    "payload_bytes",
    "num_samples",
    "median_ms",
    "min_ms",
    "max_ms",
    "link_bytes",
    "dispatch_bytes",
}


def check_sums(rank: int) -> None:
    """Gloo's packed rows and our own give the same sums: a token times its destinations."""
    num_rows = torch.zeros(CASE.num_tokens, 2, dtype=torch.bool)
    num_rows.scatter_(1, CASE.topk_idx(rank) // 4, True)
    for make, expand, error in (
        (peers.gloo, False, 2**-7),
        (own.exchange("shared_memory", False), False, 2**-7),
        (own.exchange("shared_memory", True), True, 2**-7),
        (own.exchange("shared_memory", False, FP8_RECIPES["mxfp8"]), False, 2**-3),
    ):
        result = make(CASE, rank)["forward"]()
        combined = result if isinstance(result, torch.Tensor) else result[0]
        counts = torch.full((CASE.num_tokens,), CASE.num_topk) if expand else num_rows.sum(1)
        expected = CASE.x(rank).float() * counts[:, None]
        torch.testing.assert_close(combined.float(), expected, rtol=error, atol=error**2)
    dist.barrier()


def check_payload(rank: int) -> None:
    total = torch.tensor(0)
    seen = CASE.topk_idx(rank) // 4
    total += sum(len(set(row.tolist())) for row in seen)
    dist.all_reduce(total)
    assert CASE.payload_bytes() == int(total) * CASE.hidden * 2
    assert CASE.payload_bytes(FP8_RECIPES["fp8"]) == int(total) * (CASE.hidden + 4)
    assert CASE.payload_bytes(FP8_RECIPES["mxfp8"]) == int(total) * (CASE.hidden + 4)


def test_implementations_give_the_same_sums() -> None:
    run_on_ranks(2, check_sums)


def test_payload_is_what_crosses_once_per_destination() -> None:
    run_on_ranks(2, check_payload)


def bench(
    folder: Path, names: str, num_tokens: str, samples: int, hidden: str = "64"
) -> tuple[Any, str]:
    """Run the command; return its JSON rows and what it printed."""
    command = [sys.executable, "-m", "ep_megatron.cli", "bench", "--num-ranks", "2"]
    command += ["--num-tokens", num_tokens, "--hidden", hidden, "--num-topk", "2"]
    command += ["--num-experts", "4", "--samples", str(samples), "--implementation", names]
    command += ["--json", str(folder / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text()), done.stdout


def test_bench_writes_a_row_for_everything(tmp_path: Path) -> None:
    names = "shared_memory,shared_memory_expand,process_group,gloo,limit"
    rows, printed = bench(tmp_path, names, "16,32", 3)
    assert all(set(row) == FIELDS for row in rows)
    found = {(r["implementation"], r["direction"], r["num_tokens"]) for r in rows}
    assert found == {
        (name, direction, num_tokens)
        for name in names.split(",")
        for direction in ("forward", "forward_backward")
        for num_tokens in (16, 32)
    }
    assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in rows)
    assert "shared_memory_expand" in printed


def check_packed_sums(rank: int) -> None:
    """Low-latency steps give the weighted sums of what the experts hand back: their rows."""
    x, weights = CASE.x(rank).float(), CASE.topk_weights(rank).sum(1, keepdim=True)
    for backend in ("shared_memory", "process_group"):
        out = own.packed_exchange(backend, False)(CASE, rank)["forward"]()
        torch.testing.assert_close(out.float(), x * weights, rtol=2**-7, atol=2**-14)
    assert not own.packed_exchange("shared_memory", True)(CASE, rank)["forward"]().any()


def test_low_latency_steps_give_weighted_sums() -> None:
    run_on_ranks(2, check_packed_sums)


def test_bench_of_low_latency_is_forward_only(tmp_path: Path) -> None:
    names = "shared_memory,low_latency,low_latency_fp8"
    rows, printed = bench(tmp_path, names, "8", 2, hidden="128")
    found = [(row["implementation"], row["direction"]) for row in rows]
    assert found == [(name, "forward") for name in names.split(",")] + [
        ("shared_memory", "forward_backward")
    ]
    sent = {row["implementation"]: row["dispatch_bytes"] for row in rows}
    assert sent["low_latency"] == 2 * 8 * 2 * 2 * 128  # ranks, tokens, top-k, bytes, hidden
    assert sent["low_latency_fp8"] == 2 * 8 * 2 * (128 + 4)
    assert "low_laten" in printed  # a narrow terminal cuts names


def test_bench_counts_what_crosses_a_link(tmp_path: Path) -> None:
    """Between two hosts of two ranks a token crosses once in place of up to twice."""
    try:
        with two_hosts("1gbit"):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "ep_megatron.cli", "bench", "--num-ranks", "4"]
    command += ["--num-tokens", "128", "--hidden", "1024", "--samples", "2", "--link", "1gbit"]
    command += ["--implementation", "hierarchical,gloo", "--direction", "forward"]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    sent = {row["implementation"]: row["link_bytes"] for row in rows}
    case = Case(num_ranks=4, num_tokens=128, hidden=1024, num_topk=8, num_experts=64)
    to_ranks = to_hosts = 0
    for rank in range(4):
        for experts in (case.topk_idx(rank) // 16).tolist():
            away = {r for r in experts if r // 2 != rank // 2}
            to_ranks += len(away)
            to_hosts += bool(away)
    row_bytes = 2 * 2 * case.hidden  # there and back
    assert to_hosts * row_bytes < sent["hierarchical"] < 1.3 * to_hosts * row_bytes
    assert to_ranks * row_bytes < sent["gloo"] < 1.3 * to_ranks * row_bytes
    assert "link" in done.stdout


@pytest.mark.megatron
def test_bench_runs_the_dispatchers(tmp_path: Path) -> None:
    names = "dispatcher,megatron_alltoall,megatron_allgather"
    rows, _ = bench(tmp_path, names, "16", 2)
    assert {row["implementation"] for row in rows} == set(names.split(","))


def test_unknown_names_are_refused() -> None:
    command = [sys.executable, "-m", "ep_megatron.cli", "bench", "--implementation", "nccl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "expected one of shared_memory" in done.stderr.replace("\n", " ")


def test_the_table_names_its_baseline() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    row = {**vars(CASE), "payload_bytes": 10**6, "direction": "forward"}
    times = {"min_ms": 1.0, "max_ms": 3.0}
    print_table(
        [
            {**row, **times, "implementation": "shared_memory", "median_ms": 2.0},
            {**row, **times, "implementation": "gloo", "median_ms": 20.0},
        ],
        "shared_memory",
        console,
    )
    text = console.export_text()
    assert "x shared_memory" in text
    assert "10.00" in text
