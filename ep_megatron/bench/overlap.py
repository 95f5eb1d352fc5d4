"""What queued calls hide: behind a rank that is late, and behind a slow link between two hosts.

    in turn      dispatch, combine, then the computation
    overlapped   dispatch and combine are queued, the computation runs, then the event is waited for

Communication and computation are made equally long, so that nothing but overlap can bring more than
a few per cent, and no more than a factor of two is there to be had. The computation is a fixed
number of matrix products on one thread; what it does is not slowed down or shortened in either
mode.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ep_megatron.bench.two_hosts import run_ranks, two_hosts
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.streams import EventOverlap
from ep_megatron.train.launch import run_processes

LATE = "a late rank"
_NUM_EXPERTS, _NUM_TOPK, _HIDDEN = 16, 4, 512
_SECONDS = 900


@dataclass(frozen=True)
class Row:
    """One scenario; times in milliseconds, medians over samples, of the slower rank that computes.

    Attributes:
        scenario: `LATE`, or the rate of the link.
        backend: how rows travel.
        communication: dispatch and combine alone.
        computation: alone.
        in_turn: one after the other.
        overlapped: at once.
        megabytes: of rows that one rank sends in a dispatch; 0 for a late rank, whose rows are few.
    """

    scenario: str
    backend: str
    communication: float
    computation: float
    in_turn: float
    overlapped: float
    megabytes: float

    @property
    def ratio(self) -> float:
        """How much longer it takes in turn."""
        return self.in_turn / self.overlapped


class Work:
    """Matrix products on this thread; the number is chosen once for a time."""

    def __init__(self, seconds: float) -> None:
        self._a, self._number = torch.randn(192, 192), 8
        self()  # what the first product sets up is not part of the time
        while (taken := min(self._time() for _ in range(3))) < 0.03:
            self._number *= 2
        self._number = max(1, round(self._number * seconds / taken))

    def __call__(self) -> None:
        """Compute."""
        for _ in range(self._number):
            torch.mm(self._a, self._a)

    def _time(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


class Exchange:
    """One dispatch along a handle and the combine of its rows, both queued or both not."""

    def __init__(self, backend: str, num_tokens: int) -> None:
        assert dist.group.WORLD is not None
        config = BufferConfig(backend=backend, timeout=120)
        self.buffer = Buffer(dist.group.WORLD, config=config)
        rng = torch.Generator().manual_seed(dist.get_rank())
        self.x = torch.randn(num_tokens, _HIDDEN, generator=rng).bfloat16()
        scores = torch.rand(num_tokens, _NUM_EXPERTS, generator=rng)
        idx = scores.topk(_NUM_TOPK).indices
        self.handle = self.buffer.dispatch(self.x, topk_idx=idx, num_experts=_NUM_EXPERTS)[4]
        sent = (
            sum(self.handle.num_tokens_per_rank) - self.handle.num_tokens_per_rank[dist.get_rank()]
        )
        self.megabytes = 2 * _HIDDEN * sent / 1e6

    def __call__(self, is_queued: bool) -> tuple[Tensor, EventOverlap]:
        """Return the sums, and the event they are complete behind."""
        rows, *_, event = self.buffer.dispatch(self.x, self.handle, async_finish=is_queued)
        assert isinstance(rows, Tensor)
        out, _, event = self.buffer.combine(
            rows, self.handle, previous_event=event, async_finish=is_queued
        )
        return out, event


def measure(
    scenario: str, backend: str, seconds: float, num_tokens: int, num_samples: int
) -> Row | None:
    """Measure one scenario; collective. Returns the row on rank 0.

    Args:
        scenario: `LATE`: rank 1 comes `seconds` late to every exchange, and only rank 0 computes.
            Else all ranks compute, as long as an exchange takes.
        backend: of the Buffer.
        seconds: how late.
        num_tokens: per rank.
        num_samples: of each mode, in turn.
    """
    exchange, is_late = Exchange(backend, num_tokens), scenario == LATE
    computes = not is_late or dist.get_rank() == 0
    expected, _ = exchange(False)

    def communicate(is_queued: bool) -> EventOverlap:
        if is_late and not computes:
            time.sleep(seconds)
        out, event = exchange(is_queued)
        results.append(out)
        return event

    def in_turn() -> None:
        communicate(False)
        if computes:
            work()

    def overlapped() -> None:
        event = communicate(True)
        if computes:
            work()
        event.current_stream_wait()

    results: list[Tensor] = []
    alone = [_timed(lambda: communicate(False)) for _ in range(3)]
    work = Work(_agreed(statistics.median(alone)))
    times: dict[str, list[float]] = {}
    for _ in range(num_samples):
        modes: dict[str, Callable[[], object]] = {
            "communication": lambda: communicate(False),
            "computation": lambda: work() if computes else None,
            "in_turn": in_turn,
            "overlapped": overlapped,
        }
        for name, mode in modes.items():
            times.setdefault(name, []).append(_timed(mode, computes))
            while results:
                if not torch.equal(results.pop(), expected):
                    raise RuntimeError(f"bench-overlap: expected the same sums, {name} gave others")
    exchange.buffer.destroy()
    if dist.get_rank():
        return None
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return Row(scenario, backend, megabytes=0 if is_late else exchange.megabytes, **medians)


def _timed(mode: Callable[[], object], counts: bool = True) -> float:
    """Return the seconds of `mode` on the slowest rank that counts. Collective."""
    dist.barrier()
    start = time.perf_counter()
    mode()
    return _agreed(time.perf_counter() - start if counts else 0.0)


def _agreed(seconds: float) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def run(links: Sequence[str], late_ms: float, num_tokens: int, num_samples: int) -> list[Row]:
    """Measure a late rank on this host, then each link between two hosts that are made for it.

    Raises:
        RuntimeError: a rank failed, or the hosts cannot be made (`HostsUnavailableError`).
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ep_overlap_") as folder:
        output = Path(folder, "rows.json")
        job: dict[str, Any] = {
            "output": str(output),
            "samples": num_samples,
            "seconds": late_ms / 1e3,
        }
        for scenario in ([LATE] if late_ms else []) + list(links):
            is_late = scenario == LATE
            job["scenario"], job["num_tokens"] = scenario, 16 if is_late else num_tokens
            job["backends"] = ["shared_memory"] if is_late else ["process_group", "hierarchical"]
            path = Path(folder, "job.json")
            path.write_text(json.dumps(job))
            arguments = ["-m", "ep_megatron.bench.overlap", str(path)]
            if is_late:
                run_processes(2, arguments)
            else:
                with two_hosts(scenario) as hosts:
                    run_ranks(hosts, (1, 1), arguments, {}, _SECONDS)
            rows += [Row(**row) for row in json.loads(output.read_text())]
    return rows


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a line per scenario; `gain` is the time in turn over the time at once."""
    names = ("exchange", "compute", "in turn", "at once")
    table = Table("scenario", "backend", "MB", *(f"{name} ms" for name in names), "gain")
    for row in rows:
        times = (row.communication, row.computation, row.in_turn, row.overlapped)
        table.add_row(
            row.scenario,
            row.backend,
            f"{row.megabytes:.1f}",
            *(f"{value:.0f}" for value in times),
            f"{row.ratio:.2f}",
        )
    console.print(table)


def _work(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # torchrun's variables, or those that a host of two sets.
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    found = [
        measure(job["scenario"], backend, job["seconds"], job["num_tokens"], job["samples"])
        for backend in job["backends"]
    ]
    if dist.get_rank() == 0:
        rows = [asdict(row) for row in found if row is not None]
        Path(job["output"]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _work(json.loads(Path(sys.argv[1]).read_text()))
