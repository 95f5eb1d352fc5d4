"""A schedule in Megatron's place: DistributedDataParallel, optimizers, tensor parallelism, tying.

The whole model is trained by Megatron's own `forward_backward_no_pipelining` on every rank, the
pieces by ours, with the same optimizer; after each step all parameters are compared. Tied
embeddings are summed in another order than autograd's, and are compared to a tolerance.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.megatron_gpt import Layout
from tests.pipeline_gpt import (
    BATCH,
    SEQUENCE,
    WAIT,
    Shape,
    build_chunks,
    build_gpt,
    config_of,
    forward_step,
    forward_step_per_token,
    global_names,
    microbatches,
    pipeline_ranks,
    whole_layout,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

NUM_STEPS = 2
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Case:
    """One way to train; data parallelism takes the ranks that remain of four."""

    name: str
    layout: Layout = field(default_factory=lambda: Layout(pp=2))
    options: dict[str, Any] = field(default_factory=dict)
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = False
    is_tied: bool = False
    clip_grad: float = 0.0
    optimizer: str = "adam"
    is_timed: bool = False
    tolerance: float = 0.0

    @property
    def shape(self) -> Shape:
        return Shape(
            torch.float32,
            num_layers=4,
            num_microbatches=4,
            options=self.options,
            is_tied=self.is_tied,
        )


CASES = {
    "dualpipev, gradients reduced behind the schedule": Case("dualpipev", overlap_grad_reduce=True),
    "dualpipev, loss per token, timed": Case(
        "dualpipev", options={"calculate_per_token_loss": True}, is_timed=True
    ),
    "zb1p, distributed optimizer": Case(
        "zb1p", overlap_grad_reduce=True, distributed_optimizer=True
    ),
    "dualpipev, distributed optimizer, expert bias": Case(
        "dualpipev",
        Layout(pp=2, ep=2),
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
        distributed_optimizer=True,
    ),
    "dualpipev, tensor parallel": Case("dualpipev", Layout(pp=2, tp=2, ep=2)),
    "interleaved-overlap, latent attention": Case("interleaved-overlap", options=MLA),
    "dualpipev, tied": Case("dualpipev", is_tied=True, overlap_grad_reduce=True, tolerance=2e-5),
    "1f1b, tied": Case("1f1b", is_tied=True, tolerance=2e-5),
    # Its sums have another order, and Adam would make a step of lr of a gradient's last bit.
    "dualpipe, tied, clipped": Case(
        "dualpipe", is_tied=True, clip_grad=0.1, optimizer="sgd", tolerance=1e-5
    ),
}


TWO_WAY = Case("dualpipe", options={"mtp_num_layers": 1})


def _wrap(case: Case, models: list[Any], num_copies: int = 1) -> tuple[list[Any], Any]:
    """Return the models in DistributedDataParallel and their optimizer.

    Megatron sums squares of gradients over pipeline ranks; with the whole model on each of them,
    that is `num_copies` times too much.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=case.overlap_grad_reduce,
        use_distributed_optimizer=case.distributed_optimizer,
        bucket_size=2000,
    )
    wrapped = [
        DistributedDataParallel(
            model.config, ddp_config, model, disable_bucketing=index > 0 or case.name == "dualpipe"
        )
        for index, model in enumerate(models)
    ]
    optimizer_config = OptimizerConfig(
        optimizer=case.optimizer,
        lr=1e-2,
        min_lr=1e-2,
        clip_grad=case.clip_grad * num_copies**0.5,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    return wrapped, get_megatron_optimizer(optimizer_config, wrapped)


def _step(forward_backward: Any, models: list[Any], optimizer: Any, data: Any, **more: Any) -> Any:
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    per_token = models[0].config.calculate_per_token_loss
    reported = forward_backward(
        forward_step_func=forward_step_per_token if per_token else forward_step,
        data_iterator=data if len(models) > 1 else data[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=4,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
        **more,
    )
    optimizer.step()
    return [losses["lm loss"].item() for losses in reported]


def _train(rank: int, case: Case) -> float:
    """Return the largest relative distance of a parameter; raise where losses are too far apart."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.timers import Timers

    from ep_megatron.pipeline.forward_backward import get_forward_backward_func
    from ep_megatron.pipeline.placement import GroupOfOne

    shape = case.shape
    with pipeline_ranks(case.name, case.layout):
        data_rank = parallel_state.get_data_parallel_rank()
        groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups())
        groups.embd = groups.pos_embd = GroupOfOne()
        whole = build_gpt(config_of(shape, whole_layout()), shape, pp_rank=0, pg_collection=groups)
        (whole,), optimizer = _wrap(case, [whole], case.layout.pp)
        models, our_optimizer = _wrap(case, build_chunks(case.name, shape, case.layout))
        for model, one in ((whole, optimizer), (models[0], our_optimizer)):
            model.config.finalize_model_grads_func = finalize_model_grads
            model.config.grad_scale_func = one.scale_loss
        if case.overlap_grad_reduce:
            whole.config.no_sync_func = whole.no_sync
            models[0].config.no_sync_func = [model.no_sync for model in models]
        if case.is_timed:
            models[0].config.timers = Timers(2, "minmax")
        data = microbatches(shape, data_rank)
        our_data = [microbatches(shape, data_rank) for _ in models]
        ours = get_forward_backward_func(case.name, timeout=60.0)
        before = {name: p.detach().clone() for name, p in global_names(whole.module)}
        worst = 0.0
        for _ in range(NUM_STEPS):
            losses = _step(
                forward_backward_no_pipelining, [whole], optimizer, [data], pg_collection=groups
            )
            reported = _step(ours, models, our_optimizer, our_data)
            for one, other in zip(reported, losses, strict=False):
                assert abs(one - other) <= case.tolerance * abs(other), (one, other)
            theirs = dict(global_names(whole.module))
            for model in models:
                for name, parameter in global_names(model.module):
                    assert not torch.equal(parameter, before[name]), name
                    gap = (parameter - theirs[name]).abs().max() / theirs[name].abs().max()
                    worst = max(worst, gap.item())
        if case.is_timed:
            for name in ("forward-backward", "forward-compute", "backward-compute"):
                assert models[0].config.timers(name).elapsed(reset=False) > 0, name
        return worst


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parameters_are_those_of_megatrons_own_schedule(case: Case) -> None:
    worst = run_on_ranks(4, _train, case)
    assert max(worst) <= case.tolerance


def _train_two_ways(rank: int) -> int:
    """Train with whole optimizers and with sharded ones; return how many parameters agree."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    from ep_megatron.pipeline.forward_backward import get_forward_backward_func
    from ep_megatron.pipeline.p2p import swap

    found: list[list[dict[str, torch.Tensor]]] = []
    for is_sharded in (False, True):
        case = dataclasses.replace(TWO_WAY, distributed_optimizer=is_sharded)
        with pipeline_ranks(case.name, case.layout):
            data_rank = parallel_state.get_data_parallel_rank()
            models, optimizer = _wrap(case, build_chunks(case.name, case.shape, case.layout))
            for model in models:
                model.config.finalize_model_grads_func = finalize_model_grads
            data = [microbatches(case.shape, data_rank) for _ in models]
            for _ in range(NUM_STEPS):
                _step(get_forward_backward_func(case.name, timeout=WAIT), models, optimizer, data)
            chunks = [dict(global_names(model.module)) for model in models]
            mine, other = ([p.detach() for p in chunk.values()] for chunk in chunks)
            copies = [torch.empty_like(tensor) for tensor in other]
            swap(parallel_state.get_pipeline_model_parallel_group(), mine, copies, WAIT)
            for copy, (name, parameter) in zip(copies, chunks[1].items(), strict=True):
                assert torch.equal(copy, parameter), (is_sharded, name)
            found.append([{n: p.detach().clone() for n, p in c.items()} for c in chunks])
    for whole, sharded in zip(*found, strict=True):
        for name, parameter in whole.items():
            assert torch.equal(parameter, sharded[name]), name
    return sum(len(chunk) for chunk in found[0])


def test_copies_of_a_stage_stay_equal_and_a_sharded_optimizer_changes_nothing() -> None:
    assert min(run_on_ranks(4, _train_two_ways)) > 20
