"""Predict a training step: how long, how much of it idle or exposed, how much memory."""

from dataclasses import dataclass

from ep_megatron.pipeline.action import Schedule
from ep_megatron.pipeline.check import check, peak_activations
from ep_megatron.pipeline.costs import Costs
from ep_megatron.pipeline.engine import Engine
from ep_megatron.pipeline.measures import RankMeasure, measure
from ep_megatron.pipeline.program import Options, describe, program
from ep_megatron.pipeline.trace import Timeline


@dataclass(frozen=True)
class Simulation:
    """A simulated step.

    Attributes:
        timeline: every node, in microseconds from the start.
        ranks: `[rank]`, compute, exposed communication and idle time.
        peak_chunks: `[rank]`, the most chunk activations held at one time.
        peak_activation_bytes: `[rank]`, the same in bytes where the costs have them.
        parameter_bytes: `[rank]`, weights and gradients.
    """

    timeline: Timeline
    ranks: tuple[RankMeasure, ...]
    peak_chunks: tuple[float, ...]
    peak_activation_bytes: tuple[float, ...]
    parameter_bytes: tuple[float, ...]

    @property
    def step_time(self) -> float:
        """Microseconds from the first rank's start to the last one's end."""
        return self.timeline.end - self.timeline.start

    @property
    def bubble(self) -> float:
        """Share of the step in which the ranks, on average, do nothing."""
        return self._mean("idle")

    @property
    def exposed(self) -> float:
        """Share of the step in which the ranks, on average, only communicate."""
        return self._mean("exposed")

    @property
    def peak_bytes(self) -> float:
        """Activations, weights and gradients of the rank that holds most."""
        pairs = zip(self.peak_activation_bytes, self.parameter_bytes, strict=True)
        return max(sum(pair) for pair in pairs)

    def _mean(self, what: str) -> float:
        if not self.step_time:
            return 0.0
        total = sum(getattr(rank, what) for rank in self.ranks)
        return float(total / len(self.ranks) / self.step_time)


def simulate(
    schedule: Schedule, costs: Costs, options: Options | None = None, title: str = ""
) -> Simulation:
    """Run a schedule on paper.

    Every rank computes and exchanges at the same time, in the order of its program; messages
    between ranks take `costs.p2p` each, are sent when their content is ready, and follow each other
    per channel. Exchanges have a network of their own. Nothing is random.

    Args:
        schedule: any that `check` accepts.
        costs: with one entry per stage.
        options: how ranks run their actions; pairs woven without.
        title: of the timeline.

    Raises:
        ValueError: when the schedule is wrong or the costs are of another number of stages.
    """
    options = options or Options()
    check(schedule)
    if len(costs.stages) != schedule.num_stages:
        raise ValueError(
            f"simulate: expected costs to be of {schedule.num_stages} stages, "
            f"got {len(costs.stages)}"
        )
    if not 0 < costs.compute_share <= 1:
        raise ValueError(
            f"simulate: expected compute_share to be in (0, 1], got {costs.compute_share}"
        )
    programs = [program(schedule, costs, options, rank) for rank in range(schedule.num_ranks)]
    spans = Engine(schedule, programs, costs.p2p, costs.compute_share).run()
    description = describe(schedule, options) | {"measured": False}
    timeline = Timeline(title or schedule.name, schedule.num_ranks, tuple(spans), description)
    sizes = [[costs.stages[s].activation_bytes for s in stages] for stages in schedule.stages]
    parameters = tuple(
        sum(costs.stages[stage].parameter_bytes for stage in stages) for stages in schedule.stages
    )
    return Simulation(
        timeline,
        measure(timeline),
        peak_activations(schedule, costs.kept_by_weights),
        peak_activations(schedule, costs.kept_by_weights, sizes),
        parameters,
    )
