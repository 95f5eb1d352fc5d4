"""A tiny GPT with experts made of Megatron's own parts, trained for a few steps on any layout.

Used by the tests of the Megatron room: the same seed, data and schedule with different token
dispatchers, so that losses can be compared. No megatron import happens before a function is called,
so that collecting tests needs no Megatron.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

VOCABULARY, SEQUENCE, HIDDEN, SEED = 64, 16, 32, 1234


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; data parallelism takes the ranks that remain."""

    ep: int = 1
    pp: int = 1
    tp: int = 1
    etp: int = 1


@dataclass(frozen=True)
class Case:
    """What one training run varies; `options` are fields of the TransformerConfig."""

    dispatcher: str = "deepep"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    num_steps: int = 50
    num_microbatches: int = 1
    patched_spec: bool = False


@contextlib.contextmanager
def model_parallel(layout: Layout) -> Iterator[None]:
    """Megatron's process groups on the pool's world group, without CUDA, for one `with` block."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ep_megatron.megatron import host

    # Compiling Megatron's small fused functions would take longer than the tests.
    with host.without_cuda(), torch.compiler.set_stance("force_eager"):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        try:
            model_parallel_cuda_manual_seed(SEED)
            yield
        finally:
            parallel_state.destroy_model_parallel()


def make_config(case: Case, layout: Layout) -> Any:
    """TransformerConfig of the tiny model: two MoE layers of 8 experts, top-2, SwiGLU, RMSNorm."""
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 48,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": case.dispatcher,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "bf16": case.dtype == torch.bfloat16,
    }
    is_mla = case.options.get("multi_latent_attention", False)
    return (MLATransformerConfig if is_mla else TransformerConfig)(**fields | case.options)


def moe_layer_spec(config: Any) -> Any:
    """Layer spec without Transformer Engine, every layer a MoE layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        normalization=config.normalization,
    )


def _batches(num_steps: int, num_microbatches: int) -> Iterator[torch.Tensor]:
    """Token blocks `[2, SEQUENCE + 1]` of a noisy counting language, others on each data rank."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(100 + parallel_state.get_data_parallel_rank())
    for _ in range(num_steps * num_microbatches):
        start = torch.randint(VOCABULARY, (2, 1), generator=generator)
        step = torch.randint(1, 4, (2, SEQUENCE + 1), generator=generator)
        yield (start + step.cumsum(1)) % VOCABULARY


def _build_model(config: Any, spec: Any) -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    if config.bf16:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=False)
    model = DistributedDataParallel(config=config, ddp_config=ddp_config, module=model)
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=3e-3,
        min_lr=3e-3,
        weight_decay=0.0,
        clip_grad=1.0,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
    )
    return model, get_megatron_optimizer(optimizer_config, [model])


def _forward_step(
    losses: list[float],
    data: Iterator[torch.Tensor],
    model: Any,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(SEQUENCE).expand_as(inputs)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)

    def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        losses.append(loss.item())
        return loss, {}

    call = model.build_schedule_plan if return_schedule_plan else model
    return call(inputs, positions, mask, labels=labels), loss_of


def train(layout: Layout, case: Case) -> list[float]:
    """Train inside `model_parallel(layout)`; return this rank's loss of every microbatch.

    Collective. Ranks that are not the last pipeline stage return an empty list.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ep_megatron.megatron.plugin import patch_spec

    torch.manual_seed(SEED)
    model_parallel_cuda_manual_seed(SEED)
    config = make_config(case, layout)
    spec = moe_layer_spec(config)
    model, optimizer = _build_model(config, patch_spec(spec) if case.patched_spec else spec)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    losses: list[float] = []
    data = _batches(case.num_steps, case.num_microbatches)
    for _ in range(case.num_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, losses),
            data_iterator=data,
            model=[model],
            num_microbatches=case.num_microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        optimizer.step()
    return losses


@contextlib.contextmanager
def with_plugin(backend: str = "auto", **options: Any) -> Iterator[None]:
    """Megatron with "deepep" for one `with` block."""
    from ep_megatron.megatron import plugin

    plugin.install(backend, **options)
    try:
        yield
    finally:
        plugin.uninstall()


def train_each(rank: int, layout: Layout, cases: list[Case]) -> list[list[float]]:
    """Run on every rank: the losses of each case, one after the other on one layout."""
    assert rank == dist.get_rank()
    with model_parallel(layout), with_plugin():
        return [train(layout, case) for case in cases]
