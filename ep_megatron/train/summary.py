"""The first and the last words of a run."""

import signal

import torch
import torch.distributed as dist

from ep_megatron.train.report import Reporter
from ep_megatron.train.step import Run


def opening(run: Run, unigram_entropy: float) -> str:
    """Return what is trained, on what, how."""
    config = run.config
    weights = sum(parameter.numel() for model in run.models for parameter in model.parameters())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    parallel = {
        "TP": config.tensor_model_parallel_size,
        "PP": config.pipeline_model_parallel_size,
        "CP": config.context_parallel_size,
        "EP": config.expert_model_parallel_size,
        "DP": config.data_parallel_size(dist.get_world_size()),
    }
    sizes = " ".join(f"{name}{size}" for name, size in parallel.items() if size > 1) or "no split"
    lines = [
        f"{dist.get_world_size()} processes on {device} ({sizes}), {weights:,} parameters on this "
        f"rank, {'bfloat16' if config.bf16 else 'float32'}",
    ]
    if config.num_experts is not None:
        lines.append(
            f"top-{config.moe_router_topk} of {config.num_experts} experts, dispatcher "
            f"{config.moe_token_dispatcher}{_wire(run)}"
        )
    lines.append(f"unigram entropy of the text: {unigram_entropy:.4f} nats per token")
    return "\n".join(lines)


def _wire(run: Run) -> str:
    rows, grads = run.config.moe_dispatch_dtype, run.config.moe_combine_grad_dtype
    return "" if rows == grads == "bf16" else f" (rows {rows}, their gradients {grads})"


def summary(run: Run, reporter: Reporter, number: int) -> str:
    """Return how the run ended, where its results are, and what to try next.

    Args:
        run: the run, after its last iteration.
        reporter: its reporter, closed.
        number: the signal that ended the run, or 0.
    """
    config = run.config
    loss, validation = reporter.last("loss"), reporter.last("validation-loss")
    how = f"stopped by {signal.Signals(number).name}" if number else "trained"
    figures = [f"{reporter.tokens_per_second:,.0f} tokens/s"]
    if loss is not None:
        figures.append(f"loss {loss:.4f}")
    if validation is not None:
        figures.append(f"validation loss {validation:.4f}")
    lines = [
        f"{how}: iteration {run.iteration} of {config.train_iters}, {', '.join(figures)}",
        f"unigram entropy of the text {reporter.entropy:.4f} nats/token",
        "",
        f"  loss curve   {reporter.curve_path}",
        f"  losses       {reporter.losses_path}",
        f"  checkpoints  {config.save}",
        f"  TensorBoard  tensorboard --logdir {config.tensorboard_dir}",
        "",
    ]
    if run.iteration < config.train_iters:
        return "\n".join([*lines, "go on with --resume (make pretrain RESUME=1)"])
    return "\n".join(
        [
            *lines,
            "next, add to the same command (or to make pretrain ARGS='...'):",
            "  --moe-token-dispatcher alltoall   the same training through Megatron's dispatcher",
            "  --text-path FILE_OR_FOLDER        your own text, or JSONL with a 'text' key",
            "  --pipeline-model-parallel-size 2  two pipeline stages, so twice the processes",
            "  --keys                            all keys of a config",
        ]
    )
