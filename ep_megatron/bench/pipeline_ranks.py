"""What one rank of `bench-pipeline` does: the same step in every mode, in turn, each recorded.

Every compute node is padded by sleep to a stated time, so that what is measured is whether
communication runs beside computation, not how fast this machine computes. Values are real:
gradients of all modes are compared in bits.
"""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_megatron.bench.pipeline_model import (
    EXPERT_RANKS,
    Sizes,
    batches,
    build_chunks,
    forward_step,
    gradients,
    num_virtual_stages,
)
from ep_megatron.pipeline.forward_backward import ForwardBackward, get_forward_backward_func
from ep_megatron.pipeline.observer import Recorder, Watch
from ep_megatron.pipeline.trace import Timeline, write_trace

# Mode -> overlap, weights_hide of `get_forward_backward_func`.
MODES = {"blocking": (False, False), "lone": (False, True), "overlap": (True, True)}
_WAIT = 120.0  # seconds for the other rank


class PaddedRecorder(Recorder):
    """A recorder whose compute nodes take at least `seconds`, by sleeping."""

    def __init__(self, rank: int, seconds: float) -> None:
        super().__init__(rank)
        self.seconds = seconds

    def of(self, chunk: int, microbatch: int) -> "_PaddedWatch":
        """Return the observer of one pass."""
        return _PaddedWatch(self, chunk, microbatch, self.seconds)


class _PaddedWatch(Watch):
    def __init__(
        self, recorder: PaddedRecorder, chunk: int, microbatch: int, seconds: float
    ) -> None:
        super().__init__(recorder, chunk, microbatch)
        self._seconds = seconds

    @contextlib.contextmanager
    def compute(self, name: str, layer: int | None, way: str) -> Iterator[None]:
        with super().compute(name, layer, way):
            start = time.perf_counter()
            yield
            time.sleep(max(0.0, start + self._seconds - time.perf_counter()))


def measure(job: dict[str, Any]) -> None:
    """Run the job's schedules; write one trace per schedule, mode and step. Collective."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ep_megatron.megatron import host, plugin

    plugin.install(backend="process_group")
    with host.without_cuda(), torch.compiler.set_stance("force_eager"):
        stages = job["pipeline_parallel"]
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=num_virtual_stages(stages),
            expert_model_parallel_size=EXPERT_RANKS,
        )
        for schedule in job["schedules"]:
            model_parallel_cuda_manual_seed(1)
            _measure(schedule, job)
        parallel_state.destroy_model_parallel()


def _measure(schedule: str, job: dict[str, Any]) -> None:
    sizes, rank = Sizes(**job["sizes"]), dist.get_rank()
    chunks = build_chunks(schedule, sizes, job["pipeline_parallel"])
    seconds = job["compute_ms"] / 1e3
    functions = {
        mode: get_forward_backward_func(schedule, overlap, timeout=_WAIT, weights_hide=hide)
        for mode, (overlap, hide) in MODES.items()
        if mode in job["modes"]
    }
    first = None
    for step in range(-1, job["num_steps"]):  # the first one warms up, and is not padded
        for mode, function in functions.items():
            padding = 0.0 if step < 0 else seconds
            timeline = _run(function, chunks, sizes, job["num_microbatches"], padding)
            found = gradients(chunks)
            first = first or found
            wrong = [name for name in first if not torch.equal(first[name], found[name])]
            if wrong or len(first) != len(found):
                raise RuntimeError(
                    f"bench-pipeline: expected gradients of {schedule}, {mode}, to be those of "
                    f"{next(iter(functions))}, bit for bit, got others for {wrong[:3]}"
                )
            if step >= 0:
                write_trace(timeline, trace_file(Path(job["folder"]), schedule, mode, step, rank))


def _run(
    function: ForwardBackward, chunks: list[Any], sizes: Sizes, num_microbatches: int, pad: float
) -> Timeline:
    from megatron.core import parallel_state

    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    recorder = function.recorder = PaddedRecorder(pipeline_rank, pad)
    dist.barrier()
    try:
        function(
            forward_step_func=forward_step,
            data_iterator=[batches(sizes, expert_rank, num_microbatches) for _ in chunks],
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=sizes.sequence,
            micro_batch_size=sizes.batch,
        )
    finally:
        function.recorder = None
    return recorder.timeline("measured")


def trace_file(folder: Path, schedule: str, mode: str, step: int, rank: int) -> Path:
    """Return where the trace of one step of one rank of the world is written.

    Expert ranks follow each other: rank r is expert rank `r % EXPERT_RANKS` of pipeline rank
    `r // EXPERT_RANKS`.
    """
    return folder / f"{schedule}-{mode}-step{step}-rank{rank}.json"


def main() -> None:
    """Run the job whose file is the first argument."""
    # Megatron's collectives have names that torch has deprecated; not the reader's business here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_WAIT))
    measure(json.loads(Path(sys.argv[1]).read_text()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
