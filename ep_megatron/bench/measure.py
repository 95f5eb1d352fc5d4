"""One process of the benchmark: every implementation in turn, sample after sample.

A sample is the wall time of one step (or of some in a row, per step) from the first rank's start to
the last rank's end. Memory is faulted in and lazily built things exist. With one step per sample
the caches hold what the implementation before has left there, as they hold what the experts' matrix
products have left there in training; with several, what the same step has left. Samples of all
implementations take turns, so that a ratio compares neighbours in time on a machine whose speed
drifts.
"""

import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ep_megatron.bench import megatron_layer, own, peers
from ep_megatron.bench.case import FP8_RECIPES, Case, Maker, Result, Step
from ep_megatron.bench.two_hosts import LinkMeter

logger = logging.getLogger(__name__)

_MAKERS: dict[str, Maker] = {
    "shared_memory": own.exchange("shared_memory", expand=False),
    "shared_memory_expand": own.exchange("shared_memory", expand=True),
    **{
        f"shared_memory_{name}": own.exchange("shared_memory", expand=False, fp8=recipe)
        for name, recipe in FP8_RECIPES.items()
    },
    "dispatcher": megatron_layer.layer("deepep"),
    "process_group": own.exchange("process_group", expand=False),
    "low_latency": own.packed_exchange("shared_memory"),
    "low_latency_fp8": own.packed_exchange("shared_memory", use_fp8=True),
    "low_latency_logfmt": own.packed_exchange("shared_memory", use_logfmt=True),
    "low_latency_process_group": own.packed_exchange("process_group"),
    "hierarchical": own.exchange("hierarchical", expand=False),
    **{
        f"hierarchical_{name}": own.exchange("hierarchical", expand=False, fp8=recipe)
        for name, recipe in FP8_RECIPES.items()
    },
    "gloo": peers.gloo,
    "mpi": peers.mpi,
    "megatron_alltoall": megatron_layer.layer("alltoall"),
    "megatron_allgather": megatron_layer.layer("allgather"),
    "limit_memcpy": lambda case, rank: peers.copies(case, rank, is_streaming=False),
    "limit_streaming": lambda case, rank: peers.copies(case, rank, is_streaming=True),
}
LIMIT = "limit"  # the faster of the two kinds of copy
# What can run on two hosts; the first three are for nothing else.
HIERARCHICAL = ("hierarchical", "hierarchical_fp8", "hierarchical_mxfp8")
LINK_IMPLEMENTATIONS = (*HIERARCHICAL, "process_group", "gloo", "mpi")
IMPLEMENTATIONS = (
    *(name for name in _MAKERS if not name.startswith(LIMIT) and name not in HIERARCHICAL),
    LIMIT,
)
# Forward only, for few tokens: memory is experts times tokens. Not measured unless asked for.
PACKED_IMPLEMENTATIONS = tuple(name for name in _MAKERS if name.startswith("low_latency"))
_NUM_WARM_UPS = 3


def measure(
    cases: Sequence[Case],
    implementations: Sequence[str],
    directions: Sequence[str],
    num_samples: int,
    num_steps: int,
    output: Path,
    meter: LinkMeter | None = None,
) -> None:
    """Measure and let rank 0 write a JSON list of results to `output`. Collective.

    With `meter` the ranks are on two hosts, and what they send is counted.
    """
    torch.set_num_threads(1)
    rank = dist.get_rank()
    results = []
    for case in cases:
        for result in _measure_case(
            case, implementations, directions, num_samples, num_steps, meter
        ):
            results.append(result)
            if rank == 0:
                output.write_text(json.dumps([r.as_dict() for r in results]))


def _measure_case(
    case: Case,
    implementations: Sequence[str],
    directions: Sequence[str],
    num_samples: int,
    num_steps: int,
    meter: LinkMeter | None,
) -> Iterator[Result]:
    chosen = [n for n in implementations if n != LIMIT]
    if LIMIT in implementations:
        chosen += [n for n in _MAKERS if n.startswith(LIMIT)]
    steps = {name: _MAKERS[name](case, dist.get_rank()) for name in chosen}
    payload_bytes = case.payload_bytes()
    barrier = _Barrier(is_one_host=meter is None)
    for direction in directions:
        names = [name for name in chosen if direction in steps[name]]
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(_NUM_WARM_UPS):
            for name in names:
                barrier.sample(steps[name][direction], 1)
        for _ in range(num_samples):
            for name in names:
                samples[name].append(barrier.sample(steps[name][direction], num_steps))
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
                dispatch_bytes=_dispatch_bytes(case, name),
                num_samples=num_samples,
                median_ms=statistics.median(milliseconds),
                min_ms=min(milliseconds),
                max_ms=max(milliseconds),
                link_bytes=0 if meter is None else meter.count(steps[name][direction]),
            )


def _dispatch_bytes(case: Case, name: str) -> int:
    recipe = FP8_RECIPES.get(name.rpartition("_")[2])
    is_packed = name in PACKED_IMPLEMENTATIONS
    return case.packed_bytes(recipe) if is_packed else case.payload_bytes(recipe)


class _Barrier:
    """Lets all ranks start together, closer than torch.distributed's barriers do.

    Combining no rows over shared memory is a meeting of all ranks and nothing else.
    """

    def __init__(self, is_one_host: bool) -> None:
        self._handle = None
        if not is_one_host:
            return
        self._buffer = own.buffer_of("shared_memory")
        self._rows = torch.empty(0, 16)
        routing = torch.empty(0, 1, dtype=torch.int64)
        self._handle = self._buffer.dispatch(
            self._rows, topk_idx=routing, num_experts=self._buffer.group_size
        )[4]

    def sample(self, step: Step, num_steps: int) -> float:
        """Return the seconds that a step takes on all ranks together."""
        dist.barrier()  # for who is far behind, asleep
        if self._handle is not None:
            self._buffer.combine(self._rows, self._handle)
        start = time.monotonic_ns()  # one clock for all processes of a host
        for _ in range(num_steps):
            step()
        end = time.monotonic_ns()
        times = torch.tensor([-start, end])
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return float(times.sum()) / 1e9 / num_steps
