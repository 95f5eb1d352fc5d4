"""A pipeline schedule as a value: what every rank does, in which order, and where stages live."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any


class Kind(Enum):
    """What an action does with one micro-batch on one model chunk."""

    F = "F"
    """Forward."""
    B = "B"
    """Full backward: gradients of inputs and of weights."""
    I = "I"  # noqa: E741  (the literature's name)
    """Backward of inputs only; the weights' half is done by a later W."""
    W = "W"
    """Backward of weights, of a micro-batch whose I has run."""
    FB = "FB"
    """A forward and a full backward run node by node so that each hides the other's exchange."""


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one rank.

    Attributes:
        kind: what is done.
        chunk: index among the rank's model chunks.
        microbatch: index among all micro-batches of the step, whichever way they run.
        backward_chunk: chunk of the backward half; for FB only.
        backward_microbatch: micro-batch of the backward half; for FB only.
    """

    kind: Kind
    chunk: int
    microbatch: int
    backward_chunk: int | None = None
    backward_microbatch: int | None = None

    def parts(self) -> tuple["Action", ...]:
        """Return the single actions: F and B of a pair, else the action itself."""
        if self.kind is not Kind.FB:
            return (self,)
        assert self.backward_chunk is not None
        assert self.backward_microbatch is not None
        return (
            Action(Kind.F, self.chunk, self.microbatch),
            Action(Kind.B, self.backward_chunk, self.backward_microbatch),
        )

    def __str__(self) -> str:
        """Return kind, chunk and micro-batch: `F0.3`, or `F1.2&B0.1` for a pair."""
        if self.kind is Kind.FB:
            return (
                f"F{self.chunk}.{self.microbatch}&B{self.backward_chunk}.{self.backward_microbatch}"
            )
        return f"{self.kind.value}{self.chunk}.{self.microbatch}"


_ACTION = re.compile(r"([FBIW])(\d+)\.(\d+)|F(\d+)\.(\d+)&B(\d+)\.(\d+)")


def parse_action(text: str) -> Action:
    """Return the action that `str(action)` wrote.

    Raises:
        ValueError: when the text is not one.
    """
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"parse_action: expected text to be like F0.3, B1.0, I1.0, W1.0 or F0.3&B1.0, "
            f"got {text!r}"
        )
    kind, *numbers = match.groups()
    if kind is not None:
        return Action(Kind(kind), int(numbers[0]), int(numbers[1]))
    forward_chunk, forward, backward_chunk, backward = (int(number) for number in numbers[2:])
    return Action(Kind.FB, forward_chunk, forward, backward_chunk, backward)


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does in one training step.

    Attributes:
        name: as in `make_schedule`.
        num_microbatches: of the whole step, both directions together.
        stages: `[rank][chunk]`, the stage that the chunk holds.
        directions: `[chunk]`, which way the chunk's micro-batches run: all 0, but for
            bidirectional schedules, where chunks of direction 1 hold a second copy of every stage.
            With D directions, direction d runs micro-batches `[d * M / D, (d + 1) * M / D)`.
        actions: `[rank]`, in the order of execution.
    """

    name: str
    num_microbatches: int
    stages: tuple[tuple[int, ...], ...]
    directions: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks, P."""
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        """Model chunks on each rank."""
        return len(self.directions)

    @property
    def num_directions(self) -> int:
        """1, or 2 where micro-batches enter at both ends."""
        return max(self.directions) + 1

    @property
    def num_stages(self) -> int:
        """Stages that a micro-batch passes."""
        return self.num_ranks * self.num_chunks // self.num_directions

    @cached_property
    def _places(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {
            (stage, self.directions[chunk]): (rank, chunk)
            for rank, stages in enumerate(self.stages)
            for chunk, stage in enumerate(stages)
        }

    def stage_of(self, rank: int, chunk: int) -> int:
        """Return the stage that a rank's chunk holds."""
        return self.stages[rank][chunk]

    def place_of(self, stage: int, direction: int = 0) -> tuple[int, int]:
        """Return rank and chunk of a stage."""
        return self._places[stage, direction]

    def rank_of(self, stage: int, direction: int = 0) -> int:
        """Return the rank of a stage."""
        return self._places[stage, direction][0]

    def previous(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """Return rank and chunk whose output is this chunk's input; None at the first stage."""
        return self._places.get((self.stages[rank][chunk] - 1, self.directions[chunk]))

    def following(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """Return rank and chunk that take this chunk's output; None at the last stage."""
        return self._places.get((self.stages[rank][chunk] + 1, self.directions[chunk]))

    def direction_of(self, microbatch: int) -> int:
        """Return which way a micro-batch runs."""
        return microbatch * self.num_directions // self.num_microbatches

    def microbatches_of(self, chunk: int) -> range:
        """Return the micro-batches that pass a chunk."""
        each = self.num_microbatches // self.num_directions
        first = self.directions[chunk] * each
        return range(first, first + each)

    @property
    def first_ranks(self) -> tuple[int, ...]:
        """`[direction]`, the rank that reads the micro-batches' tokens."""
        return tuple(self.rank_of(0, d) for d in range(self.num_directions))

    @property
    def loss_ranks(self) -> tuple[int, ...]:
        """`[direction]`, the rank that computes the micro-batches' losses."""
        return tuple(self.rank_of(self.num_stages - 1, d) for d in range(self.num_directions))

    def steps(self) -> Iterator[tuple[int, int, Action]]:
        """Yield rank, step and action of all ranks."""
        for rank, actions in enumerate(self.actions):
            for step, action in enumerate(actions):
                yield rank, step, action

    def mirrored(self) -> "Schedule":
        """Return the same schedule with its ranks in reverse order.

        A V-shaped placement then has its first and last stage on the last rank, where Megatron
        looks for the loss.
        """
        return replace(self, stages=self.stages[::-1], actions=self.actions[::-1])

    def forward_only(self) -> "Schedule":
        """Return the forwards alone, for evaluation."""
        forwards = tuple(
            tuple(part for action in rank for part in action.parts() if part.kind is Kind.F)
            for rank in self.actions
        )
        return replace(self, actions=forwards)

    def without_pairs(self) -> "Schedule":
        """Return the schedule with every pair as a forward and then a backward."""
        singles = tuple(
            tuple(part for action in rank for part in action.parts()) for rank in self.actions
        )
        return replace(self, actions=singles)

    def without_split(self) -> "Schedule":
        """Return the schedule with full backwards in place of I, and no W."""
        full = tuple(
            tuple(
                replace(action, kind=Kind.B) if action.kind is Kind.I else action
                for action in rank
                if action.kind is not Kind.W
            )
            for rank in self.actions
        )
        return replace(self, actions=full)

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON can hold, for `schedule_from_json`."""
        return {
            "schedule": self.name,
            "num_microbatches": self.num_microbatches,
            "stages": [list(stages) for stages in self.stages],
            "directions": list(self.directions),
            "actions": [" ".join(map(str, actions)) for actions in self.actions],
        }

    def digest(self) -> str:
        """Return a hash of all of it, for ranks to find out whether they hold the same schedule.

        Ranks of one expert-parallel group run the same pipeline rank's actions: when their digests
        are equal, so is the order of their exchanges.
        """
        text = repr((self.num_microbatches, self.stages, self.directions))
        text += "|".join(" ".join(map(str, rank)) for rank in self.actions)
        return hashlib.sha256(text.encode()).hexdigest()


def schedule_from_json(content: Mapping[str, Any]) -> Schedule:
    """Return the schedule that `Schedule.to_json` wrote; it is not checked.

    Raises:
        ValueError: names what is missing or wrong.
    """
    try:
        return Schedule(
            name=str(content["schedule"]),
            num_microbatches=int(content["num_microbatches"]),
            stages=tuple(tuple(map(int, stages)) for stages in content["stages"]),
            directions=tuple(map(int, content["directions"])),
            actions=tuple(
                tuple(map(parse_action, actions.split())) for actions in content["actions"]
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "schedule_from_json: expected schedule, num_microbatches, stages, directions and "
            f"actions, got {', '.join(map(str, content)) or 'nothing'} ({error!r})"
        ) from None
