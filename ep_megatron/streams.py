"""Streams and events with DeepEP's names and meaning: CUDA's on a GPU, a worker thread on a CPU.

A `CPUStream` runs what it is given in order, on a thread of its own. The current stream of a thread
that calls is that thread: what it did before is done. An event is a point in a stream; waiting for
it blocks the calling thread and raises what went wrong on the way to it.
"""

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from ep_megatron import threads

logger = logging.getLogger(__name__)

_EXIT_GRACE = 5.0  # seconds that queued work may still take when the interpreter ends
_current = threading.local()


class _Task:
    """One function on a stream, and how it ended."""

    def __init__(self, function: Callable[[], object], name: str, worker: "_Worker") -> None:
        self.function: Callable[[], object] | None = function
        self.name, self.worker = name, worker
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.is_error_seen = False

    def run(self) -> None:
        assert self.function is not None
        try:
            self.function()
        except BaseException as error:
            # Frames would keep the call's tensors alive as long as the event.
            self.error = error.with_traceback(None)
        finally:
            self.function = None

    def wait(self) -> None:
        """Block until the function has run; raise what it raised."""
        if not self.ended.is_set():
            if getattr(_current, "worker", None) is self.worker:
                raise RuntimeError(
                    f"current_stream_wait: expected {self.name} to stand before the work that "
                    "waits for it, got a later place on the same stream; it could never end"
                )
            self.worker.block_on(self.ended, self.name)
        if self.error is not None:
            self.is_error_seen = True
            raise self.error.with_traceback(None)

    def __del__(self) -> None:
        if self.error is not None and not self.is_error_seen:
            logger.error("%s failed, and nobody waited for its event: %s", self.name, self.error)


class _Worker:
    """The thread of a stream and its queue; what the thread keeps alive, which is not the stream.

    Args:
        name: of the thread.
        interrupt: makes a task that waits for other ranks give up.
    """

    def __init__(self, name: str, interrupt: Callable[[], None] | None) -> None:
        self._name, self._interrupt = name, interrupt
        self._process = os.getpid()
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last: _Task | None = None
        self._is_ended = False

    def put(self, function: Callable[[], object], name: str) -> _Task:
        self.check_process(name)
        task = _Task(function, name, self)
        with self._lock:
            if self._is_ended:
                raise RuntimeError(f"{name}: expected a stream in use, got one that was closed")
            if self._thread is None:
                self._thread = threads.start(self._serve, name=self._name)
                _workers.add(self)
            self._queue.put(task)
            self._last = task
        return task

    def pending(self) -> _Task | None:
        """Return the last task if it has not ended, and nothing before it is waited for."""
        last = self._last
        if last is not None and last.ended.is_set():
            return None
        return last

    def check_process(self, name: str) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{name}: expected the process that made the stream ({self._process}), got a fork "
                f"of it ({os.getpid()}); make a Buffer in this process"
            )

    def block_on(self, event: threading.Event, name: str) -> None:
        """Wait for what a queued function will set."""
        self.check_process(name)
        try:
            event.wait()
        except BaseException:  # Ctrl-C: the caller leaves, so its work must not stay behind
            self.interrupt()
            raise

    def interrupt(self) -> None:
        if self._interrupt is not None and self.pending() is not None:
            self._interrupt()

    def end(self) -> None:
        """Let the thread end once the queue is empty. Does not wait for it."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if not self._is_ended:
                self._is_ended = True
                self._queue.put(None)

    def join(self, deadline: float) -> bool:
        """Wait until `deadline`; whether the thread has ended, or there is none here."""
        if self._thread is None or os.getpid() != self._process:
            return True
        self._thread.join(max(deadline - time.monotonic(), 0))
        return not self._thread.is_alive()

    def _serve(self) -> None:
        _current.worker = self
        while (task := self._queue.get()) is not None:
            task.run()
            task.ended.set()
            # Nothing of an ended task may live until the next one comes.
            if self._last is task:
                with self._lock:
                    if self._last is task:
                        self._last = None
            del task


_workers: "weakref.WeakSet[_Worker]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Before the interpreter ends: give queued work a moment, then make it give up.

    A thread that came back from compiled code into an interpreter that has ended would crash it.
    """
    workers = list(_workers)
    for worker in workers:
        worker.end()
    deadline = time.monotonic() + _EXIT_GRACE
    late = [worker for worker in workers if not worker.join(deadline)]
    for worker in late:
        worker.interrupt()
    for worker in late:
        worker.join(time.monotonic() + 1.0)


