"""Rows between nodes of GPUs in calls that no host waits for: memory of fixed size, and puts by a
kernel, of as much as the device knows that there is.

The memory is an outbox and an inbox, each with an area per part of what crosses, of as many places.
Which places are whose, notify finds (CrossPlan in csrc/cuda/protocol.h). A call begins behind a
meeting of all ranks, and all that were put into it are waited for in it: so memory and signals are
free then. R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ep_megatron import _cuda
from ep_megatron.backends.device import Device, Launch
from ep_megatron.backends.device_arena import align
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.network import Network

ROWS, SCALES, WEIGHTS, ROUTES = 0, 1, 2, _cuda.CROSS_ROUTES  # parts; routes and ids are planes
_SIGNAL_BYTES = 8


@dataclass(frozen=True)
class Areas:
    """What crosses in a call, the same on all ranks.

    Attributes:
        num_places: of each area, a multiple of 16.
        place_bytes: of each part: rows, scales, weights, and the planes of routes and expert ids;
            those behind the last are absent, as one of 0 is.
    """

    num_places: int
    place_bytes: Sequence[int]

    @staticmethod
    def places(capacity: int, num_ranks: int) -> int:
        """Return in how many places so many tokens fit, however many each rank has of them."""
        return align(capacity, _cuda.PILE_ALIGNMENT) + _cuda.PILE_ALIGNMENT * num_ranks

    @property
    def starts(self) -> list[int]:
        """Where the areas start, and the end."""
        sizes = [self.num_places * part for part in self.place_bytes]
        sizes += [0] * (_cuda.NUM_CROSS_PARTS - len(sizes))
        return list(accumulate(sizes, initial=0))

    @property
    def present(self) -> list[int]:
        """The parts that are not absent."""
        return [number for number, size in enumerate(self.place_bytes) if size]


class CrossingWithin:
    """This rank's end. Collective constructor.

    Args:
        device: this rank's.
        network: between all ranks.
        meeting: of all ranks, for what is rare: growing.
        timeout: seconds to wait for rows of other nodes.
        error: address of an `ArriveError`.
        state: address of what notify leaves of meetings of all ranks.
    """

    def __init__(
        self,
        device: Device,
        network: Network,
        meeting: Meeting,
        timeout: float,
        error: int,
        state: int,
    ) -> None:
        self._device, self._network, self._meeting = device, network, meeting
        self._rank, self.num_ranks, self._timeout = meeting.rank, meeting.num_ranks, timeout
        self._error, self._state = error, state
        self._signals = network.allocate(_cuda.NUM_CROSS_PARTS * _SIGNAL_BYTES * self.num_ranks)
        self._room_bytes, self._outbox, self._inbox = 0, 0, 0

    def has_room(self, areas: Areas) -> bool:
        """Return whether areas fit, which is so on all ranks alike."""
        return areas.starts[-1] <= self._room_bytes

    def make_room(self, operation: str, areas: Areas) -> None:
        """Make room for areas. Collective where there is none.

        What was there before stays, for graphs and what is on its way, until the process ends.

        Raises:
            RuntimeError: if memory does not suffice, or ranks that should find more did not come.
        """
        if self.has_room(areas):
            return
        # The network waits for all ranks without a deadline: one that has failed is found out here.
        self._meeting.gather_text(operation, "")
        room_bytes = align(max(areas.starts[-1], 2 * self._room_bytes))
        self._outbox = self._network.allocate(2 * room_bytes)
        self._room_bytes, self._inbox = room_bytes, self._outbox + room_bytes

    def outbox(self, areas: Areas) -> list[int]:
        """Return where this rank lays out each part."""
        return [self._outbox + start for start in areas.starts[:-1]]

    def inbox(self, areas: Areas) -> list[int]:
        """Return where each part comes to."""
        return [self._inbox + start for start in areas.starts[:-1]]

    def put(self, areas: Areas, piles: int) -> None:
        """Launch what brings piles of the outbox, by receiver, to their ranks."""
        args = _cuda.CrossPutArgs(
            state=self._state,
            piles=piles,
            outbox=self._outbox,
            inbox=self._inbox,
            signals=self._signals,
            starts=areas.starts[:-1],
            place_bytes=list(areas.place_bytes),
            rank=self._rank,
            num_ranks=self.num_ranks,
        )
        launch: Launch = _cuda.plan_cross_put(args)
        self._network.launch(launch)

    def wait(self, parts: Sequence[int], piles: int, source: int = -1) -> None:
        """Let later kernels come after parts of the piles of a source, or of all."""
        args = _cuda.CrossAwaitArgs(
            state=self._state,
            piles=piles,
            signals=self._signals,
            parts=sum(1 << part for part in parts),
            source=source,
            num_ranks=self.num_ranks,
            timeout_ns=int(self._timeout * 1e9),
            error=self._error,
        )
        self._device.launch(_cuda.plan_cross_await(args))
