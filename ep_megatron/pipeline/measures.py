"""What a timeline comes to, in the same words for simulated and measured runs."""

from collections.abc import Iterable
from dataclasses import dataclass

from ep_megatron.pipeline.trace import Span, Timeline


@dataclass(frozen=True)
class RankMeasure:
    """One rank's share of a step, in microseconds; compute + exposed + idle is the step.

    Attributes:
        rank: pipeline rank.
        compute: when it computes.
        communication: when an exchange runs.
        exposed: when an exchange runs and nothing is computed.
        idle: when neither happens: the bubble.
    """

    rank: int
    compute: float
    communication: float
    exposed: float
    idle: float


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Return the times that spans cover, as disjoint ascending intervals."""
    covered: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if covered and start <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(end, covered[-1][1]))
        elif end > start:
            covered.append((start, end))
    return covered


def without(
    intervals: list[tuple[float, float]], others: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Return the parts of disjoint ascending intervals that the others do not cover."""
    rest = []
    index = 0
    for start, end in intervals:
        while index < len(others) and others[index][1] <= start:
            index += 1
        at, position = start, index
        while position < len(others) and others[position][0] < end:
            if others[position][0] > at:
                rest.append((at, others[position][0]))
            at = max(at, others[position][1])
            position += 1
        if at < end:
            rest.append((at, end))
    return rest


def length(intervals: list[tuple[float, float]]) -> float:
    """Return how long intervals are together."""
    return sum(end - start for start, end in intervals)


def measure(timeline: Timeline) -> tuple[RankMeasure, ...]:
    """Return every rank's share of the step, which lasts from the first start to the last end."""
    step = timeline.end - timeline.start
    measures = []
    for rank in range(timeline.num_ranks):
        spans = timeline.of_rank(rank)
        compute = union(span for span in spans if span.lane == "compute")
        exchange = union(span for span in spans if span.lane == "comm")
        exposed = length(without(exchange, compute))
        busy = length(compute)
        measures.append(RankMeasure(rank, busy, length(exchange), exposed, step - busy - exposed))
    return tuple(measures)