class CPUStream:
    """Runs functions one after the other on a thread of its own; what `torch.cuda.Stream` is there.

    The thread starts with the first function and ends with the stream, after what is queued. It
    does not keep the interpreter from ending: queued work then gets a few seconds.

    Args:
        name: of the thread.
        interrupt: called when a thread that waits for this stream is interrupted (Ctrl-C), or the
            interpreter ends; makes the function that runs give up.
    """

    def __init__(
        self, name: str = "ep_megatron", interrupt: Callable[[], None] | None = None
    ) -> None:
        self._worker = _Worker(name, interrupt)
        weakref.finalize(self, self._worker.end).atexit = False

    def submit(self, function: Callable[[], object], name: str = "submit") -> "EventHandle":
        """Queue `function`; return the event that is complete when it has run.

        What it raises is raised by `current_stream_wait` of this event; what stands behind it in
        the queue runs all the same. An error that nobody waits for is logged.

        Args:
            function: without arguments; should end by itself, as nothing here stops it.
            name: for messages.
        """
        return EventHandle._of(self._worker.put(function, name))

    def record_event(self) -> "EventHandle":
        """Return an event that is complete when all that is queued now has run."""
        return self.submit(_nothing, "record_event")

    def wait_event(self, event: "EventHandle | EventOverlap") -> None:
        """Let what is queued from now on wait for `event`. Returns at once."""
        handle = handle_of(event)
        if handle is not None:
            self.submit(handle.current_stream_wait, "wait_event")

    def query(self) -> bool:
        """Return whether all that was queued has run."""
        return self._worker.pending() is None

    def synchronize(self) -> None:
        """Wait until all that is queued has run; errors stay with the events of the calls."""
        last = self._worker.pending()
        if last is not None and getattr(_current, "worker", None) is not self._worker:
            self._worker.block_on(last.ended, "synchronize")

    def block_on(self, event: threading.Event) -> None:
        """Wait for something that a queued function sets, which must set it even if it fails."""
        self._worker.block_on(event, "block_on")

    def close(self) -> None:
        """Take no more functions. The thread ends once the queue is empty."""
        self._worker.end()


class EventHandle:
    """A point in the work of the current stream, recorded when the object is made.

    On a CPU the current stream is the calling thread, and what it did is done.
    """

    def __init__(self) -> None:
        self._task: _Task | None = None
        self._event: Any = torch.cuda.Event() if torch.cuda.is_available() else None
        if self._event is not None:
            self._event.record()

    @classmethod
    def _of(cls, task: _Task) -> "EventHandle":
        handle = cls.__new__(cls)
        handle._task, handle._event = task, None
        return handle

    def query(self) -> bool:
        """Return whether the event is complete."""
        if self._task is not None:
            return self._task.ended.is_set()
        return self._event is None or bool(self._event.query())

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event; on a CPU block the calling thread.

        Raises:
            What the work before the event on its stream raised, for an event of one call: its own.
        """
        if self._task is not None:
            self._task.wait()
        elif self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class _AllOf(EventHandle):
    """Complete when all of some events are."""

    def __init__(self, handles: list[EventHandle]) -> None:
        self._handles = handles

    def query(self) -> bool:
        """Return whether all are complete."""
        return all(handle.query() for handle in self._handles)

    def current_stream_wait(self) -> None:
        """Make the current stream wait for each, in order."""
        for handle in self._handles:
            handle.current_stream_wait()


class EventOverlap:
    """An event, with the tensors that must stay alive until somebody has waited for it.

    As a context manager it waits on exit: what stands in the block overlaps the communication.
    `with event(release_handle=True):` also drops the event then.

    Args:
        event: the event, or None where a call had nothing to wait for.
        extra_tensors: kept alive with the event.

    Source: the class of the same name in DeepEP (MIT), whose users write against it.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._hooks: list[Callable[[], None]] = []
        self._is_released_on_exit = False

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Run `hook` once, in the thread that waits, after the next wait for the event."""
        self._hooks.append(hook)

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the event; raise what went wrong on the way to it.

        Args:
            release_handle: whether to drop the event, and what it keeps alive, afterwards.

        Raises:
            ValueError: if there is no event, because the call that returned this object was not
                asked to be asynchronous.
            What the call raised whose event this is.
        """
        if self.event is None:
            raise ValueError(
                "current_stream_wait: expected an event, got none; "
                "ask for one with async_finish=True"
            )
        self.event.current_stream_wait()
        if release_handle:
            self.event = self.extra_tensors = None
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        """Return this object, to be used as a context manager with the given option."""
        self._is_released_on_exit = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.event is not None:
            self.current_stream_wait(self._is_released_on_exit)
        self._is_released_on_exit = False


def handle_of(event: EventHandle | EventOverlap | None) -> EventHandle | None:
    """Return the event to wait for, or None: callers pass on what a synchronous call returned."""
    return event.event if isinstance(event, EventOverlap) else event


def after_all(*events: EventHandle | EventOverlap | None) -> EventHandle | None:
    """Return an event that is complete when all of these are; None if there is none."""
    handles = [handle for handle in map(handle_of, events) if handle is not None]
    return _AllOf(handles) if handles else None


def _nothing() -> None:
    """Stand for a point in a queue."""
