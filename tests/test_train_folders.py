"""Folders of a run, checkpoints' names, and the stop request: what needs no training."""

import os
import signal
from pathlib import Path

import pytest

from ep_megatron.train.checkpoint import latest_iteration
from ep_megatron.train.config import Config, load_config
from ep_megatron.train.folders import prepare_folders
from ep_megatron.train.pretrain import pretrain
from ep_megatron.train.stop import StopRequest
from tests.ranks import run_on_ranks

CI_CONFIG = Path(__file__).parents[1] / "examples" / "ci.yaml"


def _config(run_dir: str, save: str | None = None) -> Config:
    words = ["--run-dir", run_dir, *(["--save", save] if save else [])]
    return load_config(CI_CONFIG, words)


def _prepare(rank: int, run_dir: str, save: str | None, resume: bool) -> str:
    try:
        prepare_folders(_config(run_dir, save), resume)
    except ValueError as error:
        return str(error)
    return ""


def _leave_a_run(run_dir: Path, iteration: int) -> Path:
    save = run_dir / "checkpoints"
    save.mkdir(parents=True, exist_ok=True)
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return save


def test_pretrain_needs_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        pretrain(_config("unused"))


def test_an_earlier_run_is_moved_aside_and_kept(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for iteration in (3, 5):
        _leave_a_run(run_dir, iteration)
        assert run_on_ranks(2, _prepare, str(run_dir), None, False) == ["", ""]
    assert latest_iteration(run_dir / "checkpoints") is None
    assert latest_iteration(tmp_path / "run.1" / "checkpoints") == 3
    assert latest_iteration(tmp_path / "run.2" / "checkpoints") == 5


def test_checkpoints_elsewhere_are_never_mixed(tmp_path: Path) -> None:
    save = _leave_a_run(tmp_path / "elsewhere", 7)
    for message in run_on_ranks(2, _prepare, str(tmp_path / "run"), str(save), False):
        assert "at iteration 7" in message
        assert "--resume" in message
    assert run_on_ranks(2, _prepare, str(tmp_path / "run"), str(save), True) == ["", ""]
    assert latest_iteration(save) == 7


def test_resuming_nothing_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for message in run_on_ranks(2, _prepare, str(tmp_path / "run"), None, True):
        assert "expected a checkpoint" in message


def _agree(rank: int) -> list[int]:
    stop = StopRequest()
    try:
        answers = [stop.agreed()]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        answers.append(stop.agreed())
        if rank == 1:
            with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C acts as usual
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()
    return answers


def test_all_ranks_hear_of_a_signal_to_one() -> None:
    assert run_on_ranks(2, _agree) == [[0, signal.SIGINT], [0, signal.SIGINT]]
