"""Rows between nodes of GPUs: a few puts per pair of ranks, each with a signal of its own.

All ranks know how many tokens go from whom to whom, so everything has its address at the receiver
before it moves: for each pair a block with the rows, and behind them what travels beside. Rows
cross in chunks, so that the first can be put where they belong while later ones are on their way;
what is beside them crosses in one piece.

Ranks begin an exchange on their streams when all have posted its call, each behind all that belongs
to the exchange before: so outbox, inbox and signals are free then. R ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ep_megatron import _cuda
from ep_megatron.backends.device import Device
from ep_megatron.backends.device_arena import align
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.network import Network
from ep_megatron.config import MAX_CHUNKS

_EPOCH_MASK = 0xFFFFFFFF  # of what an error names
_SIGNAL_BYTES = 8
_BESIDE = MAX_CHUNKS  # number of the put that carries what is beside the rows
_NUM_PUTS = MAX_CHUNKS + 1
PART_ALIGNMENT = 64


@dataclass(frozen=True)
class Record:
    """What crosses of a token.

    Attributes:
        row: bytes of its row, a multiple of 16.
        beside: bytes of each part that travels beside it; 0 where one is absent.
    """

    row: int
    beside: tuple[int, ...]

    def starts(self, num_rows: int) -> list[int]:
        """Return where the parts of so many tokens start in a block, rows first, and its end."""
        sizes = [align(num_rows * part, PART_ALIGNMENT) for part in (self.row, *self.beside)]
        return list(accumulate(sizes, initial=0))

    def room(self, num_rows: int, num_blocks: int) -> int:
        """Return bytes in which so many blocks of that many tokens fit, however these lie."""
        slack = PART_ALIGNMENT * (1 + len(self.beside))
        return align(num_rows * (self.row + sum(self.beside)) + num_blocks * slack)


@dataclass(frozen=True)
class Traffic:
    """How many rows go from whom to whom in an exchange, as one rank sees it.

    Attributes:
        sent: rows to each rank, ascending, that gets any.
        came: rows from each rank, ascending, that sends any.
        before: for each rank that gets rows from this one, those that each lower rank sends it.
        most: rows that any rank sends, or receives.
    """

    sent: Mapping[int, int]
    came: Mapping[int, int]
    before: Mapping[int, Sequence[int]]
    most: int

    @staticmethod
    def of(rank: int, num_rows: Mapping[tuple[int, int], int]) -> "Traffic":
        """Look from `rank` at the rows, above 0, that go from one rank to another."""
        by_sender: dict[int, int] = {}
        by_receiver: dict[int, int] = {}
        before: dict[int, list[int]] = {}
        for (source, target), count in sorted(num_rows.items()):
            by_sender[source] = by_sender.get(source, 0) + count
            by_receiver[target] = by_receiver.get(target, 0) + count
            if source < rank and (rank, target) in num_rows:
                before.setdefault(target, []).append(count)
        return Traffic(
            {target: n for (source, target), n in sorted(num_rows.items()) if source == rank},
            {source: n for (source, target), n in sorted(num_rows.items()) if target == rank},
            before,
            max([*by_sender.values(), *by_receiver.values()], default=0),
        )


@dataclass(frozen=True)
class Pile:
    """What goes to one rank, or has come from it.

    Attributes:
        num_rows: above 0.
        starts: addresses of rows and parts beside, as in `Record.starts`.
        chunks: the rows of each put.
    """

    num_rows: int
    starts: Sequence[int]
    chunks: Sequence[range]


@dataclass(frozen=True)
class Exchange:
    """One exchange of one rank: its methods launch, inside `Device.on_stream`.

    Attributes:
        record: what crosses of each token.
        outbox: by receiver: to be filled before it is put.
        inbox: by source: there when it was waited for. Both are valid until the next.
    """

    crossing: "Crossing"
    epoch: int
    record: Record
    outbox: Mapping[int, Pile]
    inbox: Mapping[int, Pile]
    targets: Mapping[int, int]  # by receiver: where this rank's block is there

    @property
    def num_chunks(self) -> int:
        """Most chunks that come from one rank."""
        return max((len(pile.chunks) for pile in self.inbox.values()), default=0)

    def put_rows(self, receiver: int, chunk: int) -> None:
        """Send a chunk of the rows for a rank."""
        pile, row = self.outbox[receiver], self.record.row
        rows = pile.chunks[chunk]
        self._put(receiver, row * rows.start, row * len(rows), chunk)

    def put_all_rows(self) -> None:
        """Send all rows, the first chunk to everyone first."""
        for chunk in range(MAX_CHUNKS):
            for receiver, pile in self._from_the_next():
                if chunk < len(pile.chunks):
                    self.put_rows(receiver, chunk)

    def put_beside(self) -> None:
        """Send what goes beside the rows."""
        for receiver, pile in self._from_the_next():
            begin, end = (pile.starts[index] - pile.starts[0] for index in (1, -1))
            if begin != end:
                self._put(receiver, begin, end - begin, _BESIDE)

    def wait_for_rows(self, chunk: int) -> None:
        """Let later kernels come after this chunk of all ranks."""
        self._wait([rank for rank, pile in self.inbox.items() if chunk < len(pile.chunks)], chunk)

    def wait_for_beside(self) -> None:
        """Let later kernels come after what is beside all ranks' rows."""
        self._wait(list(self.inbox) if any(self.record.beside) else [], _BESIDE)

    def wait_for_all(self) -> None:
        """Let later kernels come after everything of this exchange."""
        self.wait_for_beside()
        for chunk in range(self.num_chunks):
            self.wait_for_rows(chunk)

    def _from_the_next(self) -> list[tuple[int, Pile]]:
        """Return the receivers from the next rank on: else all would send to rank 0 first."""
        return sorted(self.outbox.items(), key=lambda item: item[0] <= self.crossing.rank)

    def _put(self, receiver: int, offset: int, num_bytes: int, number: int) -> None:
        crossing = self.crossing
        crossing.network.put_signal(
            receiver,
            self.outbox[receiver].starts[0] + offset,
            self.targets[receiver] + offset,
            num_bytes,
            crossing.signals(number) + _SIGNAL_BYTES * crossing.rank,
            self.epoch,
        )

    def _wait(self, sources: Sequence[int], number: int) -> None:
        if sources:
            self.crossing.wait(self.epoch, number, sources)


