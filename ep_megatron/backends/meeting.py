"""Small fixed-size messages between all ranks, with a deadline that names who is late.

What every backend needs before rows move: to set itself up, and to find out that ranks disagree.
"""

import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ep_megatron.backends.base import (
    MAX_EXPERTS,
    NUM_CALL_FIELDS,
    Call,
    PeerReport,
    check_agreement,
)
from ep_megatron.backends.waiter import Waiter, cut_off

MAX_ERROR_BYTES = 512
# Bytes of the error that follows, nanoseconds of the wall clock; then the call.
_HEADER = struct.Struct(f"<2q{NUM_CALL_FIELDS}q")
_WHOLE_RANK = "rank\N{NO-BREAK SPACE}"


class Gathering(Protocol):
    """What a backend needs of a meeting to set itself up."""

    rank: int
    num_ranks: int

    def gather_text(self, operation: str, text: str, num_bytes: int = 256) -> Sequence[str]:
        """Return every rank's `text`. Collective."""


class Meeting:
    """Exchanges messages of equal size between the ranks of one group over gloo.

    Point to point, so that a rank knows which peer it is missing. Collective constructor.

    Args:
        group: the ranks.
        timeout: seconds to wait for the others in one exchange.
        is_private: whether to make connections of its own even if `group` has gloo. Needed where
            messages go out from another thread than the one that uses `group`: they must not
            mingle with the caller's.

    Attributes:
        num_calls: calls that this rank has begun to agree on.
        last_call: the last one that all ranks took part in, in words.
        posted_at: when each rank came to it, in seconds of its own wall clock.
    """

    num_calls = 0
    posted_at: Sequence[float] = ()
    last_call = "has made no call yet"

    def __init__(
        self, group: dist.ProcessGroup, timeout: float, *, is_private: bool = False
    ) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.timeout = timeout
        is_gloo = has_gloo(group)
        self.gloo: Any = None  # torch has no types for it
        self._waiter, self._is_private = Waiter(), False
        if is_gloo:
            self.gloo = group._get_backend(torch.device("cpu"))
        if is_private or not is_gloo:
            token = secrets.token_hex(16)
            if is_gloo:
                token = self.gather_text("Buffer", token)[0]
            else:
                token = _broadcast(token, group)
            self.gloo = _connect(token, self.rank, self.num_ranks, timeout)
            self._is_private = True

    def interrupt(self) -> None:
        """End what waits for the other ranks, here or in another thread, with an error; local.

        Only where the connections are this meeting's own: none of its messages gets through after.
        """
        if self._is_private:
            cut_off(self.gloo)

    def wait(self, action: Callable[[], None], interrupt: Callable[[], None] | None = None) -> None:
        """Run what blocks on these connections and hear Ctrl-C meanwhile, which interrupts it."""
        self._waiter.run(action, interrupt or self.interrupt)

    def exchange(self, operation: str, message: Tensor, at_most: int | None = None) -> Tensor:
        """Send `message` to every rank; return `[R, *message.shape]`.

        Collective.

        Args:
            operation: for errors.
            message: a contiguous CPU tensor, same shape and dtype on all ranks.
            at_most: where given, messages are vectors whose sizes differ up to this one; the result
                is `[R, at_most]`, and means nothing behind each one's end.

        Raises:
            RuntimeError: naming the ranks that did not answer before the deadline.
        """
        shape = message.shape if at_most is None else (at_most,)
        received = message.new_empty(self.num_ranks, *shape)
        received[self.rank][: len(message)] = message
        peers = [p for p in range(self.num_ranks) if p != self.rank]
        deadline = time.monotonic() + self.timeout
        late: dict[int, str] = {}
        works = []
        for post, tensors in ((self.gloo.recv, received), (self.gloo.send, None)):
            for peer in peers:
                tensor = message if tensors is None else tensors[peer]
                try:
                    works.append((peer, post([tensor], peer, 0)))
                except RuntimeError as error:  # the connection is gone already
                    late[peer] = str(error)
        self.wait(lambda: wait_for_each(works, late, deadline))
        if late:
            raise RuntimeError(
                f"{operation}: rank {self.rank} expected all {self.num_ranks} ranks within "
                f"{self.timeout:g} s{f' in call {self.num_calls}' if self.num_calls else ''}, got "
                f"no answer from {describe_late(late, self.last_call)}; did it stop, or is it in "
                "another call? This Buffer and its process group cannot go on"
            )
        return received

    def agree(
        self, operation: str, call: Call | None, error: str = "", counts: Tensor | None = None
    ) -> Tensor | None:
        """Raise on every rank unless all make the same call and none reports an error.

        Collective; one message between any two ranks.

        Args:
            operation: one of `OPERATIONS`, or another word for the message.
            call: this rank's call; None when it reports an error.
            error: why this rank cannot take part.
            counts: `[C]` int32, C the same on all ranks that make the same call and at most
                `MAX_EXPERTS` + R.

        Returns:
            The counts of all ranks, `[R, C]` int32, or None without.
        """
        self.num_calls += 1
        text = error.encode()[:MAX_ERROR_BYTES]
        numbers = b"" if counts is None else counts.numpy().tobytes()
        header = _HEADER.pack(len(text), time.time_ns(), *(call or (0,) * NUM_CALL_FIELDS))
        message = torch.frombuffer(bytearray(header + text + numbers), dtype=torch.uint8)
        # Sizes are not agreed on yet: what is posted for a message has room for any.
        at_most = _HEADER.size + MAX_ERROR_BYTES + 4 * (MAX_EXPERTS + self.num_ranks)
        answers = self.exchange(operation, message, at_most)
        reports, bodies, posted_at = [], [], []
        for answer in answers:
            num_error_bytes, nanoseconds, *fields = _HEADER.unpack(
                answer[: _HEADER.size].numpy().tobytes()
            )
            body = answer[_HEADER.size :]
            told = body[:num_error_bytes].numpy().tobytes().decode(errors="replace")
            posted_at.append(1e-9 * nanoseconds)
            reports.append(PeerReport(fields, told))
            bodies.append(body[: len(numbers)])
        self.last_call, self.posted_at = f"last call {self.num_calls}, {operation}", posted_at
        check_agreement(operation, reports)
        return None if counts is None else torch.stack(bodies).view(torch.int32)

    def gather_text(self, operation: str, text: str, num_bytes: int = 256) -> Sequence[str]:
        """Return every rank's `text`, of at most `num_bytes` bytes. Collective."""
        data = text.encode()
        if len(data) > num_bytes:
            raise ValueError(f"{operation}: expected at most {num_bytes} bytes, got {len(data)}")
        message = torch.frombuffer(bytearray(data.ljust(num_bytes, b"\0")), dtype=torch.uint8)
        answers = self.exchange(operation, message)
        return [bytes(a.tolist()).rstrip(b"\0").decode() for a in answers]


