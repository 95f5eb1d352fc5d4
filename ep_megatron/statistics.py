"""What a Buffer has counted: who came last to its calls, how long that took, which bytes moved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of its even share of the calls a rank must have come last to this many times to be called slow.
_SLOW = 1.5


@dataclass(frozen=True)
class PeerStatistics:
    """One peer, over all calls of one operation.

    Attributes:
        num_last: calls to which it came last; the same number on all ranks.
        seconds_behind: in those, how long after the median rank, summed; likewise.
        seconds_waited: from this rank's coming to the peer's, where that was later, summed.
        num_bytes: of rows, scales, weights and expert ids that this rank sent to it (dispatch) or
            read from it (combine); this rank itself included.
    """

    num_last: int
    seconds_behind: float
    seconds_waited: float
    num_bytes: int


@dataclass(frozen=True)
class OperationStatistics:
    """All finished calls of one operation.

    Attributes:
        num_calls: calls that ended without an error.
        seconds_waiting: this rank waited for the last rank to come, summed.
        seconds_finishing: it waited for the last rank to finish, after itself, summed.
        peers: by rank.
    """

    num_calls: int
    seconds_waiting: float
    seconds_finishing: float
    peers: tuple[PeerStatistics, ...]


@dataclass(frozen=True)
class BufferStatistics:
    """Counts of one rank since its Buffer was made; a value.

    Attributes:
        rank: whose counts these are.
        operations: by name: `"dispatch"`, `"cached dispatch"`, `"combine"`.
    """

    rank: int
    operations: Mapping[str, OperationStatistics]

    @staticmethod
    def of(rank: int, counted: Mapping[str, Any]) -> "BufferStatistics":
        """Copy what compiled code has counted (`_cpu.CallStatistics`), by operation."""
        operations = {}
        for name, calls in counted.items():
            peers = (
                PeerStatistics(p.num_last, p.seconds_behind, p.seconds_waited, p.num_bytes)
                for p in calls.peers
            )
            operations[name] = OperationStatistics(
                calls.num_calls, calls.seconds_waiting, calls.seconds_finishing, tuple(peers)
            )
        return BufferStatistics(rank, operations)

    def slow_ranks(self) -> list[str]:
        """Return a sentence for each rank that came last much more often than others, worst first.

        The sentences are the same on all ranks.
        """
        found = []
        for name, calls in self.operations.items():
            for rank, peer in enumerate(calls.peers):
                if peer.num_last * len(calls.peers) < _SLOW * calls.num_calls or not peer.num_last:
                    continue
                behind = peer.seconds_behind / peer.num_last
                text = (
                    f"rank {rank} came last to {peer.num_last / calls.num_calls:.0%} of "
                    f"{calls.num_calls} calls of {name}, "
                    f"{1e3 * behind:.3g} ms after the median rank"
                )
                found.append((peer.seconds_behind, text))
        return [text for _, text in sorted(found, reverse=True)]
