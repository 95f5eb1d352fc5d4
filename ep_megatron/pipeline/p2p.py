"""Messages between pipeline stages: one channel per stage border, way and direction.

A channel carries the activations (F) or the gradients (B) of one stage border, one way, in
micro-batch order at both ends. So no message can overtake another, and ranks need not agree on an
order among channels: each has a tag, or on NCCL, which has no tags, a group of its own.

One receive is posted ahead, so that a message is taken in while the rank computes; sends are waited
for at the end of the step. Waits have a deadline, release the GIL, hear Ctrl-C, and name the rank
that is late.
"""

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import threads

_POLL_SECONDS = 0.2
_SHAPE_DIMS = 4


@dataclass(frozen=True)
class Link:
    """One way over one stage border, the same at both ends.

    Attributes:
        peer: rank in the pipeline group at the other end.
        way: "F" or "B".
        border: stage before the border.
        direction: of the micro-batches, see `Schedule.directions`.
    """

    peer: int
    way: str
    border: int
    direction: int

    @property
    def tag(self) -> int:
        """A number no other link of the pipeline has; the next one is this link's too."""
        return 4 * (2 * self.border + self.direction) + (0 if self.way == "F" else 2)


class Wire:
    """How the links of one pipeline group move bytes.

    Args:
        group: the pipeline ranks.
        device: of the tensors.
        timeout: seconds that a wait may take.
        groups: what earlier wires of `group` have made, to be used again.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: float,
        groups: dict[tuple[int, ...], dist.ProcessGroup],
    ) -> None:
        self.group, self.device, self.timeout = group, device, timeout
        self.ranks = dist.get_process_group_ranks(group)
        self._groups = groups

    def connect(self, links: list[Link]) -> None:
        """Make what the links need; collective between the two ends of each, in any case once."""
        if self.device.type == "cpu":
            return
        # Ascending tags: both ends of every link come to it in an order without circles.
        for link in sorted(links, key=lambda link: link.tag):
            key = self._key(link)
            if key not in self._groups:
                members = [self.ranks[rank] for rank in key[1:]]
                self._groups[key] = dist.new_group(members, use_local_synchronization=True)

    def group_of(self, link: Link) -> dist.ProcessGroup:
        """Return the group that carries a link."""
        if self.device.type == "cpu":
            return self.group
        return self._groups[self._key(link)]

    def _key(self, link: Link) -> tuple[int, ...]:
        return (link.tag, *sorted((dist.get_rank(self.group), link.peer)))


class Channel:
    """The messages of one link during one step; made anew for each step.

    Args:
        link: the link; a channel is used either to send or to receive.
        wire: carries it.
        dtype: of the messages.
    """

    def __init__(self, link: Link, wire: Wire, dtype: torch.dtype) -> None:
        self.link, self._wire, self._dtype = link, wire, dtype
        self._group = wire.group_of(link)
        self._peer = wire.ranks[link.peer]
        self._expected: deque[tuple[int, ...]] = deque()
        self._posted: deque[tuple[Tensor, Any]] = deque()
        self._sent: deque[tuple[Tensor, Any]] = deque()
        self._waiter = _Waiter() if wire.device.type == "cpu" else None
        self._count = 0

    def expect(self, shape: tuple[int, ...]) -> None:
        """Say what shape a message to come has, in the order of messages."""
        self._expected.append(shape)
        if not self._posted:
            self._post()

    def receive(self, with_shape: bool = False) -> Tensor:
        """Return the next message.

        Args:
            with_shape: its shape comes before it, as `send` was asked to do.

        Raises:
            RuntimeError: the peer did not send in time, or is gone.
        """
        if with_shape:
            header = torch.empty(_SHAPE_DIMS, dtype=torch.int64, device=self._wire.device)
            self._wait(dist.irecv(header, self._peer, self._group, self.link.tag + 1), "receive")
            self.expect(tuple(size for size in header.tolist() if size >= 0))
        message, work = self._posted.popleft()
        self._post()
        self._wait(work, "receive")
        self._count += 1
        return message

    def send(self, message: Tensor, with_shape: bool = False) -> None:
        """Send a message; it is read until `drain`.

        Raises:
            RuntimeError: the peer is gone.
        """
        message = message.detach().contiguous()
        if with_shape:
            sizes = [*message.shape, *([-1] * (_SHAPE_DIMS - message.dim()))]
            header = torch.tensor(sizes, dtype=torch.int64, device=self._wire.device)
            self._send(header, self.link.tag + 1)
        self._send(message, self.link.tag)
        while self._sent and _is_done(self._sent[0][1]):
            self._sent.popleft()

    def drain(self) -> None:
        """Wait until all that was sent has left.

        Raises:
            RuntimeError: the peer did not take it in time, or is gone.
        """
        while self._sent:
            self._wait(self._sent.popleft()[1], "send")
            self._count += 1
        assert not self._posted, "a message was expected that nobody received"

    def close(self) -> None:
        """Let go of what waits for messages; harmless to call again."""
        if self._waiter is not None:
            self._waiter.end()

    def _send(self, message: Tensor, tag: int) -> None:
        work = dist.isend(message, self._peer, self._group, tag)
        assert work is not None
        self._sent.append((message, self._waiter.add(work) if self._waiter else work))

    def _post(self) -> None:
        if self._expected:
            shape = self._expected.popleft()
            message = torch.empty(shape, dtype=self._dtype, device=self._wire.device)
            work: Any = dist.irecv(message, self._peer, self._group, self.link.tag)
            self._posted.append((message, self._waiter.add(work) if self._waiter else work))

    def _wait(self, work: Any, what: str) -> None:
        if self._waiter is None:
            work.wait()  # on a GPU this makes the stream wait, not the host
            return
        future: Future[None] = work if isinstance(work, Future) else self._waiter.add(work)
        reason = _problem_of(future, self._wire.timeout)
        if reason:
            way = "forward" if self.link.way == "F" else "backward"
            raise RuntimeError(
                f"pipeline {what}: expected message {self._count} of the {way} between stages "
                f"{self.link.border} and {self.link.border + 1} within {self._wire.timeout:g} s, "
                f"got {reason}; pipeline rank {self.link.peer} (rank {self._peer} of the world) is "
                "late or gone"
            )


def swap(
    group: dist.ProcessGroup, sent: list[Tensor], received: list[Tensor], timeout: float
) -> None:
    """Send tensors to rank `P - 1 - r` of a group, and receive what it sends, in its order.

    Args:
        group: P ranks, over which nothing else is under way.
        sent: are read before it returns.
        received: shaped as the other rank's `sent`.
        timeout: seconds to wait for the other rank.

    Raises:
        RuntimeError: the other rank is late or gone.
    """
    if not sent and not received:
        return
    ranks = dist.get_process_group_ranks(group)
    mirror = len(ranks) - 1 - group.rank()
    peer, deadline, reason = ranks[mirror], time.monotonic() + timeout, ""
    outgoing = [tensor.contiguous() for tensor in sent]
    incoming = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in received]
    # All at once: the two ranks may have other numbers of tensors, in the other's order.
    operations = [dist.P2POp(dist.isend, tensor, peer, group) for tensor in outgoing]
    operations += [dist.P2POp(dist.irecv, tensor, peer, group) for tensor in incoming]
    waiter = _Waiter()
    try:
        works = dist.batch_isend_irecv(operations)
        if operations[0].tensor.device.type == "cpu":
            for future in [waiter.add(work) for work in works]:
                left = max(0.0, deadline - time.monotonic())
                reason = reason or _problem_of(future, left)
        else:
            for work in works:
                work.wait()
    except RuntimeError as error:  # the connection is gone already
        reason = _first_line(error)
    finally:
        waiter.end()
    if reason:
        raise RuntimeError(
            f"pipeline: expected the other copies of this rank's stages within {timeout:g} s, got "
            f"{reason}; pipeline rank {mirror} (rank {peer} of the world) is late or gone"
        )
    for tensor, values in zip(received, incoming, strict=True):
        tensor.copy_(values)


def _problem_of(future: "Future[None]", timeout: float) -> str:
    """Wait until a message has passed; return why it has not. Hears Ctrl-C."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            future.result(max(0.0, min(left, _POLL_SECONDS)))
            return ""
        except FutureTimeout:
            if left <= 0:
                return "nothing"
        except RuntimeError as error:
            return _first_line(error)


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:200]


def _is_done(work: Any) -> bool:
    return bool(work.done() if isinstance(work, Future) else work.is_completed())


class _Waiter:
    """A thread that waits for gloo's works, which cannot be asked whether they are done.

    gloo gives up a whole group when a wait runs out, so the thread's own waits have no end to
    speak of; who waits for the thread has the deadline.
    """

    def __init__(self) -> None:
        self._works: queue.SimpleQueue[tuple[Any, Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, work: Any) -> "Future[None]":
        """Return a future that is done when the work is; works are done in order."""
        if self._thread is None:
            self._thread = threads.start(self._run, name="ep pipeline p2p")
            threads.end_at_exit(self)
        future: Future[None] = Future()
        self._works.put((work, future))
        return future

    def end(self) -> None:
        """End the thread once it has nothing left to wait for."""
        if self._thread is not None:
            self._works.put(None)
            self._thread = None

    def _run(self) -> None:
        while (item := self._works.get()) is not None:
            work, future = item
            try:
                work.wait(timedelta(days=1))
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
