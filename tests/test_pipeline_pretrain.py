"""The training command with `pipeline-schedule`: the losses of plain 1F1B, from its checkpoint."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from ep_megatron.pipeline.calibrate import calibrate
from ep_megatron.pipeline.trace import read_trace
from ep_megatron.train.config import make_config
from tests.test_train_pretrain import _finish, _records, _start, folder

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
__all__ = ["folder"]

WORDS = (
    *("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"),
    *("--num-layers", "4", "--moe-layer-freq", "1", "--moe-aux-loss-coeff", "0.01"),
    *("--micro-batch-size", "1", "--eval-interval", "4", "--eval-iters", "1"),
    *("--train-iters", "4", "--save-interval", "2"),
)
SCHEDULES = {
    "dualpipev": ("--overlap-grad-reduce", "--pipeline-trace-iteration", "4"),
    "dualpipe": (),
}


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[tuple[int, float, float]]:
    """Train with Megatron's own 1F1B; return iterations, losses and norms."""
    _finish(_start(folder, "plain", *WORDS))
    return _losses(folder, "plain")


def _losses(folder: Path, name: str) -> list[tuple[int, float, float]]:
    records = [record for record in _records(folder, name) if "loss" in record]
    return [(record["iteration"], record["loss"], record["grad-norm"]) for record in records]


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_are_those_of_plain_1f1b(
    folder: Path,
    plain: list[tuple[int, float, float]],
    name: str,
) -> None:
    _go_back(folder, "plain", name)
    words = (*WORDS, "--resume", "--pipeline-schedule", name, *SCHEDULES[name])
    output = _finish(_start(folder, name, *words))
    assert "resumed from" in output
    ours = _losses(folder, name)
    assert [iteration for iteration, _, _ in ours] == [1, 2, 3, 4]
    for one, other in zip(ours, plain, strict=True):
        # Norms are summed over parameters in another order, which moves the clipped step.
        assert one[1:] == pytest.approx(other[1:], rel=2e-5)
    if name == "dualpipev":
        files = [folder / name / f"pipeline-trace/rank-{rank}.json" for rank in range(2)]
        timeline = read_trace(files)
        assert {span.rank for span in timeline.spans} == {0, 1}
        assert {span.lane for span in timeline.spans} == {"compute", "comm", "p2p"}
        assert calibrate(timeline).schedule.name == name  # it can be simulated


def test_prediction_layers_train_on_a_v(folder: Path) -> None:
    """From the checkpoint of plain 1F1B with its losses, from an own one with the same bits."""
    words = (*WORDS, "--mtp-num-layers", "1")
    on_a_v = (*words, "--pipeline-schedule", "dualpipev")
    _finish(_start(folder, "plain mtp", *words))
    _go_back(folder, "plain mtp", "mtp")
    _finish(_start(folder, "mtp", *on_a_v, "--resume"))
    for one, other in zip(_losses(folder, "mtp"), _losses(folder, "plain mtp"), strict=True):
        assert one[1:] == pytest.approx(other[1:], rel=2e-5)
    _check_resuming(folder, "whole mtp", on_a_v)


def test_two_copies_resume_with_a_distributed_optimizer(folder: Path) -> None:
    words = (*WORDS, "--use-distributed-optimizer")
    _check_resuming(folder, "cut", (*words, "--pipeline-schedule", "dualpipe"))
    output = _finish(_start(folder, "cut", *words, "--train-iters", "5", "--resume"), expected=1)
    assert "resume: expected pipeline-schedule to be dualpipe, as in" in output
    assert "got none; resume with the schedule it was written by" in output


def _check_resuming(folder: Path, name: str, words: tuple[str, ...]) -> None:
    """A run that goes on from its second iteration has the bits of one that was not interrupted."""
    _finish(_start(folder, name, *words))
    _go_back(folder, name, f"{name} again")
    _finish(_start(folder, f"{name} again", *words, "--resume"))
    assert _losses(folder, f"{name} again") == _losses(folder, name)


def _go_back(folder: Path, name: str, copy: str) -> None:
    """Copy a run, to be resumed behind its second iteration."""
    shutil.copytree(folder / name, folder / copy)
    (folder / copy / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"pipeline-schedule": "dualpipe5"}, "pipeline-schedule"),
        ({"pipeline-schedule": "dualpipev", "pipeline-model-parallel-size": 1}, "at least 2"),
        ({"pipeline-schedule": "zb1p", "num-virtual-stages-per-pipeline-rank": 2}, "left out"),
        ({"pipeline-schedule": "zbv", "moe-token-dispatcher": "alltoall"}, "to be deepep"),
        ({"pipeline-schedule": "dualpipev", "global-batch-size": 12}, "number of micro-batches"),
        ({"pipeline-trace-iteration": 3}, "pipeline-schedule to be given"),
    ],
)
def test_a_config_that_cannot_be_is_refused(more: dict[str, object], problem: str) -> None:
    values: dict[str, object] = {
        "num-layers": 4,
        "hidden-size": 16,
        "num-attention-heads": 2,
        "seq-length": 8,
        "micro-batch-size": 1,
        "global-batch-size": 16,
        "train-iters": 1,
        "lr": 1e-3,
        "num-experts": 4,
        "pipeline-model-parallel-size": 4,
        "num-processes": 4,
    }
    make_config({**values, "pipeline-schedule": "dualpipev", "num-processes": 4})
    size = more.get("pipeline-model-parallel-size", 4)
    if "global-batch-size" in more:
        more = {**more, "global-batch-size": 6}
    with pytest.raises(ValueError, match=problem):
        make_config({**values, "num-processes": size, **more})
