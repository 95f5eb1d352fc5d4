"""The same training run with Megatron's dispatchers and with ours: losses agree.

With top-2 they are the same bits, in bfloat16 too if the router is float32: rows reach the experts
in the same order, and a sum of two terms has only one order. With more experts per token, sums are
taken in another order than Megatron's, and losses differ in the last digits.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.megatron_gpt import Case, Layout, model_parallel, train, train_each
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


@dataclass(frozen=True)
class Run:
    """One configuration; `tolerance` is relative, 0 where the losses are the same bits."""

    layout: Layout
    num_ranks: int
    options: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ("alltoall", "allgather")
    dtype: torch.dtype = torch.float32
    num_microbatches: int = 1
    tolerance: float = 0.0


SHARED = {"moe_shared_expert_intermediate_size": 32}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02}
SEQ_AUX = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.02}
DEEPSEEK = {
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
}
EP2 = Layout(ep=2)
ALLTOALL = ("alltoall",)
RUNS = {
    "ep1": Run(Layout(ep=1), 1),
    "ep2": Run(EP2, 2),
    "ep2 shared expert, aux loss": Run(EP2, 2, SHARED | AUX),
    "ep2 overlapped shared expert": Run(
        EP2, 2, SHARED | {"moe_shared_expert_overlap": True}, ALLTOALL
    ),
    "ep2 capacity factor": Run(EP2, 2, {"moe_expert_capacity_factor": 1.0} | AUX),
    "ep2 deepseek router": Run(EP2, 2, DEEPSEEK | SHARED | SEQ_AUX, tolerance=1e-5),
    "ep2 bfloat16": Run(EP2, 2, SHARED | AUX, dtype=torch.bfloat16),
    # Megatron rounds the weights and their gradients to bfloat16 with the router; ours are float32.
    "ep2 bfloat16 router": Run(
        EP2, 2, {"moe_router_dtype": None}, ALLTOALL, torch.bfloat16, tolerance=2e-2
    ),
    "ep4": Run(Layout(ep=4), 4),
    "ep2 x pp2": Run(Layout(ep=2, pp=2), 4, SHARED | AUX, num_microbatches=2),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_losses_agree_with_megatrons_dispatchers(run: Run) -> None:
    ours = Case("deepep", run.options, run.dtype, num_microbatches=run.num_microbatches)
    cases = [ours, *(replace(ours, dispatcher=name) for name in run.others)]
    of_ranks = run_on_ranks(run.num_ranks, train_each, run.layout, cases)
    assert any(losses[0] for losses in of_ranks)
    for rank, (our_losses, *other_losses) in enumerate(of_ranks):
        for name, losses in zip(run.others, other_losses, strict=True):
            assert len(our_losses) == len(losses)
            gaps = [abs(a - b) / b for a, b in zip(our_losses, losses, strict=True)]
            assert max(gaps, default=0.0) <= run.tolerance, f"rank {rank} against {name}"
        if our_losses:
            assert sum(our_losses[-10:]) < 0.8 * sum(our_losses[:10])


def _train_patched(rank: int) -> list[list[float]]:
    """Without the plugin installed: the spec alone brings the dispatcher, or Megatron refuses."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    case = Case("deepep", num_steps=10)
    with model_parallel(EP2):
        with pytest.raises(ValueError, match="Unsupported token dispatcher type: deepep"):
            train(EP2, case)
        assert MoELayer.__module__.startswith("megatron.")
        return [
            train(EP2, replace(case, patched_spec=True)),
            train(EP2, replace(case, dispatcher="alltoall")),
        ]


def test_a_patched_spec_trains_without_the_plugin() -> None:
    for ours, megatrons in run_on_ranks(2, _train_patched):
        assert ours == megatrons


def test_overlapping_1f1b_gives_the_losses_of_the_plain_schedule() -> None:
    plain = Case("deepep", dtype=torch.bfloat16, num_steps=10, num_microbatches=4)
    overlapping = replace(plain, options={"overlap_moe_expert_parallel_comm": True})
    patched = replace(overlapping, dispatcher="flex", patched_spec=True)
    cases = [plain, overlapping, patched, replace(overlapping, dispatcher="alltoall")]
    for ours, *with_overlap in run_on_ranks(2, train_each, EP2, cases):
        assert len(ours) == 40
        assert with_overlap == [ours] * 3
