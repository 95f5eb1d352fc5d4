"""Which nodes forget their activations and compute them again, by Megatron's own config keys.

`recompute_granularity: full` covers every compute node but the one with the head; `selective`
with `moe` in `recompute_modules` the experts. Exchanges are never done again: what they brought is
kept, as it is the input of the node behind them. Modules that Megatron recomputes inside attention,
a dense MLP or the shared experts stay Megatron's business.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recompute:
    """Kinds of nodes that are computed again in their backward."""

    attention: bool = False
    experts: bool = False
    tail: bool = False


def recompute_of(config: Any) -> Recompute:
    """Return what a TransformerConfig asks for. Not collective.

    Raises:
        ValueError: for a request that nodes cannot fulfil.
    """
    if config.recompute_granularity is None:
        return Recompute()
    if config.recompute_granularity == "full":
        if config.recompute_method == "block":
            raise ValueError(
                "pipeline: expected recompute_method to be uniform, got block; every layer's nodes "
                "are computed again, or none"
            )
        if config.distribute_saved_activations:
            raise ValueError("pipeline: expected distribute_saved_activations to be off, got on")
        return Recompute(attention=True, experts=True, tail=True)
    modules = config.recompute_modules or []
    if "layernorm" in modules and config.num_moe_experts is not None:
        raise ValueError(
            "pipeline: expected recompute_modules of a model with experts to be without layernorm, "
            "got it; the norm's output is what the router's node hands on"
        )
    return Recompute(experts="moe" in modules)


class CheckpointRandomStates:
    """Megatron's random states, as its own checkpointing saves and restores them."""

    def save(self) -> Any:
        """Return the states of the CPU's, the device's and the tracker's generators."""
        from megatron.core.tensor_parallel import random

        return random._get_all_rng_states()

    @contextlib.contextmanager
    def restored(self, states: Any) -> Iterator[None]:
        """Draw from `states` inside the block, and go on from the present states after it."""
        from megatron.core.tensor_parallel import random

        with random._fork_rng():
            random._set_all_rng_states(*states)
            yield
