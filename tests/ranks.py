"""Run a function on several ranks, in a pool of processes per rank count that all tests share."""

import functools
import gc
import multiprocessing as mp
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist


def _serve(rank: int, num_ranks: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), num_ranks, rank)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            drop_groups()
            continue
        function, args = task
        try:
            pipe.send((function(rank, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def drop_groups(kept: Collection[Any] = ()) -> None:
    """Leave all groups but the world and `kept`, out of any call: gloo polls for each."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and group not in kept:
            dist.destroy_process_group(group)
    gc.collect()


def fresh_processes() -> ForkServerContext:
    """Return a context whose processes start from one that has torch imported, and nothing run."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "ep_megatron"])
    return context


@functools.cache
def _pool(num_ranks: int) -> list[Connection]:
    context, store = fresh_processes(), tempfile.mkdtemp(prefix="ep_ranks_") + "/store"
    pipes = [context.Pipe() for _ in range(num_ranks)]
    for rank, (_, theirs) in enumerate(pipes):
        args = (rank, num_ranks, store, theirs)
        context.Process(target=_serve, args=args, daemon=True).start()
        theirs.close()
    return [ours for ours, _ in pipes]


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return `function(rank, *args)` of every rank; fail with the traceback of each that raised.

    The ranks share a gloo process group (`dist.group.WORLD`) that lives as long as the pool, so
    `function` must leave every rank after the same collective calls.
    """
    pool = _pool(num_ranks)
    for pipe in pool:
        pipe.send((function, args))
    answers = [_answer(pipe) for pipe in pool]
    errors = [f"rank {r} of {num_ranks}:\n{error}" for r, (_, error) in enumerate(answers) if error]
    if errors:
        _pool.cache_clear()  # its ranks no longer agree on what was sent
        raise AssertionError("\n".join(errors))
    for pipe in pool:  # all have come back, so no rank is in a call of such a group
        pipe.send(None)
    return [result for result, _ in answers]


def _answer(pipe: Connection) -> tuple[Any, str | None]:
    try:
        return pipe.recv() if pipe.poll(300) else (None, "no answer within 300 s")
    except EOFError:
        return None, "the process ended"
