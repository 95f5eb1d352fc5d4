"""A timeline as readers of the papers know it: a cell per action, a strip of communication."""

from dataclasses import dataclass

from ep_megatron.pipeline.measures import length, union, without
from ep_megatron.pipeline.trace import Span, Timeline


@dataclass(frozen=True, slots=True)
class Half:
    """A forward or a backward in a cell."""

    kind: str
    chunk: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Cell:
    """An action: when its compute ran, from its first node to its last one."""

    start: float
    end: float
    halves: tuple[Half, ...]
    """One, or of a pair forward and backward."""
    busy: float
    """Time in which it computed."""

    def __str__(self) -> str:
        """Return what it is, in words."""
        words = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "of weights"}
        return " beside ".join(
            f"{words[half.kind]} of micro-batch {half.microbatch}, chunk {half.chunk}"
            for half in self.halves
        )


def cells_of(timeline: Timeline, rank: int) -> list[Cell]:
    """Return a rank's actions in order."""
    steps: dict[int, list[Span]] = {}
    for span in timeline.of_rank(rank):
        if span.lane == "compute":
            steps.setdefault(span.step, []).append(span)
    return [_cell(group) for group in steps.values()]


def _part(span: Span) -> tuple[bool, int, int]:
    return (span.kind == "F", span.chunk, span.microbatch)


def _cell(group: list[Span]) -> Cell:
    kinds: dict[tuple[bool, int, int], set[str]] = {}
    for span in group:
        kinds.setdefault(_part(span), set()).add(span.kind)
    halves = []
    for (is_forward, chunk, microbatch), found in sorted(kinds.items(), reverse=True):
        if is_forward:
            kind = "F"
        elif found == {"W"} or found == {"I"}:
            (kind,) = found
        else:
            kind = "B"
        halves.append(Half(kind, chunk, microbatch))
    start, end = min(span.start for span in group), max(span.end for span in group)
    return Cell(start, end, tuple(halves), length(union(group)))


def communication_of(
    timeline: Timeline, rank: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return when a rank's exchanges run behind compute, and when nothing else happens."""
    spans = timeline.of_rank(rank)
    exchange = union(span for span in spans if span.lane == "comm")
    compute = union(span for span in spans if span.lane == "compute")
    exposed = without(exchange, compute)
    return without(exchange, exposed), exposed
