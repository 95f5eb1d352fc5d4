"""Start a command on several processes of this host, with torch's own launcher."""

import logging
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import Any

# A checkpoint may be written between the signal and the end.
_SECONDS_TO_STOP = 600


def is_worker() -> bool:
    """Return whether torchrun, or `run_processes`, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_restarts() -> int:
    """Return how often torchrun has started this process again because one has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def run_processes(num_processes: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run `python ARGUMENTS` on `num_processes` processes of this host, as torchrun does.

    The first process that fails ends all others; then all are started again, up to `max_restarts`
    times. Signals are handed on.

    Args:
        num_processes: ranks to start.
        arguments: what follows `python` on each command line.
        max_restarts: how often all may start again.

    Returns:
        0, or 128 plus the number of the signal that ended the run.

    Raises:
        RuntimeError: a process failed; the message is that of the first one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    # Its reports repeat what is raised here.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        shutdown_timeout=_SECONDS_TO_STOP,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RuntimeError(
            f"rank {rank} of {num_processes} failed (exit code {failure.exitcode}): "
            f"{_describe(failure)}"
        ) from None
    return 0


def run_recorded(function: Callable[[], int]) -> int:
    """Run a worker's work and leave its exception where the launcher finds it.

    Returns:
        What `function` returned, or 1 if it raised and a launcher tells the user why.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        return record(function)() or 0
    except Exception:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        return 1


def _describe(failure: Any) -> str:
    """Return the message of a failed process, with its traceback unless the user was wrong."""
    message = failure.message
    if not isinstance(message, dict):
        return str(message)
    text = str(message["message"])
    if text.startswith("ValueError: "):
        return text.removeprefix("ValueError: ")
    return f"{text}\n{message['extraInfo']['py_callstack']}".rstrip()
