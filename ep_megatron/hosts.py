"""Which ranks share a host, and who stands for whom on the others."""

from collections.abc import Sequence
from dataclasses import dataclass

# Ranks and experts from which on ranks tell each other only what concerns the other's host.
MANY_COUNTS = 1024


@dataclass(frozen=True)
class Hosts:
    """The ranks of a group by host; hosts are numbered in the order of their lowest rank.

    Attributes:
        members: for each host, its ranks in ascending order.
        host_of: for each rank, its host.
        index_of: for each rank, its place among the ranks of its host.
    """

    members: tuple[tuple[int, ...], ...]
    host_of: tuple[int, ...]
    index_of: tuple[int, ...]

    @staticmethod
    def from_ids(ids: Sequence[str]) -> "Hosts":
        """Group ranks by equal ids, one per rank."""
        names = list(dict.fromkeys(ids))
        members = tuple(
            tuple(rank for rank, name in enumerate(ids) if name == host) for host in names
        )
        return Hosts(
            members,
            tuple(names.index(name) for name in ids),
            tuple(members[names.index(name)].index(rank) for rank, name in enumerate(ids)),
        )

    @property
    def num_hosts(self) -> int:
        """How many hosts there are."""
        return len(self.members)

    def gateway(self, rank: int, host: int) -> int:
        """Return the rank of `host` that takes what `rank` sends there: of the same index.

        Hosts may have different numbers of ranks: the index counts modulo the ranks of `host`.
        """
        members = self.members[host]
        return members[self.index_of[rank] % len(members)]

    def served_by(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of other hosts whose gateway on this host is `rank`, ascending."""
        host = self.host_of[rank]
        return tuple(
            source
            for source in range(len(self.host_of))
            if self.host_of[source] != host and self.gateway(source, host) == rank
        )
