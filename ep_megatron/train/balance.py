"""The load-balancing losses Megatron's routers have noted down."""

from typing import Any

import torch.distributed as dist


def _noted() -> dict[str, Any]:
    """Return name -> losses per layer since the last reset, whichever version keeps them."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # 0.17 on
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        tracker = get_moe_layer_wise_logging_tracker()
        return {name: entry["values"] for name, entry in tracker.items() if "values" in entry}
    return {name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items()}


def balance_losses(num_moe_layers: int, num_microbatches: int, num_data_ranks: int) -> Any:
    """Return name -> mean loss per MoE layer and microbatch, and reset them; collective.

    Megatron's own reduction averages with an operation gloo does not have.

    Args:
        num_moe_layers: MoE layers of the whole model.
        num_microbatches: microbatches per rank since the last call.
        num_data_ranks: ranks that read different data.
    """
    mine = {name: float(values.sum()) for name, values in _noted().items()}
    for values in _noted().values():
        values.zero_()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = sorted({name for losses in everyone for name in losses})
    share = num_moe_layers * num_microbatches * num_data_ranks
    return {name: sum(losses.get(name, 0.0) for losses in everyone) / share for name in names}
