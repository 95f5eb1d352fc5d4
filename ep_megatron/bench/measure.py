"""One process of the benchmark: every implementation in turn, sample after sample.

A sample is the wall time from the first rank's start to the last rank's end, divided by the steps
in it; so many steps that starting together does not matter. Samples of all implementations take
turns, so that a ratio compares neighbours in time on a machine whose speed drifts.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_megatron.bench import megatron_layer, own, peers
from ep_megatron.bench.case import Case, Result, Step

logger = logging.getLogger(__name__)

Maker = Callable[[Case, int], dict[str, Step]]
_MAKERS: dict[str, Any] = {
    "shared_memory": own.exchange("shared_memory", expand=False),
    "shared_memory_expand": own.exchange("shared_memory", expand=True),
    "dispatcher": megatron_layer.layer("deepep"),
    "process_group": own.exchange("process_group", expand=False),
    "gloo": peers.gloo,
    "mpi": peers.mpi,
    "megatron_alltoall": megatron_layer.layer("alltoall"),
    "megatron_allgather": megatron_layer.layer("allgather"),
    "limit_memcpy": lambda case, rank: peers.copies(case, rank, is_streaming=False),
    "limit_streaming": lambda case, rank: peers.copies(case, rank, is_streaming=True),
}
LIMIT = "limit"  # the faster of the two kinds of copy
IMPLEMENTATIONS = (*(name for name in _MAKERS if not name.startswith(LIMIT)), LIMIT)
_SECONDS_PER_SAMPLE = 0.02
_MAX_STEPS = 50


def measure(
    cases: Sequence[Case],
    implementations: Sequence[str],
    directions: Sequence[str],
    num_samples: int,
    output: Path,
) -> None:
    """Measure and let rank 0 write a JSON list of results to `output`. Collective."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    results = []
    for case in cases:
        for result in _measure_case(case, rank, implementations, directions, num_samples):
            results.append(result)
            if rank == 0:
                output.write_text(json.dumps([r.as_dict() for r in results]))


def _measure_case(
    case: Case,
    rank: int,
    implementations: Sequence[str],
    directions: Sequence[str],
    num_samples: int,
) -> Iterator[Result]:
    names = [n for n in implementations if n != LIMIT]
    if LIMIT in implementations:
        names += [n for n in _MAKERS if n.startswith(LIMIT)]
    steps = {name: _MAKERS[name](case, rank) for name in names}
    payload_bytes = case.payload_bytes()
    for direction in directions:
        counts: dict[str, int] = {}
        samples: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            step = steps[name][direction]
            _sample(step, 2)  # faults memory in, builds what is built lazily
            counts[name] = _num_steps(_sample(step, 1))
        for _ in range(num_samples):
            for name in names:
                samples[name].append(_sample(steps[name][direction], counts[name]))
        if LIMIT in implementations:
            kinds = [samples.pop(n) for n in names if n.startswith(LIMIT)]
            samples[LIMIT] = min(kinds, key=statistics.median)
        for name, times in samples.items():
            milliseconds = [1e3 * seconds for seconds in times]
            yield Result(
                implementation=name,
                direction=direction,
                num_ranks=case.num_ranks,
                num_tokens=case.num_tokens,
                hidden=case.hidden,
                num_topk=case.num_topk,
                num_experts=case.num_experts,
                payload_bytes=payload_bytes,
                num_samples=num_samples,
                median_ms=statistics.median(milliseconds),
                min_ms=min(milliseconds),
                max_ms=max(milliseconds),
            )


def _sample(step: Step, count: int) -> float:
    """Return seconds per step on all ranks together."""
    dist.barrier()
    start = time.monotonic_ns()  # one clock for all processes of a host
    for _ in range(count):
        step()
    end = time.monotonic_ns()
    times = torch.tensor([-start, end])
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return float(times.sum()) / 1e9 / count


def _num_steps(seconds: float) -> int:
    """Return how many steps fill a sample, the same on all ranks."""
    return max(1, min(_MAX_STEPS, int(_SECONDS_PER_SAMPLE / seconds)))
