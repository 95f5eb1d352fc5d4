"""From a measured run to costs: what each node took, so that the run can be simulated."""

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean

from ep_megatron.pipeline.action import Kind, Schedule, schedule_from_json
from ep_megatron.pipeline.check import check
from ep_megatron.pipeline.costs import Costs, Exchange, Piece, StageCosts
from ep_megatron.pipeline.measures import union, without
from ep_megatron.pipeline.program import Options
from ep_megatron.pipeline.trace import Span, Timeline

_WAITED = 0.5
"""Share of an exchange's span, at its end, without compute: from here on the end was seen."""

_Node = tuple[str, int | None]
"""Name and layer."""


@dataclass(frozen=True)
class Measured:
    """What a trace says about the run: its schedule, how ranks ran it, and the nodes' times."""

    schedule: Schedule
    options: Options
    costs: Costs


def calibrate(timeline: Timeline) -> Measured:
    """Read schedule, options and node times from a measured run.

    A node takes the mean over the run's micro-batches of its chunk on its rank, so that all work is
    accounted for. Of exchanges those count that the rank mostly waited for: a host that computes
    learns only when it asks that an exchange has ended, so the others took at most what was seen,
    and the shortest stands for them where the rank waited for none. An exchange's time contains the
    wait for peers, since a trace cannot tell it apart. A message takes what the quickest took:
    slower ones waited for their sender or receiver. Compute spans of kind B count as inputs' half;
    where a run has no spans of kind W, the weights' half is in it.

    Args:
        timeline: whose description `program.describe` has made.

    Raises:
        ValueError: names what the trace lacks.
    """
    schedule = schedule_from_json(timeline.description)
    check(schedule)
    stages: list[StageCosts] = []
    for stage in range(schedule.num_stages):
        places = [schedule.place_of(stage, d) for d in range(schedule.num_directions)]
        spans = [
            span
            for span in timeline.spans
            if (span.rank, span.chunk) in places and span.lane != "p2p"
        ]
        computing = {
            rank: union(s for s in timeline.of_rank(rank) if s.lane == "compute")
            for rank, _ in places
        }
        stages.append(_stage(stage, spans, computing))
    flights = [span.end - span.start for span in timeline.spans if span.lane == "p2p"]
    given = timeline.description.get("options", {})
    try:
        options = Options(**given)
    except TypeError as error:
        raise ValueError(
            f"calibrate: expected options of the trace to be those of a run, got {given}; {error}"
        ) from None
    return Measured(schedule, options, Costs(tuple(stages), min(flights, default=0.0)))


def name_halves(timeline: Timeline, schedule: Schedule) -> Timeline:
    """Return a run's timeline with the backward spans of I actions told apart from those of B."""
    spans = tuple(
        replace(span, kind="I")
        if span.kind == "B" and schedule.actions[span.rank][span.step].kind is Kind.I
        else span
        for span in timeline.spans
    )
    return replace(timeline, spans=spans)


def _stage(
    stage: int, spans: list[Span], computing: dict[int, list[tuple[float, float]]]
) -> StageCosts:
    times: dict[tuple[_Node, str], list[float]] = defaultdict(list)
    bounds: dict[tuple[_Node, str], float] = {}
    for span in spans:
        key, duration = ((span.name, span.layer), span.kind), span.end - span.start
        if span.lane == "comm":
            bounds[key] = min(duration, bounds.get(key, duration))
            alone = without([(span.start, span.end)], computing[span.rank])
            waited = alone[-1][1] - alone[-1][0] if alone and alone[-1][1] == span.end else 0.0
            if waited < _WAITED * duration:
                continue
        times[key].append(duration)
    for key, bound in bounds.items():
        times[key] = times[key] or [bound]
    forwards = [span for span in spans if span.kind == "F"]
    if not forwards:
        raise ValueError(
            f"calibrate: expected the trace to have forward spans of stage {stage}, got none"
        )
    first = min(forwards, key=lambda span: span.start)
    order = sorted(
        (s for s in forwards if (s.rank, s.microbatch) == (first.rank, first.microbatch)),
        key=lambda span: (span.start, span.end),
    )

    def typical(node: _Node, *kinds: str) -> float:
        for kind in kinds:
            if times.get((node, kind)):
                return fmean(times[node, kind])
        return 0.0

    segments: list[list[Piece]] = [[]]
    exchanges: list[Exchange] = []
    for span in order:
        node = (span.name, span.layer)
        if span.lane == "compute":
            inputs, weights = typical(node, "I", "B"), typical(node, "W")
            segments[-1].append(Piece(span.name, span.layer, typical(node, "F"), inputs, weights))
        else:
            backward = typical(node, "B", "I")
            exchanges.append(Exchange(span.name, span.layer or 0, typical(node, "F"), backward))
            segments.append([])
    return StageCosts(tuple(map(tuple, segments)), tuple(exchanges))
