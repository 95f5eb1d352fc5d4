"""Events between the communication stream and the caller's, with DeepEP's names and meaning.

On a GPU an event is a CUDA event. On a CPU every operation of this package has finished when its
call returns, so an event is complete from the start; the same code runs on both.
"""

from types import TracebackType
from typing import Any

import torch


class EventHandle:
    """A point in the work of the current stream, recorded when the object is made."""

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event() if torch.cuda.is_available() else None
        if self._event is not None:
            self._event.record()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event; on a CPU there is nothing to wait for."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """An event, with the tensors that must stay alive until somebody has waited for it.

    As a context manager it waits on exit: what stands in the block overlaps the communication.

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

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event.

        Raises:
            ValueError: if there is no event, because the call that returned this object was not
                asked to be asynchronous.
        """
        if self.event is None:
            raise ValueError(
                "current_stream_wait: expected an event, got none; "
                "ask for one with async_finish=True"
            )
        self.event.current_stream_wait()

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.event is not None:
            self.event.current_stream_wait()