class Crossing:
    """This rank's end. Collective constructor.

    Args:
        device: this rank's.
        network: between all ranks.
        meeting: of all ranks, for what is rare: growing.
        timeout: seconds to wait for rows of other nodes.
        chunk_bytes: of rows that cross in one put, at the least; there are at most `MAX_CHUNKS`.

    Attributes:
        error: address of what `check` reads, an `ArriveError`.
    """

    def __init__(
        self,
        device: Device,
        network: Network,
        meeting: Meeting,
        timeout: float,
        chunk_bytes: int,
    ) -> None:
        self.network, self._meeting = network, meeting
        self.rank, self._num_ranks = meeting.rank, meeting.num_ranks
        self._device, self._timeout, self._chunk_bytes = device, timeout, chunk_bytes
        self._signals = network.allocate(_NUM_PUTS * _SIGNAL_BYTES * self._num_ranks)
        self._error = device.allocate_host(_cuda.ARRIVE_ERROR_BYTES)
        self.error = self._error.device_address
        self._epoch, self._room_bytes, self._outbox, self._inbox = 0, 0, 0, 0

    def begin(self, operation: str, record: Record, traffic: Traffic) -> Exchange:
        """Begin an exchange, launched behind a meeting of all ranks. Collective.

        All ranks give the same record and the same rows.

        Raises:
            RuntimeError: if memory does not suffice, or ranks that should find more did not come.
        """
        self._make_room(operation, record.room(traffic.most, self._num_ranks))
        self._epoch += 1
        return Exchange(
            crossing=self,
            epoch=self._epoch,
            record=record,
            outbox=self._piles(record, traffic.sent, self._outbox),
            inbox=self._piles(record, traffic.came, self._inbox),
            targets={
                peer: self._inbox
                + sum(record.starts(num_rows)[-1] for num_rows in traffic.before.get(peer, ()))
                for peer in traffic.sent
            },
        )

    def signals(self, number: int) -> int:
        """Return where the signals, by source, of a put of an exchange are."""
        return self._signals + number * _SIGNAL_BYTES * self._num_ranks

    def wait(self, epoch: int, number: int, sources: Sequence[int]) -> None:
        """Launch what waits for one put from each of some ranks."""
        expected = [epoch if rank in sources else 0 for rank in range(self._num_ranks)]
        args = _cuda.CrossWaitArgs(
            signals=self.signals(number),
            expected=expected,
            num_ranks=self._num_ranks,
            epoch=epoch & _EPOCH_MASK or 1,
            timeout_ns=int(self._timeout * 1e9),
            error=self.error,
        )
        self._device.launch(_cuda.plan_cross_wait(args))

    def check(self, operation: str) -> None:
        """Raise if rows of an earlier exchange did not come in time.

        Raises:
            RuntimeError: naming the ranks.
        """
        epoch, seen = _cuda.read_arrive_error(self._error.read(), self._num_ranks)
        if epoch:
            late = ", ".join(str(rank) for rank, last in enumerate(seen) if last != epoch)
            raise RuntimeError(
                f"{operation}: rank {self.rank} expected the rows of every rank in an earlier "
                f"call within {self._timeout:g} s, got nothing from rank {late}; make a new Buffer"
            )

    def _piles(self, record: Record, num_rows: Mapping[int, int], at: int) -> dict[int, Pile]:
        piles = {}
        for rank, count in num_rows.items():
            starts = [at + start for start in record.starts(count)]
            # The receiver finds the same number.
            each = max(-(-count // MAX_CHUNKS), -(-self._chunk_bytes // record.row), 1)
            chunks = [range(count)[first : first + each] for first in range(0, count, each)]
            piles[rank] = Pile(count, starts, chunks)
            at = starts[-1]
        return piles

    def _make_room(self, operation: str, num_bytes: int) -> None:
        """Make room for `num_bytes`; all ranks know that they must. Collective if so."""
        if num_bytes <= self._room_bytes:
            return
        # The network waits for all ranks without a deadline: one that has failed is found out here.
        self._meeting.gather_text(operation, "")
        room_bytes = align(max(num_bytes, 2 * self._room_bytes))
        # What was there may still be written or read: it stays until the process ends.
        self._outbox = self.network.allocate(2 * room_bytes)
        self._room_bytes, self._inbox = room_bytes, self._outbox + room_bytes