class PartOfMeeting:
    """Some ranks of a meeting, numbered from 0; all ranks of the whole still take part at once.

    Args:
        whole: the meeting.
        members: ascending ranks of it, this rank among them.
    """

    def __init__(self, whole: Gathering, members: Sequence[int]) -> None:
        self.rank, self.num_ranks = list(members).index(whole.rank), len(members)
        self._whole, self._members = whole, members

    def gather_text(self, operation: str, text: str, num_bytes: int = 256) -> Sequence[str]:
        """Return the `text` of every member. Collective over the whole."""
        texts = self._whole.gather_text(operation, text, num_bytes)
        return [texts[member] for member in self._members]


class SubMeeting(Meeting):
    """Some ranks of a meeting by themselves, over connections of their own.

    Collective constructor, over the whole: every rank names the part that it is in.

    Args:
        whole: the meeting.
        members: ascending ranks of it, this rank among them.
    """

    def __init__(self, whole: Meeting, members: Sequence[int]) -> None:
        token = whole.gather_text("Buffer", secrets.token_hex(16))[members[0]]
        self.rank, self.num_ranks = list(members).index(whole.rank), len(members)
        self.timeout, self._waiter, self._is_private = whole.timeout, Waiter(), True
        self.gloo = _connect(token, self.rank, self.num_ranks, self.timeout)


def check_working(operation: str, why_not: str) -> None:
    """Raise if a Buffer cannot go on, as `why_not` says where it is not empty."""
    if why_not:
        raise RuntimeError(
            f"{operation}: expected a working Buffer, got one that broke down ({why_not}); make a "
            "new Buffer"
        )


def check_process(operation: str, process: int) -> None:
    """Raise in a fork of the process that made a Buffer: its connections are the parent's."""
    if os.getpid() != process:
        raise RuntimeError(
            f"{operation}: expected the process that made the Buffer ({process}), got a fork of it "
            f"({os.getpid()}); make a Buffer in this process"
        )


def keep_numbers(text: str) -> str:
    """Mark the ranks that a text names as ranks of the whole; `renumbered` leaves them."""
    return text.replace("rank ", _WHOLE_RANK)


def renumbered(text: str, members: Sequence[int]) -> str:
    """Return a text that numbers ranks as a part of a meeting does, numbered as the whole does."""
    found = re.sub(r"\brank (\d+)", lambda match: f"rank {members[int(match[1])]}", text)
    return found.replace(_WHOLE_RANK, "rank ")


def describe_late(late: Mapping[int, str], last_call: str) -> str:
    """Return who is late or gone, its last call, and what its connection says."""
    names = ", ".join(str(rank) for rank in sorted(late))
    lines = {rank: text.splitlines()[0][:200] if text else "" for rank, text in late.items()}
    reasons = "; ".join(f"rank {r}: {last_call}; {lines[r]}" for r in sorted(late))
    return f"rank {names} ({reasons})"


def wait_for_each(works: Sequence[tuple[int, Any]], late: dict[int, str], deadline: float) -> None:
    """Wait for works until the deadline; note by rank who did not come, and why, in `late`."""
    for peer, work in works:
        try:
            if peer not in late:
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            late[peer] = str(error)


def _connect(token: str, rank: int, num_ranks: int, timeout: float) -> dist.ProcessGroupGloo:
    # Not dist.new_group: with sub-groups its name depends on how many groups each rank happens to
    # hold, and a registered group lives until somebody remembers to destroy it.
    store = PrefixStore(f"ep_megatron/{token}", _get_default_store())
    group = dist.ProcessGroupGloo(store, rank, num_ranks, timedelta(seconds=timeout))
    # Else a rank that drops its Buffer at once would close connections that others still make.
    group.barrier().wait(timedelta(seconds=timeout))  # type: ignore[attr-defined]
    return group


def _broadcast(token: str, group: dist.ProcessGroup) -> str:
    tokens: list[str] = [token]
    dist.broadcast_object_list(tokens, src=dist.get_global_rank(group, 0), group=group)
    return tokens[0]


def has_gloo(group: dist.ProcessGroup) -> bool:
    """Return whether the group moves CPU tensors by gloo."""
    try:
        return bool(group._get_backend(torch.device("cpu")).name() == "gloo")
    except RuntimeError:
        return False
