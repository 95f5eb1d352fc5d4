"""The loop of a run: iterations, validations, checkpoints, and a clean stop."""

import time
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from ep_megatron.train.balance import balance_losses
from ep_megatron.train.checkpoint import save_checkpoint
from ep_megatron.train.config import Config
from ep_megatron.train.data import Data
from ep_megatron.train.report import Reporter
from ep_megatron.train.routing_log import RoutingLog
from ep_megatron.train.step import Run, evaluate, train_iterators, train_step
from ep_megatron.train.stop import StopRequest
from ep_megatron.train.summary import opening, summary
from ep_megatron.train.watch import gather_statistics, watch_report, watch_scalars


def train(run: Run, data: Data) -> int:
    """Train until `train-iters`, a signal or `exit-interval`; collective over all ranks.

    Returns:
        0, or the number of the signal that ended the run.
    """
    with ExitStack() as stack:
        stop = StopRequest()
        stack.callback(stop.restore)
        reporter = None
        if _is_reporter():
            reporter = Reporter(run.config, run.iteration, data.unigram_entropy)
            stack.callback(reporter.close)
            reporter.say(opening(run, data.unigram_entropy))
        routing = None
        if run.config.log_routing:
            assert run.config.run_dir is not None
            routing = RoutingLog(run.models, run.config.run_dir / "routing.jsonl", run.iteration)
            stack.callback(routing.close)
        number = _iterate(run, data, reporter, stop, routing)
        groups = gather_statistics()
    if reporter is not None:
        if groups:
            reporter.console.print(watch_report(groups), soft_wrap=True, markup=False)
        reporter.console.print(summary(run, reporter, number), soft_wrap=True, markup=False)
    return number


def _iterate(
    run: Run,
    data: Data,
    reporter: Reporter | None,
    stop: StopRequest,
    routing: RoutingLog | None,
) -> int:
    config = run.config
    iterators = train_iterators(run, data.train)
    saved = validated = run.iteration
    number = 0
    while run.iteration < config.train_iters and not number:
        start = time.perf_counter()
        if routing is not None:
            routing.clear()
        result = train_step(run, iterators)
        if reporter is not None:
            reporter.step(run.iteration, result, time.perf_counter() - start)
        if _due(run, config.log_interval):
            _report_balance(run, reporter)
            if routing is not None:
                routing.write(run.iteration)
            scalars = watch_scalars(gather_statistics())
            if reporter is not None:
                reporter.scalars(run.iteration, scalars)
        if _due(run, config.eval_interval):
            validated = _validate(run, data, reporter)
        number = stop.agreed()
        exits = _due(run, config.exit_interval)
        if _due(run, config.save_interval) or number or exits:
            saved = _save(run, reporter)
        if exits:
            break
    if run.iteration == config.train_iters and not number:
        if validated < run.iteration:
            _validate(run, data, reporter)
        if saved < run.iteration:
            _save(run, reporter)
    return number


def _due(run: Run, interval: int | None) -> bool:
    return interval is not None and run.iteration % interval == 0


def _validate(run: Run, data: Data, reporter: Reporter | None) -> int:
    if data.valid is not None and run.config.eval_iters:
        loss = evaluate(run, data.valid)
        if reporter is not None and loss is not None:
            reporter.validation(run.iteration, loss)
    return run.iteration


def _save(run: Run, reporter: Reporter | None) -> int:
    start = time.perf_counter()
    assert run.config.save is not None
    path = save_checkpoint(run, run.config.save)
    if reporter is not None:
        reporter.say(f"saved {path} in {time.perf_counter() - start:.1f} s")
    return run.iteration


def _report_balance(run: Run, reporter: Reporter | None) -> None:
    config = run.config
    if config.num_experts is None:
        return
    microbatches = run.num_microbatches * config.log_interval
    ranks = config.data_parallel_size(dist.get_world_size())
    values: dict[str, Any] = balance_losses(num_moe_layers(config), microbatches, ranks)
    if reporter is not None:
        reporter.scalars(run.iteration, values)


def num_moe_layers(config: Config) -> int:
    """Return how many layers of the model are MoE."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, list):
        return sum(pattern) + (config.mtp_num_layers or 0)
    return -(-config.num_layers // pattern) + (config.mtp_num_layers or 0)


def _is_reporter() -> bool:
    from megatron.core import parallel_state

    return bool(
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )
