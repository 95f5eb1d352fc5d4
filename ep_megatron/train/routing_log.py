"""How unevenly a router fills ranks, written while a run trains: `<run-dir>/routing.jsonl`.

A line per iteration and MoE layer. E experts.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_megatron.train.report import records_until


class RoutingLog:
    """Counts the rows that a router sends to ranks, if 2, 3, ... E ranks shared its experts.

    As many as a dispatch by rank moves: one per token and rank, for each micro-batch of the run.

    Args:
        models: this rank's; routers are found in them.
        path: of the file.
        first_iteration: iterations already trained; later lines of the file are dropped.
    """

    def __init__(self, models: list[nn.Module], path: Path, first_iteration: int) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        self._path = path
        if dist.get_rank() == 0:
            kept = records_until(path, first_iteration)
            path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._calls: dict[int, list[dict[int, Tensor]]] = defaultdict(list)
        routers = [m for model in models for m in model.modules() if isinstance(m, TopKRouter)]
        self._hooks = [router.register_forward_hook(self._count) for router in routers]

    def clear(self) -> None:
        """Begin an iteration."""
        self._calls.clear()

    def write(self, iteration: int) -> None:
        """Write what was counted since `clear`, of all ranks in one; collective over all ranks."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(self._calls))
        if dist.get_rank() != 0:
            return
        lines = []
        for layer in sorted({layer for calls in everyone for layer in calls}):
            of_ranks = [calls[layer] for calls in everyone if layer in calls]
            for number, at_once in enumerate(zip(*of_ranks, strict=True)):
                rows = {size: sum(call[size] for call in at_once).tolist() for size in at_once[0]}
                record = {"iteration": iteration, "layer": layer, "micro-batch": number}
                lines.append(json.dumps({**record, "rows": rows}) + "\n")
        with self._path.open("a") as file:
            file.writelines(lines)

    def close(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        # A checkpointed layer runs twice, once without gradients; so do validations.
        if not (router.training and torch.is_grad_enabled()):
            return
        is_routed = output[1].flatten(0, -2)
        num_experts = is_routed.shape[1]
        self._calls[router.layer_number].append({
            size: is_routed.view(len(is_routed), size, -1).any(2).sum(0).cpu()
            for size in range(2, num_experts + 1)
            if num_experts % size == 0
        })  # fmt: skip
