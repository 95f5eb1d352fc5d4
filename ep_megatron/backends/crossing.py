"""Rows between nodes of GPUs: one put and one signal per pair of ranks that has any.

All ranks know from a matrix of counts how many rows go from whom to whom, so every row has its
address at the receiver before it moves. Outbox and inbox have two places, taken in turn: exchange n
writes those of n - 2, which are read everywhere by then. Ranks begin exchange n when all have told
each other so on the host, which each does after its GPU has reported from within call n - 1, behind
all that belongs to exchange n - 2. R ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.device import Device
from ep_megatron.backends.network import Network

_ALIGNMENT = 256
_EPOCH_MASK = 0xFFFFFFFF  # of what an error names
_SIGNAL_BYTES = 8
_NUM_PLACES = 2
RECORD_ALIGNMENT = 16


class Crossing:
    """This rank's end. Collective constructor.

    Args:
        device: this rank's.
        network: between all ranks.
        rank: this rank.
        num_ranks: R.
        timeout: seconds to wait for rows of other nodes.
        num_sms: most blocks of a kernel.
    """

    def __init__(
        self, device: Device, network: Network, rank: int, num_ranks: int, config: tuple[float, int]
    ) -> None:
        self._device, self._network = device, network
        self._rank, self._num_ranks = rank, num_ranks
        self._timeout, self._num_sms = config
        self._signals = network.allocate(_NUM_PLACES * _SIGNAL_BYTES * num_ranks)
        self._error = device.allocate_host(_cuda.ARRIVE_ERROR_BYTES)
        self._epoch, self._place_bytes, self._outbox, self._inbox = 0, 0, 0, 0

    def exchange(self, records: Tensor, num_rows: Sequence[Sequence[int]]) -> Tensor:
        """Send rows and return what others send here. Collective.

        Args:
            records: `[n, B]` uint8, dense, B a multiple of 16: rows by destination, ascending.
            num_rows: `[R][R]` from rank to rank, the same on all ranks.

        Returns:
            `[m, B]` uint8 by source, ascending. Valid until the next exchange but one.
        """
        width, me, ranks = records.shape[1], self._rank, range(self._num_ranks)
        sent = [sum(row) for row in num_rows]
        received = [sum(row[rank] for row in num_rows) for rank in ranks]
        assert len(records) == sent[me]
        assert width % RECORD_ALIGNMENT == 0
        self._make_room(width * max(*sent, *received))
        self._epoch += 1
        place = self._epoch % _NUM_PLACES
        outbox = self._outbox + place * self._place_bytes
        inbox = self._inbox + place * self._place_bytes
        signals = self._signals + place * _SIGNAL_BYTES * self._num_ranks
        memory = self._device.input(records)
        with self._device.on_stream():
            if sent[me]:
                stage = _cuda.StageArgs(
                    rows=memory.address, to_rows=outbox, num_row_bytes=width * sent[me]
                )
                self._device.launch(_cuda.plan_stage(stage, self._num_sms))
            for step in range(1, self._num_ranks):  # begin with the next, not all with rank 0
                peer = (me + step) % self._num_ranks
                if num_rows[me][peer]:
                    self._network.put_signal(
                        peer,
                        outbox + width * sum(num_rows[me][:peer]),
                        inbox + width * sum(num_rows[source][peer] for source in range(me)),
                        width * num_rows[me][peer],
                        signals + _SIGNAL_BYTES * me,
                        self._epoch,
                    )
            if received[me]:
                self._wait(signals, [self._epoch * bool(num_rows[source][me]) for source in ranks])
        if not received[me]:
            return records.new_empty(0, width)
        return self._device.views(inbox, width * received[me], _keep).view(-1, width)

    def check(self, operation: str) -> None:
        """Raise if rows of an earlier exchange did not come in time.

        Raises:
            RuntimeError: naming the ranks.
        """
        epoch, seen = _cuda.read_arrive_error(self._error.read(), self._num_ranks)
        if epoch:
            late = ", ".join(str(rank) for rank, last in enumerate(seen) if last != epoch)
            raise RuntimeError(
                f"{operation}: rank {self._rank} expected the rows of every rank in an earlier "
                f"call within {self._timeout:g} s, got nothing from rank {late}; make a new Buffer"
            )

    def _make_room(self, num_bytes: int) -> None:
        """Make places of at least `num_bytes`; all ranks know that they must. Collective if so."""
        if num_bytes <= self._place_bytes:
            return
        # What was there may still be written or read: it stays until the network is closed.
        wanted = max(num_bytes, 2 * self._place_bytes)
        self._place_bytes = -(-wanted // _ALIGNMENT) * _ALIGNMENT
        self._outbox = self._network.allocate(_NUM_PLACES * self._place_bytes)
        self._inbox = self._network.allocate(_NUM_PLACES * self._place_bytes)

    def _wait(self, signals: int, expected: Sequence[int]) -> None:
        args = _cuda.CrossWaitArgs(
            signals=signals,
            expected=list(expected),
            num_ranks=self._num_ranks,
            epoch=self._epoch & _EPOCH_MASK or 1,
            timeout_ns=int(self._timeout * 1e9),
            error=self._error.device_address,
        )
        self._device.launch(_cuda.plan_cross_wait(args))


def _keep() -> None:
    """The inbox is not the tensor's to free."""


def join(parts: Sequence[Tensor | None]) -> tuple[Tensor, list[int]]:
    """Lay rows of several tensors side by side.

    Args:
        parts: `[n, ...]` of any dtype, None where a part is absent.

    Returns:
        records: `[n, B]` uint8, B a multiple of 16.
        widths: bytes of each part in a record.
    """
    there = [part.contiguous().flatten(1).view(torch.uint8) for part in parts if part is not None]
    num_rows, used = len(there[0]), sum(part.shape[1] for part in there)
    padding = there[0].new_zeros(num_rows, -used % RECORD_ALIGNMENT)
    widths = iter([part.shape[1] for part in there])
    return torch.cat([*there, padding], 1), [0 if p is None else next(widths) for p in parts]


def split(records: Tensor, parts: Sequence[Tensor | None], widths: Sequence[int]) -> list[Tensor]:
    """Take records apart: dense tensors of the dtypes and columns of `parts`, None left out."""
    found, first = [], 0
    for part, width in zip(parts, widths, strict=True):
        if part is not None:
            columns = records[:, first : first + width].clone(memory_format=torch.contiguous_format)
            found.append(columns.view(part.dtype).view(len(records), *part.shape[1:]))
        first += width
    return found
