"""A fresh run never mixes with an earlier one, and never deletes it."""

import logging
from pathlib import Path

from ep_megatron.train.agree import on_rank_zero
from ep_megatron.train.checkpoint import latest_iteration
from ep_megatron.train.config import Config

logger = logging.getLogger(__name__)


def prepare_folders(config: Config, resume: bool) -> None:
    """Make the run's folders; an earlier run in the same place is moved aside; collective.

    Raises:
        ValueError: `save` lies outside `run-dir` and holds the checkpoints of an earlier run, or
            there is nothing to resume.
    """
    on_rank_zero(lambda: _prepare(config, resume))


def _prepare(config: Config, resume: bool) -> None:
    run_dir, save = config.run_dir, config.save
    assert run_dir is not None
    assert save is not None
    latest = latest_iteration(save)
    if resume:
        if latest is None:
            raise ValueError(
                f"resume: expected a checkpoint in {save}, got none; start without --resume"
            )
    elif latest is not None and run_dir not in save.parents:
        raise ValueError(
            f"pretrain: expected save to hold no earlier run, got {save} at iteration {latest}; "
            "add --resume to continue it, or choose another folder"
        )
    elif latest is not None or (run_dir / "losses.jsonl").exists():
        aside = _free_name(run_dir)
        run_dir.rename(aside)
        logger.info(
            "moved the earlier run %s to %s; --resume would have continued it", run_dir, aside
        )
    save.mkdir(parents=True, exist_ok=True)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside
