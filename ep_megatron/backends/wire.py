"""Messages between ranks of different hosts, point to point, over gloo.

Every receive is posted before a send, and each direction between two ranks has a connection of its
own: gloo answers "ready to receive" on the connection that carries rows, so that on a shared one it
queues behind them and a full-duplex link runs at half rate.
"""

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.backends.base import (
    MAX_EXPERTS,
    NUM_CALL_FIELDS,
    OPERATIONS,
    Call,
    PeerReport,
    check_agreement,
)
from ep_megatron.backends.meeting import MAX_ERROR_BYTES, Gathering, describe_late
from ep_megatron.backends.waiter import Waiter, cut_off
from ep_megatron.statistics import BufferStatistics, CallCounts

# Kind, bytes that follow, number of the call, nanoseconds of the wall clock; then the call.
_HEADER = struct.Struct(f"<4q{NUM_CALL_FIELDS}q")
_STATUS_BYTES = 512
# Who waits for another host gives that host's ranks time to say which of them is late.
GRACE_SECONDS = 2.0
_FAREWELL_SECONDS = 0.5  # that last words may take on their way


class Message(IntEnum):
    """What a message is; its tag, too."""

    MEETING = 0
    STATUS = 1
    ROWS = 2
    BESIDE = 3
    COUNTS = 4


class Status(IntEnum):
    """What a rank says before the rows it sends."""

    FINE = 0
    REFUSED = 1  # rows follow, but mean nothing: this call fails, the next goes on
    BROKEN = 2  # none follow


class _Kind(IntEnum):
    CALL = 0
    ERROR = 1  # bad arguments: nobody takes part, the next call goes on
    BROKEN = 2  # this rank cannot go on at all


class LateError(RuntimeError):
    """Ranks stopped or did not come in time; the text names them."""


class Transfer(NamedTuple):
    """One message to or from `peer`; `tensor` is contiguous."""

    peer: int
    kind: Message
    tensor: Tensor


class Wire:
    """This rank's connections to all others. Collective constructor.

    Private to its owner: messages of the caller's own group never meet ours.

    Args:
        gathering: the ranks; used by the constructor alone.
        timeout: seconds to wait for the others in one exchange.
    """

    def __init__(self, gathering: Gathering, timeout: float) -> None:
        self.rank, self.num_ranks, self.timeout = gathering.rank, gathering.num_ranks, timeout
        nonce = gathering.gather_text("Buffer", os.urandom(16).hex())[0]
        # Of our own making, not `new_group`: two of the same ranks, which nobody else can name.
        c10d = dist.distributed_c10d
        store = c10d._get_default_store()
        patience = timedelta(seconds=timeout + 2 * GRACE_SECONDS)
        # Up to higher ranks, down to lower ones.
        self._groups: list[Any] = [
            c10d.ProcessGroupGloo(
                c10d.PrefixStore(f"ep_megatron/{nonce}/{direction}", store),
                self.rank,
                self.num_ranks,
                patience,
            )
            for direction in ("up", "down")
        ]
        self._waiter, self._last_call = Waiter(), "has not joined yet"
        self._in_flight: list[Any] = []
        self._counts = CallCounts(self.rank, self.num_ranks)
        self._posted_at: list[float] = []
        self._num_bytes = [0] * self.num_ranks, [0] * self.num_ranks  # sent, received
        self._num_calls = 0
        self._capacity = _HEADER.size + max(MAX_ERROR_BYTES, 4 * (MAX_EXPERTS + 2 * self.num_ranks))
        # Nobody leaves, and perhaps drops its connections, before all are connected.
        self.agree("Buffer", Call(operation=0, dtype=0, hidden=0))
        self._num_calls, self._last_call = 0, "has made no call yet"

    def agree(
        self,
        operation: str,
        call: Call | None,
        counts: Sequence[Tensor] | None = None,
        error: str = "",
    ) -> Tensor | None:
        """Raise on every rank unless all make the same call and none reports an error.

        Collective; one message between any two ranks.

        Args:
            operation: for the message.
            call: this rank's call; None when it reports an error.
            counts: one for each rank, `[C]` int32; C is what all ranks that make the same call tell
                that rank.
            error: why this rank cannot take part.

        Returns:
            What all ranks tell this one, `[R, C]`, or None without.

        Raises:
            ValueError: on every rank.
            RuntimeError: naming the ranks that did not answer, or have said that they cannot go on.
        """
        self._num_calls += 1
        kind, body = _Kind.CALL, b""
        if call is None:
            kind, body = _Kind.ERROR, error.encode()[:MAX_ERROR_BYTES]
        fields = call or (0,) * NUM_CALL_FIELDS
        if counts is None or call is None:
            messages = [self._pack(kind, fields, body)] * self.num_ranks
        else:
            messages = [self._pack(kind, fields, one.numpy().tobytes()) for one in counts]
        message = messages[self.rank]
        # A message may be shorter than what is posted for it: sizes are not agreed on yet.
        answers = torch.empty(self.num_ranks, self._capacity, dtype=torch.uint8)
        answers[self.rank, : len(message)] = message
        peers = [p for p in range(self.num_ranks) if p != self.rank]
        self.exchange(
            operation,
            [Transfer(peer, Message.MEETING, answers[peer]) for peer in peers],
            [Transfer(peer, Message.MEETING, messages[peer]) for peer in peers],
            self.timeout,
        )
        reports, bodies, posted_at = [], [], []
        for rank, answer in enumerate(answers):
            header = _HEADER.unpack(answer[: _HEADER.size].numpy().tobytes())
            body = answer[_HEADER.size : _HEADER.size + header[1]].numpy().tobytes()
            text = "" if header[0] == _Kind.CALL else body.decode(errors="replace")
            if header[0] == _Kind.BROKEN:
                raise RuntimeError(
                    f"{operation}: expected all {self.num_ranks} ranks in call {self._num_calls}, "
                    f"got: rank {rank} gave up ({text}); make a new Buffer once all ranks are back"
                )
            posted_at.append(1e-9 * header[3])
            reports.append(PeerReport(header[4:], text))
            bodies.append(body)
        self._last_call = f"last call {self._num_calls}, {operation}"
        self._posted_at = posted_at
        for moved in self._num_bytes:
            moved[:] = [0] * self.num_ranks
        check_agreement(operation, reports)
        if counts is None:
            return None
        everyone = [torch.frombuffer(bytearray(body), dtype=torch.int32) for body in bodies]
        return torch.stack(everyone)

    def exchange(
        self,
        operation: str,
        receives: Sequence[Transfer],
        sends: Iterable[Transfer],
        timeout: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[int, str]:
        """Send and receive; return when all has come and gone.

        `sends` may be lazy: what it has made is under way while it makes the next. `meanwhile` runs
        once all is posted.

        Returns:
            Who has refused, by status, and why.

        Raises:
            LateError: naming the ranks that stopped or did not come in time.
        """
        limit = self.timeout + GRACE_SECONDS if timeout is None else timeout
        deadline = time.monotonic() + limit
        works: list[tuple[Transfer, Any, bool]] = []
        late: dict[int, str] = {}
        refusals: dict[int, str] = {}
        for is_receive, transfers in ((True, receives), (False, sends)):
            for transfer in transfers:
                try:
                    works.append((transfer, self._post(is_receive, transfer), is_receive))
                except RuntimeError as error:  # the connection is gone already
                    late[transfer.peer] = str(error)
                    continue
                if transfer.kind in (Message.ROWS, Message.BESIDE):
                    self._num_bytes[is_receive][transfer.peer] += transfer.tensor.nbytes
        meanwhile()

        def wait() -> None:
            for transfer, work, is_receive in works:
                if transfer.peer in late:
                    continue  # nothing more comes from it
                left = max(deadline - time.monotonic(), 0.001)
                try:
                    work.wait(timedelta(seconds=left))
                except RuntimeError as error:
                    late[transfer.peer] = str(error)
                    if time.monotonic() < deadline:
                        return  # a connection broke; a wait cut short would break the others too
                    continue
                if is_receive and transfer.kind == Message.STATUS:
                    status, reason = _unpack_status(transfer.tensor)
                    if status == Status.BROKEN:
                        late[transfer.peer] = reason
                        return
                    if status == Status.REFUSED:
                        refusals[transfer.peer] = reason

        if works:
            self._waiter.run(wait, self.interrupt)
        if late:
            raise LateError(
                f"{operation}: rank {self.rank} expected all its peers within {limit:g} s in call "
                f"{self._num_calls}, got no answer from {describe_late(late, self._last_call)}; "
                "did it stop, or is it in another call? make a new Buffer once all ranks are back"
            )
        return refusals

    def count(self, operation: str) -> None:
        """Count the call that was agreed on last, with the rows that have crossed hosts in it."""
        self._counts.add(operation, self._posted_at, self._num_bytes[operation == "combine"])

    def statistics(self) -> BufferStatistics:
        """Return the counts so far. Local, from any thread."""
        return BufferStatistics(self.rank, self._counts.operations(OPERATIONS))

    def expected_status(self, peer: int) -> Transfer:
        """Return the receive of what `peer` says before its rows."""
        return Transfer(peer, Message.STATUS, torch.empty(_STATUS_BYTES, dtype=torch.uint8))

    def status(self, peer: int, status: Status, reason: str = "") -> Transfer:
        """Return the message that says whether this rank's rows follow, or why not."""
        data = bytes([status]) + reason.encode()[: _STATUS_BYTES - 1]
        data = data.ljust(_STATUS_BYTES, b"\0")
        return Transfer(peer, Message.STATUS, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def send(self, transfers: Iterable[Transfer]) -> None:
        """Send without waiting, as far as the connections still work."""
        for transfer in transfers:
            try:
                # Kept: gloo reads the tensor later.
                self._in_flight.append((self._post(False, transfer), transfer))
            except RuntimeError:
                continue  # who cannot be reached hears of it by that

    def farewell(self, reason: str) -> None:
        """Say in place of the next call why this rank makes none."""
        body = reason.encode()[:MAX_ERROR_BYTES]
        message = self._pack(_Kind.BROKEN, (0,) * NUM_CALL_FIELDS, body)
        peers = [p for p in range(self.num_ranks) if p != self.rank]
        self.send(Transfer(peer, Message.MEETING, message) for peer in peers)

    def interrupt(self, reason: str = "it was interrupted") -> None:
        """End what waits for other ranks, in any thread, with an error. Local.

        The others are told first; no message gets through after.
        """
        self.farewell(reason)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for work, _ in self._in_flight:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        for group in self._groups:
            cut_off(group)

    def close(self) -> None:
        """Drop the connections."""
        self._groups.clear()
        self._in_flight.clear()

    def _pack(self, kind: _Kind, call: Sequence[int], body: bytes) -> Tensor:
        header = _HEADER.pack(kind, len(body), self._num_calls, time.time_ns(), *call)
        return torch.frombuffer(bytearray(header + body), dtype=torch.uint8)

    def _post(self, is_receive: bool, transfer: Transfer) -> Any:
        peer, kind, tensor = transfer
        group = self._groups[int((peer > self.rank) == is_receive)]
        # As bytes: gloo does not know every dtype.
        flat = tensor.view(torch.uint8).flatten()
        post = group.recv if is_receive else group.send
        return post([flat], peer, int(kind))


def _unpack_status(message: Tensor) -> tuple[int, str]:
    data = message.numpy().tobytes()
    return data[0], data[1:].rstrip(b"\0").decode(errors="replace")
