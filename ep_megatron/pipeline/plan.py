"""Answer a planner's question: of these schedules and sizes, which step is the shortest?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ep_megatron.pipeline.costs import profile_costs
from ep_megatron.pipeline.profile import Profile
from ep_megatron.pipeline.program import Options
from ep_megatron.pipeline.schedule import make_schedule
from ep_megatron.pipeline.simulate import Simulation, simulate


@dataclass(frozen=True)
class Case:
    """One combination of choices; None is the profile's or schedule's own."""

    schedule: str
    pipeline_parallel: int
    num_microbatches: int
    num_chunks: int | None = None
    expert_parallel: int | None = None
    communication_sms: int | None = None

    def __str__(self) -> str:
        """Return the choices on one line."""
        words = [self.schedule, f"PP {self.pipeline_parallel}", f"M {self.num_microbatches}"]
        for name, value in (
            ("chunks", self.num_chunks),
            ("EP", self.expert_parallel),
            ("SMs", self.communication_sms),
        ):
            words += [f"{name} {value}"] if value is not None else []
        return ", ".join(words)


@dataclass(frozen=True)
class Outcome:
    """What a case comes to: a simulation, or why it cannot be."""

    case: Case
    simulation: Simulation | None
    reason: str = ""
    tokens_per_second: float | None = None
    """Of each rank of the pipeline."""


def cases(
    schedules: Sequence[str],
    pipeline_parallel: Sequence[int],
    num_microbatches: Sequence[int],
    num_chunks: int | None,
    expert_parallel: Sequence[int | None],
    communication_sms: Sequence[int | None],
) -> Iterator[Case]:
    """Yield every combination; the number of chunks is for the interleaved schedules only."""
    for name, ranks, microbatches, experts, sms in product(
        schedules, pipeline_parallel, num_microbatches, expert_parallel, communication_sms
    ):
        chunks = num_chunks if name.startswith("interleaved") else None
        yield Case(name, ranks, microbatches, chunks, experts, sms)


def cluster_cases(
    asked: Iterator[Case], num_gpus: int, global_batch: int, profile: Profile
) -> Iterator[Case]:
    """Yield the cases that a cluster and a batch admit, with the micro-batches they come to.

    What is not a pipeline rank or its expert group is data parallelism; tensors are whole.

    Args:
        asked: combinations whose number of micro-batches does not matter.
        num_gpus: of the cluster.
        global_batch: micro-batches of one step on all GPUs.
        profile: knows the expert-parallel size of a case that names none.

    Raises:
        ValueError: there is only one of the two.
    """
    if num_gpus < 1 or global_batch < 1:
        raise ValueError(
            "simulate: expected --gpus and --global-batch to be positive and to come together, "
            f"got {num_gpus} and {global_batch}"
        )
    own = profile.exchange.expert_parallel if profile.exchange else 1
    for case in asked:
        data_parallel, rest = divmod(num_gpus, case.pipeline_parallel)
        if rest or data_parallel == 0 or global_batch % data_parallel:
            continue
        if data_parallel % (case.expert_parallel or own):
            continue
        yield replace(case, num_microbatches=global_batch // data_parallel)


def run_case(case: Case, profile: Profile, options: Options, imbalance: float = 1.0) -> Outcome:
    """Simulate a case, or say why it cannot be."""
    try:
        schedule = make_schedule(
            case.schedule, case.pipeline_parallel, case.num_microbatches, case.num_chunks
        )
        costs = profile_costs(
            profile, schedule, case.expert_parallel, case.communication_sms, imbalance
        )
        simulation = simulate(schedule, costs, options, str(case))
    except ValueError as error:
        return Outcome(case, None, str(error))
    speed = None
    if profile.tokens_per_microbatch and simulation.step_time:
        tokens = profile.tokens_per_microbatch * case.num_microbatches
        speed = tokens / case.pipeline_parallel / (simulation.step_time * 1e-6)
    return Outcome(case, simulation, "", speed)


def by_merit(outcomes: Sequence[Outcome], memory_limit: float | None = None) -> list[Outcome]:
    """Return outcomes from best to worst.

    First by throughput (by step time where the profile knows no tokens); those over the memory
    limit (bytes) after those within it; those that cannot be last.
    """

    def key(outcome: Outcome) -> tuple[int, float]:
        simulation = outcome.simulation
        if simulation is None:
            return 2, 0.0
        is_over = memory_limit is not None and simulation.peak_bytes > memory_limit
        if outcome.tokens_per_second is not None:
            return int(is_over), -outcome.tokens_per_second
        return int(is_over), simulation.step_time

    return sorted(outcomes, key=key)
