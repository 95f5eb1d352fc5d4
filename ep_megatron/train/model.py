"""Config -> megatron-core's GPT model chunks, wrapped for mixed precision and data parallelism."""

import dataclasses
from typing import Any

import torch

from ep_megatron.pipeline.placement import ChunkPlacement, join_chunks
from ep_megatron.train.config import Config
from ep_megatron.train.layer_spec import build_layer_specs, uses_transformer_engine
from ep_megatron.train.model_arguments import MLAArguments
from ep_megatron.train.pipeline import place_models, virtual_chunks

# Config field -> field of Megatron's TransformerConfig, where the names differ.
_RENAMED = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "moe_token_dispatcher": "moe_token_dispatcher_type",
}


def num_virtual_stages(config: Config) -> int | None:
    """Return the model chunks per pipeline rank, or None if the pipeline is not interleaved."""
    if config.pipeline_schedule is not None and config.pipeline_model_parallel_layout is None:
        return virtual_chunks(config)
    if config.pipeline_model_parallel_layout is None:
        return config.num_virtual_stages_per_pipeline_rank
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.get_num_stages_from_str(
        config.pipeline_model_parallel_layout
    )
    chunks = stages // config.pipeline_model_parallel_size
    return chunks if chunks > 1 else None


def transformer_config(config: Config) -> Any:
    """Return Megatron's TransformerConfig for `config`; not collective.

    Fields of the same name are handed on as they are, so Megatron's own checks apply to them.
    """
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    config_class = MLATransformerConfig if config.multi_latent_attention else TransformerConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        target = _RENAMED.get(name, name)
        value = getattr(config, name)
        if target in known and value is not None:
            values[target] = value
    if not config.multi_latent_attention:
        for name in MLAArguments.model_fields:
            values.pop(name, None)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    chunks = num_virtual_stages(config)
    fused = uses_transformer_engine(config.transformer_impl)
    values.update(
        activation_func=torch.nn.functional.silu if config.swiglu else torch.nn.functional.gelu,
        add_bias_linear=not config.disable_bias_linear,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        virtual_pipeline_model_parallel_size=chunks,
        # Messages of two neighbours would cross when an interleaved pipeline batches them.
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=fused and config.swiglu,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=fused,
        apply_rope_fusion=fused,
        persist_layer_norm=fused,
        transformer_impl="transformer_engine" if fused else "local",
    )
    if config.num_experts is None:
        values = {name: value for name, value in values.items() if not name.startswith("moe_")}
    return config_class(**values)


def build_model(config: Config, megatron_config: Any, vocab_size: int) -> list[Any]:
    """Return this rank's model chunks in Megatron's DistributedDataParallel; collective.

    Args:
        config: the run's config.
        megatron_config: `transformer_config(config)`.
        vocab_size: tokens the data may hold.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    chunks = megatron_config.virtual_pipeline_model_parallel_size
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    models = []
    for chunk, placed in enumerate(_places(config, megatron_config)):
        if chunks:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        model = _gpt(config, megatron_config, vocab_size, placed)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        if config.bf16:
            model = Float16Module(megatron_config, model)
        # Both copies of a stage are reduced in the same pieces, so that they stay equal in bits.
        is_whole = chunk > 0 or config.pipeline_schedule == "dualpipe"
        models.append(
            DistributedDataParallel(megatron_config, ddp_config, model, disable_bucketing=is_whole)
        )
    for model in models:
        model.broadcast_params()
    if config.pipeline_schedule is not None:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        join_chunks(config.pipeline_schedule, models, pipeline)
    return models


def _places(config: Config, megatron_config: Any) -> list[ChunkPlacement]:
    """Return where this rank's chunks are, by the schedule or as Megatron places them."""
    if config.pipeline_schedule is not None:
        return place_models(config, megatron_config)
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    chunks = megatron_config.virtual_pipeline_model_parallel_size
    stages = range(chunks) if chunks else [None]
    return [
        ChunkPlacement(
            parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            stage,
            ProcessGroupCollection.use_mpu_process_groups(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        for stage in stages
    ]


def _gpt(config: Config, megatron_config: Any, vocab_size: int, placed: ChunkPlacement) -> Any:
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_model import GPTModel

    multiple = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    # A layout says itself where MTP layers are.
    is_ours = config.pipeline_schedule and not config.pipeline_model_parallel_layout
    has_loss = placed.post_process if is_ours else None
    block, mtp = build_layer_specs(
        megatron_config, config.transformer_impl, placed.vp_stage, placed.pp_rank, has_loss
    )
    model = GPTModel(
        megatron_config,
        block,
        vocab_size=-(-vocab_size // multiple) * multiple,
        max_sequence_length=config.max_position_embeddings or config.seq_length,
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        parallel_output=True,
        mtp_block_spec=mtp,
        **placed.model_arguments(),
    )
    model.model_type = ModelType.encoder_or_decoder
    return model


def build_optimizer(config: Config, models: list[Any]) -> tuple[Any, Any]:
    """Return Megatron's optimizer and its schedule, counted in samples; collective."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer_config = OptimizerConfig(
        optimizer=config.optimizer,
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=config.bf16,
        params_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(optimizer_config, models)
    batch = config.global_batch_size
    wsd_iters = config.lr_wsd_decay_iters
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters * batch,
        lr_decay_steps=(config.lr_decay_iters or config.train_iters) * batch,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters * batch,
        wd_incr_style="constant",
        wsd_decay_steps=wsd_iters * batch if wsd_iters else None,
        lr_wsd_decay_style="linear",
    )
    return optimizer, scheduler
