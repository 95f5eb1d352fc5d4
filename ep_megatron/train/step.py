"""One iteration of training, one validation: Megatron's schedule, loss, optimizer step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_megatron.train.config import Config
from ep_megatron.train.data import Batch, batches
from ep_megatron.train.pipeline import schedule_function, traced

_LOSS = "lm loss"


@dataclass
class Run:
    """What changes while a run goes on, and what a checkpoint holds."""

    config: Config
    models: list[Any]
    optimizer: Any
    scheduler: Any
    iteration: int = 0

    @property
    def num_microbatches(self) -> int:
        """Microbatches per iteration on each rank."""
        ranks = self.config.data_parallel_size(dist.get_world_size())
        return self.config.global_batch_size // (self.config.micro_batch_size * ranks)


@dataclass(frozen=True)
class StepResult:
    """What one iteration says about itself; `loss` is None on all but the last pipeline stage."""

    loss: float | None
    grad_norm: float
    learning_rate: float


def train_iterators(run: Run, dataset: Any) -> list[Iterator[Batch]]:
    """Return one iterator per model chunk, at the first sample `run` has not trained on."""
    first_sample = run.iteration * run.config.global_batch_size
    return [batches(dataset, run.config, first_sample) for _ in run.models]


def train_step(run: Run, iterators: list[Iterator[Batch]]) -> StepResult:
    """Train on one global batch; collective over all ranks.

    Raises:
        RuntimeError: the loss is not finite (on the ranks of the last stage).
    """
    for model in run.models:
        model.zero_grad_buffer()
    run.optimizer.zero_grad()
    with traced(run.config, run.iteration + 1):
        losses = _run_schedule(run, iterators, forward_only=False)
    _, grad_norm, _ = run.optimizer.step()
    run.scheduler.step(increment=run.config.global_batch_size)
    run.iteration += 1
    loss = _mean_loss(losses)
    if loss is not None and not math.isfinite(loss):
        raise RuntimeError(
            f"pretrain: expected the loss of iteration {run.iteration} to be finite, got {loss}; "
            "a lower lr or a longer lr-warmup-iters may help"
        )
    learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
    return StepResult(loss, float(grad_norm or 0.0), float(learning_rate))


def evaluate(run: Run, dataset: Any) -> float | None:
    """Return the mean loss of the first `eval-iters` batches of `dataset`; collective.

    Returns:
        The loss on the last pipeline stage, else None.
    """
    iterators = [batches(dataset, run.config, 0) for _ in run.models]
    for model in run.models:
        model.eval()
    losses: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for _ in range(run.config.eval_iters):
            losses += _run_schedule(run, iterators, forward_only=True)
    for model in run.models:
        model.train()
    return _mean_loss(losses)


def _run_schedule(
    run: Run, iterators: list[Iterator[Batch]], forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    single = len(run.models) == 1
    losses: list[dict[str, torch.Tensor]] = schedule_function(run.config)(
        forward_step_func=_forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=run.models[0] if single else run.models,
        num_microbatches=run.num_microbatches,
        seq_length=run.config.seq_length,
        micro_batch_size=run.config.micro_batch_size,
        forward_only=forward_only,
    )
    return losses


def _forward_step(
    iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Megatron's forward step: return the output (or its plan) and the function of its loss."""
    from megatron.core.utils import get_attr_wrapped_model

    batch = _context_parallel_slice(next(iterator))
    if torch.cuda.is_available():
        batch = {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}
    loss_mask = batch["loss_mask"]
    forward = model
    if return_schedule_plan:
        forward = get_attr_wrapped_model(model, "build_schedule_plan")
    output = forward(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=loss_mask,
    )
    return output, lambda token_losses: _loss(loss_mask, token_losses)


def _loss(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mask = loss_mask.reshape(-1).float()
    total = (token_losses.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum()
    return total / num_tokens, {_LOSS: torch.stack([total.detach(), num_tokens])}


def _context_parallel_slice(batch: Batch) -> Batch:
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    sliced: Batch = get_batch_on_this_cp_rank(batch)
    return sliced


def _mean_loss(losses: list[dict[str, torch.Tensor]]) -> float | None:
    """Return the loss per token over all data-parallel ranks; None without losses."""
    from megatron.core import parallel_state

    if not losses:
        return None
    total = torch.stack([loss[_LOSS] for loss in losses]).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(total[0] / total[1])
