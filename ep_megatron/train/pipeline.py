"""The key `pipeline-schedule`: what it asks of other keys, of a model, and of an iteration."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ep_megatron.pipeline.placement import (
    V_SHAPED,
    ChunkPlacement,
    num_models,
    num_virtual_chunks,
    place_chunk,
)
from ep_megatron.pipeline.schedule import make_schedule
from ep_megatron.pipeline.trace import write_trace


def check_pipeline(config: Any) -> None:
    """Raise ValueError if the schedule does not go with the config's other keys."""
    name = config.pipeline_schedule
    if name is None:
        if config.pipeline_trace_iteration is not None:
            raise ValueError(
                "expected pipeline-schedule to be given with pipeline-trace-iteration, got none; "
                "Megatron's own schedules record nothing"
            )
        return
    if config.num_experts is not None and config.moe_token_dispatcher != "deepep":
        raise ValueError(
            f"expected moe-token-dispatcher to be deepep for pipeline-schedule {name}, got "
            f"{config.moe_token_dispatcher}"
        )
    num_ranks, asked = config.pipeline_model_parallel_size, _asked_chunks(config)
    if num_ranks == 1 and name not in ("1f1b", "zb1p", "interleaved-overlap"):
        raise ValueError(
            f"expected pipeline-model-parallel-size to be at least 2 for pipeline-schedule {name}, "
            "got 1; interleaved-overlap hides exchanges without a pipeline"
        )
    if name.startswith("interleaved"):
        if num_ranks > 1 and (asked or 2) < 2:
            raise ValueError(
                f"expected num-virtual-stages-per-pipeline-rank to be at least 2 for "
                f"pipeline-schedule {name}, got {asked}"
            )
    elif asked not in (None, num_virtual_chunks(name)):
        raise ValueError(
            "expected num-virtual-stages-per-pipeline-rank to be left out for pipeline-schedule "
            f"{name}, got {asked}"
        )
    if name in (*V_SHAPED, "dualpipe") and config.pipeline_model_parallel_layout:
        raise ValueError(
            "expected pipeline-model-parallel-layout to be left out for pipeline-schedule "
            f"{name}, got {config.pipeline_model_parallel_layout}"
        )


def check_microbatches(config: Any, num_microbatches: int) -> None:
    """Raise ValueError if the schedule cannot run that many micro-batches."""
    name = config.pipeline_schedule
    if name is None:
        return
    chunks = virtual_chunks(config) if name.startswith("interleaved") else None
    try:
        make_schedule(name, config.pipeline_model_parallel_size, num_microbatches, chunks)
    except ValueError as error:
        raise ValueError(
            f"config: pipeline-schedule {name} does not fit the number of micro-batches per rank "
            f"({num_microbatches}, from global-batch-size and the parallel sizes): {error}"
        ) from None


def _asked_chunks(config: Any) -> int | None:
    chunks: int | None = config.num_virtual_stages_per_pipeline_rank
    return chunks


def virtual_chunks(config: Any) -> int | None:
    """Return Megatron's number of virtual stages per rank that the schedule runs on."""
    name, asked = config.pipeline_schedule, _asked_chunks(config)
    if config.pipeline_model_parallel_size == 1:
        return None
    return asked or (2 if name == "interleaved-overlap" else num_virtual_chunks(name))


def place_models(config: Any, megatron_config: Any) -> list[ChunkPlacement]:
    """Return what this rank's chunks are built with. Not collective."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    name = config.pipeline_schedule
    virtual = megatron_config.virtual_pipeline_model_parallel_size
    return [
        place_chunk(name, chunk, megatron_config, groups)
        for chunk in range(num_models(name, virtual))
    ]


def schedule_function(config: Any) -> Any:
    """Return what runs an iteration's forwards and backwards: Megatron's function or ours."""
    if config.pipeline_schedule is None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        return get_forward_backward_func()
    from ep_megatron.pipeline.forward_backward import get_forward_backward_func as ours

    return ours(config.pipeline_schedule, timeout=60.0 * config.distributed_timeout_minutes)


@contextlib.contextmanager
def traced(config: Any, iteration: int) -> Iterator[None]:
    """Write the timeline of what runs in this block, if `iteration` is the one that is asked for.

    One file per pipeline rank, by the first data-parallel and tensor-parallel rank.
    """
    if config.pipeline_trace_iteration != iteration:
        yield
        return
    from megatron.core import parallel_state

    rank = parallel_state.get_pipeline_model_parallel_rank()
    with schedule_function(config).recorded(rank) as recorder:
        yield
    if (
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
    ):
        folder = Path(config.run_dir) / "pipeline-trace"
        folder.mkdir(parents=True, exist_ok=True)
        timeline = recorder.timeline(f"{config.pipeline_schedule}, iteration {iteration}")
        write_trace(timeline, folder / f"rank-{rank}.json")
