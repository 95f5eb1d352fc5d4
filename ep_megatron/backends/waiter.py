"""Waits for gloo that hear Ctrl-C, and can be ended from another thread.

gloo's own waits do neither. What it does have is a deadline per wait, and a wait that reaches its
deadline closes all connections of its group: so a wait of a millisecond for a message that never
comes ends all others.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from ep_megatron import threads

_NEVER_SENT = (1 << 30) - 1  # a tag


def cut_off(group: Any) -> None:
    """Close the connections of a gloo group: every wait on it ends with an error. Local.

    Args:
        group: a `dist.ProcessGroupGloo` that is its caller's own.
    """
    for peer in range(group.size()):
        if peer != group.rank():
            # Closed already, or closed by this.
            with contextlib.suppress(RuntimeError):
                work = group.recv([torch.empty(1, dtype=torch.uint8)], peer, _NEVER_SENT)
                work.wait(timedelta(milliseconds=1))
            return


class Waiter:
    """Runs what blocks where the caller hears Ctrl-C: on a thread of its own, for the main thread.

    Other threads get no signals, and wait themselves.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, action: Callable[[], None], interrupt: Callable[[], None]) -> None:
        """Run `action` and raise what it raises; call `interrupt` if Ctrl-C comes meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return action()
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a wait that nobody hears any more must not hold up the end of the process.
            self._thread = threads.start(_serve, self._tasks, name="ep_megatron waiter")
            threads.end_at_exit(self)
        answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._tasks.put((action, answer))
        try:
            error = answer.get()
        except BaseException:
            interrupt()
            raise
        if error is not None:
            raise error
        return None

    def end(self) -> None:
        """Let the thread end behind what it runs; the next `run` starts another."""
        self._thread = None
        self._tasks.put(None)

    __del__ = end


def _serve(tasks: "queue.SimpleQueue[Any]") -> None:
    while (task := tasks.get()) is not None:
        action, answer = task
        try:
            action()
            answer.put(None)
        except BaseException as error:
            answer.put(error)
        del task, action, answer  # a thread at rest keeps nobody's tensors
