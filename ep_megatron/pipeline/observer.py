"""What is told of every node that runs, and the recorder that makes a timeline of it."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from ep_megatron.pipeline.trace import Span, Timeline


class Observer(Protocol):
    """Is told what one pass does. `way` is F, B or W."""

    def compute(
        self, name: str, layer: int | None, way: str
    ) -> contextlib.AbstractContextManager[None]:
        """Surround a compute node."""

    def launch(self, name: str, layer: int | None, way: str) -> None:
        """Hear that an exchange starts."""

    def arrival(self) -> contextlib.AbstractContextManager[None]:
        """Surround the wait for the exchange of this pass that is under way."""


class Silent:
    """Records nothing."""

    def compute(
        self, _name: str, _layer: int | None, _way: str
    ) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def launch(self, _name: str, _layer: int | None, _way: str) -> None:
        """Do nothing."""

    def arrival(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()


class Recorder:
    """Collects the spans of one rank; times are the host's, so it is for runs on a CPU.

    Exchanges of one rank run one after the other, in the order of their launches. A span of the
    lane comm begins when the exchange is launched, or when the one before it is done, and ends when
    the wait for it does: an exchange that was done before anybody asked looks longer than it was,
    while compute ran. Compute spans, and what of the exchanges no compute hides, are exact.

    Args:
        rank: pipeline rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        """Index of the action under way in the rank's schedule."""
        self.spans: list[Span] = []
        self.description: dict[str, Any] = {}
        """What was run: see `program.describe`."""
        self._start = time.time_ns() / 1e3 - time.perf_counter() * 1e6
        self._comm_end = 0.0

    def timeline(self, title: str) -> Timeline:
        """Return this rank's spans with what was run; `write_trace` writes them."""
        num_ranks = len(self.description.get("stages", ())) or self.rank + 1
        description = self.description | {"measured": True}
        return Timeline(title, num_ranks, tuple(self.spans), description)

    def now(self) -> float:
        """Return microseconds since the epoch, never going back."""
        return self._start + time.perf_counter() * 1e6

    def of(self, chunk: int, microbatch: int) -> "Watch":
        """Return the observer of one pass."""
        return Watch(self, chunk, microbatch)

    def after_comm(self, start: float) -> float:
        """Return when an exchange launched at `start` may have begun."""
        return max(start, self._comm_end)

    def comm_done(self, end: float) -> None:
        """Note when the latest exchange ended."""
        self._comm_end = end


class Watch:
    """Records one pass."""

    def __init__(self, recorder: Recorder, chunk: int, microbatch: int) -> None:
        self._recorder, self._chunk, self._microbatch = recorder, chunk, microbatch
        self._launched: deque[tuple[str, int | None, str, float]] = deque()

    @contextlib.contextmanager
    def compute(self, name: str, layer: int | None, way: str) -> Iterator[None]:
        """Record a span of compute."""
        start = self._recorder.now()
        yield
        self._add("compute", (name, layer, way), start)

    def launch(self, name: str, layer: int | None, way: str) -> None:
        """Note the launch."""
        self._launched.append((name, layer, way, self._recorder.now()))

    @contextlib.contextmanager
    def arrival(self) -> Iterator[None]:
        """Record the span of the exchange launched first."""
        yield
        name, layer, way, launched = self._launched.popleft()
        start = min(self._recorder.after_comm(launched), self._recorder.now())
        self._add("comm", (name, layer, way), start)
        self._recorder.comm_done(self._recorder.now())

    @contextlib.contextmanager
    def message(self, name: str, way: str) -> Iterator[None]:
        """Record a span of the lane p2p."""
        start = self._recorder.now()
        yield
        self._add("p2p", (name, None, way), start)

    def _add(self, lane: str, node: tuple[str, int | None, str], start: float) -> None:
        recorder = self._recorder
        name, layer, way = node
        recorder.spans.append(
            Span(
                rank=recorder.rank,
                lane=lane,
                name=name,
                kind=way,
                chunk=self._chunk,
                microbatch=self._microbatch,
                layer=layer,
                start=start,
                end=recorder.now(),
                step=recorder.step,
            )
        )
