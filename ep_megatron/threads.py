"""Threads that are gone before the interpreter ends.

One that drops its last tensors, groups or connections while the interpreter ends would come back
from compiled code into what is no longer there, and the process would abort.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

_EXIT_GRACE = 1.0  # seconds for what threads still do when the interpreter ends
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()
_endings: "weakref.WeakSet[Ending]" = weakref.WeakSet()


class Ending(Protocol):
    """Something whose thread has to be told that it is over."""

    def end(self) -> None:
        """Let the thread end once it has nothing left to do; does not wait. From any thread."""


def start(target: Callable[..., None], *args: object, name: str) -> threading.Thread:
    """Start a daemon, which does not keep the interpreter from ending, but is waited for a moment.

    Args:
        target: what it runs.
        args: for `target`.
        name: of the thread.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def end_at_exit(owner: Ending) -> None:
    """Have `owner.end()` called when the interpreter ends; does not keep `owner` alive."""
    _endings.add(owner)


def join_all(seconds: float) -> None:
    """Wait until all threads that were started here have ended, `seconds` at most. Local."""
    deadline = time.monotonic() + seconds
    for thread in list(_threads):
        if thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0))


@atexit.register
def _end_all() -> None:
    for owner in list(_endings):
        owner.end()
    join_all(_EXIT_GRACE)
