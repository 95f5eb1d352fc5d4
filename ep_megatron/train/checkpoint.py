"""Megatron distributed checkpoints that are whole or absent, and exact to resume from.

A checkpoint is written under a hidden name, flushed, renamed to `iter_0000100`, and only then named
in `latest_checkpointed_iteration.txt` (Megatron's own file): a run killed at any moment leaves the
last whole checkpoint as the latest.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ep_megatron.train.config import Config
from ep_megatron.train.orphans import start_checkpoint_process
from ep_megatron.train.step import Run

_LATEST = "latest_checkpointed_iteration.txt"
# The parallel sizes that random states belong to.
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def latest_iteration(folder: Path) -> int | None:
    """Return the iteration of the latest whole checkpoint in `folder`, or None.

    Raises:
        ValueError: the file that names it holds no number.
    """
    try:
        text = (folder / _LATEST).read_bytes()[:64].decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"checkpoint: expected {folder / _LATEST} to hold a number, got {text!r}; write that "
            "of the last whole iter_ folder into it"
        )
    return int(text)


def save_checkpoint(run: Run, folder: Path) -> Path:
    """Save `run` and return the checkpoint's folder; collective over all ranks."""
    from megatron.core import dist_checkpointing

    name = f"iter_{run.iteration:07d}"
    writing, final = folder / f".{name}", folder / name
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    start_checkpoint_process()
    dist_checkpointing.save(_state(run, is_loading=False), str(writing))
    dist.barrier()
    if dist.get_rank() == 0:
        for file in writing.iterdir():
            _flush(file)
        _flush(writing)
        shutil.rmtree(final, ignore_errors=True)
        writing.rename(final)
        latest = folder / f".{_LATEST}"
        latest.write_text(str(run.iteration))
        _flush(latest)
        latest.replace(folder / _LATEST)
        _flush(folder)
    dist.barrier()
    return final


def load_checkpoint(run: Run, folder: Path) -> Path:
    """Bring `run` to its latest checkpoint in `folder`; collective over all ranks.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: there is no checkpoint, or it is not whole, or one of another model.
    """
    iteration = latest_iteration(folder)
    if iteration is None:
        raise ValueError(
            f"resume: expected a checkpoint in {folder}, got none; start without --resume"
        )
    path = folder / f"iter_{iteration:07d}"
    if not path.is_dir():
        raise ValueError(
            f"resume: expected the folder {path}, which {folder / _LATEST} names, got none; write "
            "the number of another iter_ folder into that file"
        )
    try:
        _load(run, path)
    except (Exception, CheckpointException) as error:  # whatever a damaged file does to readers
        if str(error).startswith("resume: "):
            raise
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # of all ranks', which say much the same
            cause = next(iter(error.failures.values()), (error, None))[0]
        reason = (str(cause).splitlines() or [""])[0][:300]
        raise ValueError(
            f"resume: expected {path} to be a whole checkpoint of this model, got "
            f"{type(cause).__name__}: {reason}; restore it, or write the number of an earlier "
            f"iter_ folder into {folder / _LATEST}"
        ) from error
    return path


def _load(run: Run, path: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    common = dist_checkpointing.load_common_state_dict(str(path))
    same_layout = common["layout"] == _layout(run.config)
    if run.config.use_distributed_optimizer:
        _check_schedule(run.config, common["config"], path)
    state = dist_checkpointing.load(
        _state(run, is_loading=True, with_random_states=same_layout), str(path)
    )
    for key, model in _named(run.models):
        unwrap_model(model).load_state_dict(state[key])
    _add_missing_steps(run.optimizer, state["optimizer"], state["iteration"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.iteration = state["iteration"]
    if same_layout:
        _restore_random_states(state["random_states"])


def _check_schedule(config: Config, saved: dict[str, Any], path: Path) -> None:
    """Refuse state of a distributed optimizer over other chunks: it is cut along their buffers."""
    asked, was = config.pipeline_schedule, saved.get("pipeline-schedule")
    if asked != was:
        raise ValueError(
            f"resume: expected pipeline-schedule to be {was or 'left out'}, as in {path}, whose "
            f"distributed optimizer is cut along its chunks, got {asked or 'none'}; resume "
            "with the schedule it was written by"
        )


def _add_missing_steps(optimizer: Any, state: dict[Any, Any], iteration: int) -> None:
    """Give torch's Adam its `step` where the checkpoint has none.

    Megatron keeps the step among what rank 0 saves. If rank 0's pipeline stage has no experts, that
    lacks the step of the experts' optimizer, which other stages need.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = [state] if len(chained) == 1 else [state[index] for index in range(len(chained))]
    for one, part in zip(chained, parts, strict=True):
        inner = part.get("optimizer", part).get("state")
        if inner and isinstance(one.optimizer, torch.optim.Adam):
            inner.setdefault("common_step", torch.tensor(float(iteration)))


def _named(models: list[Any]) -> list[tuple[str, Any]]:
    if len(models) == 1:
        return [("model", models[0])]
    return [(f"model{chunk}", model) for chunk, model in enumerate(models)]


def _layout(config: Config) -> list[int]:
    return [dist.get_world_size(), *(getattr(config, name) for name in _LAYOUT)]


def _state(run: Run, is_loading: bool, with_random_states: bool = True) -> dict[str, Any]:
    """Return what is saved, or the template of what is loaded; Megatron shards it by rank."""
    from megatron.core.utils import unwrap_model

    metadata = {}
    if run.config.use_distributed_optimizer:
        metadata = {
            "distrib_optim_sharding_type": "dp_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
    models = {
        key: unwrap_model(model).sharded_state_dict(metadata=dict(metadata))
        for key, model in _named(run.models)
    }
    if run.config.pipeline_schedule == "dualpipe":
        _mark_as_copies(models["model1"])
    options = {"metadata": metadata} if metadata else {}
    state = {
        **models,
        "optimizer": run.optimizer.sharded_state_dict(models, is_loading=is_loading, **options),
        "scheduler": run.scheduler.state_dict(),
        "iteration": run.iteration,
        "layout": _layout(run.config),
        "config": run.config.model_dump(mode="json", by_alias=True),
    }
    if with_random_states:
        state["random_states"] = _random_states()
    return state


def _mark_as_copies(state: dict[str, Any]) -> None:
    """Let the second copies of stages be loaded, but not saved beside the first."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    for value in nested_values(state):
        if isinstance(value, ShardedBase):
            replica = value.replica_id
            value.replica_id = (*replica, 1) if isinstance(replica, tuple) else (replica, 1)


def _random_states() -> Any:
    """Return the states of all random generators of this rank, as one sharded object."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape, offset = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject("random_states", states, shape, offset, replica_id=0)


def _restore_random_states(states: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
