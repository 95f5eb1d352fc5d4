"""What a Buffer has counted: who came last to its calls, how long that took, which bytes moved."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        operations: by name: `"dispatch"`, `"cached dispatch"`, `"combine"`, and of a Buffer with
            low-latency verbs `"low_latency_dispatch"` and `"low_latency_combine"`. Of those two a
            rank knows only its own waits: there its peer that it waited for longest came last.
        expert_rows: by number of experts of all ranks: rows that fresh dispatches have brought to
            each local expert, without padding; dispatches into `num_worst_tokens` are left out.
    """

    rank: int
    operations: Mapping[str, OperationStatistics]
    expert_rows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

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

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON knows it."""
        operations = {
            name: {**vars(calls), "peers": [vars(peer) for peer in calls.peers]}
            for name, calls in self.operations.items()
        }
        rows = {str(number): list(counts) for number, counts in self.expert_rows.items()}
        return {"rank": self.rank, "operations": operations, "expert_rows": rows}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BufferStatistics":
        """Return what `to_json` has written; KeyError or TypeError for anything else."""
        operations = {
            name: OperationStatistics(
                **{**calls, "peers": tuple(PeerStatistics(**peer) for peer in calls["peers"])}
            )
            for name, calls in value["operations"].items()
        }
        rows = {int(number): tuple(counts) for number, counts in value["expert_rows"].items()}
        return BufferStatistics(int(value["rank"]), operations, rows)

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


@dataclass
class _Counts:
    num_calls: int
    waiting: float
    finishing: float
    peers: list[list[float]]  # by rank: last, behind, waited, bytes


@dataclass
class CallCounts:
    """Counts calls in plain Python, for what has no compiled counts. Thread-safe.

    Attributes:
        rank: of whom.
        num_ranks: R.
    """

    rank: int
    num_ranks: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counts: dict[str, _Counts] = field(default_factory=dict)

    def add(
        self, operation: str, times: Sequence[float], num_bytes: Sequence[int], finishing: float = 0
    ) -> None:
        """Add a call that all ranks came to at `times`, in seconds of clocks that agree."""
        own, last = times[self.rank], max(range(len(times)), key=lambda rank: times[rank])
        behind = times[last] - sorted(times)[(len(times) - 1) // 2]
        waits = [max(0.0, time - own) for time in times]
        self._add(operation, last, behind, waits, num_bytes, (times[last] - own, finishing))

    def add_waits(self, operation: str, waits: Sequence[float], num_bytes: Sequence[int]) -> None:
        """Add a call of which this rank knows only how many seconds it waited for each peer."""
        last = max(range(len(waits)), key=lambda rank: waits[rank])
        self._add(operation, last, waits[last], waits, num_bytes, (sum(waits), 0.0))

    def _add(
        self,
        operation: str,
        last: int,
        behind: float,
        waits: Sequence[float],
        num_bytes: Sequence[int],
        seconds: tuple[float, float],
    ) -> None:
        with self._lock:
            counts = self._counts.get(operation)
            if counts is None:
                peers = [[0, 0.0, 0.0, 0] for _ in range(self.num_ranks)]
                counts = self._counts[operation] = _Counts(0, 0.0, 0.0, peers)
            counts.num_calls += 1
            counts.waiting += seconds[0]
            counts.finishing += seconds[1]
            counts.peers[last][0] += 1
            counts.peers[last][1] += behind
            for peer, wait, moved in zip(counts.peers, waits, num_bytes, strict=True):
                peer[2] += wait
                peer[3] += moved

    def operations(self, names: Sequence[str]) -> dict[str, OperationStatistics]:
        """Return a copy of the counts of these operations."""
        found = {}
        with self._lock:
            for name in names:
                none = _Counts(0, 0.0, 0.0, [[0, 0.0, 0.0, 0]] * self.num_ranks)
                counts = self._counts.get(name, none)
                found[name] = OperationStatistics(
                    counts.num_calls,
                    counts.waiting,
                    counts.finishing,
                    tuple(
                        PeerStatistics(int(last), behind, waited, int(moved))
                        for last, behind, waited, moved in counts.peers
                    ),
                )
        return found


def expert_loads(ranks: Sequence[BufferStatistics]) -> dict[int, list[int]]:
    """Return, by number of experts, the rows that came for each expert of all ranks.

    Args:
        ranks: all ranks of a group, in ascending order.
    """
    loads: dict[int, list[int]] = {}
    for statistics in ranks:
        for number, counts in statistics.expert_rows.items():
            loads.setdefault(number, []).extend(counts)
    return loads


def load_sentences(ranks: Sequence[BufferStatistics]) -> list[str]:
    """Return a sentence per number of experts: how uneven their rows are."""
    found = []
    for number, loads in expert_loads(ranks).items():
        mean, most = sum(loads) / max(len(loads), 1), max(loads, default=0)
        if mean:
            found.append(
                f"expert {loads.index(most)} of {number} got {most / mean:.2f} times the mean of "
                f"{mean:.0f} rows, {loads.count(0)} experts got none"
            )
    return found


def wait_table(ranks: Sequence[BufferStatistics], operation: str) -> str:
    """Return who waited how long for whom in all calls of an operation: a row per waiting rank.

    Args:
        ranks: in ascending order of rank; some may be missing.
        operation: a name of `BufferStatistics.operations`.
    """
    found = [(s.rank, s.operations[operation]) for s in ranks if operation in s.operations]
    if not found or not any(calls.num_calls for _, calls in found):
        return f"{operation}: no calls"
    num_ranks = len(found[0][1].peers)
    lines = [
        f"{operation}: mean milliseconds that a rank (row) waited for a rank (column)",
        "      " + "".join(f"{peer:>9}" for peer in range(num_ranks)),
    ]
    for rank, calls in found:
        cells = (1e3 * p.seconds_waited / max(calls.num_calls, 1) for p in calls.peers)
        lines.append(f"{rank:>6}" + "".join(f"{cell:9.3f}" for cell in cells))
    return "\n".join(lines)
