"""The soak: a short one finds nothing wrong, and what it looks for it would find."""

import dataclasses

import pytest
import torch

from ep_megatron.soak.launch import Outcome, _judge, _judge_growth, soak, words
from ep_megatron.soak.rank import Report, Round, _check
from ep_megatron.soak.step import Step
from tests.programs import DrawnCase
from tests.routing import expected_rows

HELD = {"MiB": 300, "threads": 9, "descriptors": 20, "segments": 0, "own threads": 0, "names": 0}
TASK = Round(0, "", "shared_memory", ((0, 1, 2),), 0.0, 60.0)
GONE = ("RuntimeError", "dispatch: rank 1 is gone (last call 7, combine)")


def test_two_minutes_at_eight_ranks_find_nothing_wrong() -> None:
    outcome = soak(2.0, 8, seed=5, round_seconds=2.0)
    assert not outcome.problems, words(outcome)
    assert sum(outcome.rounds.values()) >= 4
    assert outcome.num_checks > 200
    assert "no problem" in words(outcome)


@pytest.mark.parametrize("seed", range(6))
def test_the_expected_rows_of_a_step_are_those_of_the_loops(seed: int) -> None:
    step = Step.draw(seed, 3, ("rows",))
    slots = tuple(tuple(map(tuple, step.topk_idx(rank).tolist())) for rank in range(3))
    case = DrawnCase(
        "drawn",
        step.num_tokens,
        num_topk=step.num_topk,
        experts_per_rank=step.experts_per_rank,
        alignment=step.alignment if step.expand else 1,
        slots=slots,
    )
    sent = [step.x(rank) for rank in range(3)]
    for rank in range(3):
        rows = [
            torch.zeros(step.hidden, dtype=step.dtype) if row is None else sent[row[0]][row[1]]
            for row in expected_rows(case, rank, step.expand).rows
        ]
        expected = torch.stack(rows) if rows else sent[rank][:0]
        assert torch.equal(step.expected_rows(rank, sent), expected)


def test_a_wrong_result_is_seen() -> None:
    step, report = Step.draw(0, 3, ("rows",)), Report()
    x = torch.zeros(4, 8)
    _check(report, step, "rows", x, x.clone())
    assert not report.wrong
    _check(report, step, "rows", x, -x)  # equal numbers, other bits
    _check(report, step, "rows", x, x[:3])
    assert len(report.wrong) == 2
    assert report.num_checks == 3


@pytest.mark.parametrize(
    ("fault", "changes", "problem"),
    [
        ("kill", {}, ""),
        ("none", {0: {"error": GONE}}, "rank 0: ('RuntimeError'"),
        ("kill", {2: {"error": ("RuntimeError", "rank 0 is gone")}}, "rank 1 was not named"),
        ("kill", {2: {"error": None}}, "rank 2 saw no fault"),
        ("kill", {0: {"held": {**HELD, "names": 1}}}, "rank 0 keeps 1 names"),
        ("kill", {0: {"wrong": ["sums differ"]}}, "rank 0: sums differ"),
    ],
)
def test_what_must_not_be_is_seen(
    fault: str, changes: dict[int, dict[str, object]], problem: str
) -> None:
    error = GONE if fault == "kill" else None
    reports: dict[int, Report | None] = {
        rank: dataclasses.replace(Report(error=error, held=HELD), **changes.get(rank, {}))  # type: ignore
        for rank in range(3)
    }
    if fault == "kill":
        reports[1] = None
    outcome = Outcome()
    _judge(TASK, fault, 1, reports, outcome)
    assert bool(outcome.problems) == bool(problem)
    assert problem in "".join(outcome.problems)


def test_growth_is_seen() -> None:
    outcome = Outcome(held={0: [HELD, HELD, {**HELD, "descriptors": 90}], 1: [HELD, HELD, HELD]})
    _judge_growth(outcome)
    assert outcome.problems == ["rank 0 grew from 20 to 90 descriptors in 1 rounds"]
