"""The process that Megatron starts for a checkpoint ends with the rank that started it.

It is a multiprocessing manager, which a rank that is killed would leave behind for ever, with the
run's output open.
"""

import ctypes
import multiprocessing as mp
import os
import signal
from multiprocessing.managers import SyncManager

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process as soon as its parent has ended (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def start_checkpoint_process() -> None:
    """Start that process before Megatron would; once per rank, on its main thread."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if getattr(filesystem_async, "_results_queue", "is elsewhere") is None:
        manager = SyncManager(ctx=mp.get_context("spawn"))
        manager.start(end_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()
