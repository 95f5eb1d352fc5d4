"""Megatron's dispatchers and ours: all six steps of a layer, with experts that do nothing."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.bench.case import Case, Maker, Step


@functools.cache
def _model_parallel(num_ranks: int) -> None:
    from ep_megatron.megatron import host

    host.install()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)


def layer(kind: str) -> Maker:
    """Return a maker of steps for Megatron's `alltoall` or `allgather`, or for `deepep`, ours."""

    def make(case: Case, rank: int) -> dict[str, Step]:
        _model_parallel(case.num_ranks)
        dispatcher = _dispatcher(kind, case, rank)
        x = case.x(rank).view(case.num_tokens, 1, case.hidden).requires_grad_()
        topk_idx = case.topk_idx(rank)
        routing_map = torch.zeros(case.num_tokens, case.num_experts, dtype=torch.bool)
        routing_map.scatter_(1, topk_idx, True)
        probs = torch.zeros(case.num_tokens, case.num_experts)
        probs.scatter_(1, topk_idx, case.topk_weights(rank)).requires_grad_()
        grad = case.x(rank).view_as(x).detach()

        def forward() -> tuple[Tensor, Tensor]:
            hidden, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
            hidden, weights = dispatcher.token_dispatch(hidden, weights)
            rows, _, row_weights = dispatcher.dispatch_postprocess(hidden, weights)
            rows = dispatcher.combine_preprocess(rows)
            rows = dispatcher.token_combine(rows)
            return dispatcher.combine_postprocess(rows), row_weights

        def forward_backward() -> None:
            x.grad = probs.grad = None
            out, row_weights = forward()
            # The experts would hand a gradient to the weights too.
            torch.autograd.backward([out, row_weights], [grad, torch.ones_like(row_weights)])

        def forward_only() -> None:
            with torch.no_grad():
                forward()

        return {"forward": forward_only, "forward_backward": forward_backward}

    return make


def _dispatcher(kind: str, case: Case, rank: int) -> Any:
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ep_megatron.megatron.token_dispatcher import DeepEPTokenDispatcher

    makers = {
        "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
        "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
        "deepep": DeepEPTokenDispatcher,
    }
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden,
        num_attention_heads=8,
        num_moe_experts=case.num_experts,
        moe_router_topk=case.num_topk,
        moe_token_dispatcher_type="alltoall" if kind == "deepep" else kind,
        expert_model_parallel_size=case.num_ranks,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
    )
    assert dist.get_world_size() == case.num_ranks
    per_rank = case.num_experts // case.num_ranks
    local = list(range(rank * per_rank, (rank + 1) * per_rank))
    return makers[kind](per_rank, local, config=config, pg_collection=get_default_pg_collection())
