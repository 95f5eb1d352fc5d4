"""The model that `bench-pipeline` runs: a small GPT of Megatron's own layers, all of them MoE.

As many experts as ranks and as many slots: every token has an expert on every rank, so all ranks
and micro-batches have the same load, and a step is the same from run to run.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_megatron.pipeline.placement import V_SHAPED, groups_of_half, join_chunks, place_chunk

VOCABULARY = 64
EXPERT_RANKS = 2


@dataclass(frozen=True)
class Sizes:
    """Of the model and its micro-batches."""

    num_layers: int = 2
    hidden: int = 128
    sequence: int = 256
    batch: int = 8

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows that one exchange sends to the other host."""
        return self.sequence * self.batch * self.hidden * 4


def num_virtual_stages(stages: int) -> int | None:
    """Return Megatron's virtual pipeline size: two chunks per rank, where there is a pipeline."""
    return 2 if stages > 1 else None


def build_chunks(schedule: str, sizes: Sizes, stages: int) -> list[Any]:
    """Return this rank's chunks for a schedule on so many pipeline ranks.

    Two per rank; all in one for a schedule without a V on one rank. Collective over all ranks,
    which then have their parts of one model.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    if stages > 1:
        config = _config(sizes, stages, num_virtual_stages(stages))
        for chunk in range(2):
            placed = place_chunk(schedule, chunk, config, groups)
            ends = placed.pre_process, placed.post_process
            place = placed.pp_rank, placed.vp_stage
            chunks.append(_gpt(config, sizes, place, placed.pg_collection, ends))
        join_chunks(schedule, chunks, groups.pp)
        return chunks
    if schedule not in V_SHAPED:
        return [_gpt(_config(sizes, 1), sizes, (0, None), groups, (True, True))]
    for half in range(2):
        its_groups = groups_of_half(groups, half)
        config = _config(sizes, 2)
        chunks.append(_gpt(config, sizes, (half, None), its_groups, (half == 0, half == 1)))
    return chunks


def _config(sizes: Sizes, num_stages: int, num_virtual: int | None = None) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden,
        num_attention_heads=2,
        ffn_hidden_size=sizes.hidden // 4,
        moe_ffn_hidden_size=sizes.hidden // 4,
        num_moe_experts=EXPERT_RANKS,
        moe_router_topk=EXPERT_RANKS,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="deepep",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=num_virtual,
        overlap_p2p_comm=num_virtual is not None,
        batch_p2p_comm=False,
        expert_model_parallel_size=EXPERT_RANKS,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )


def _gpt(
    config: Any,
    sizes: Sizes,
    place: tuple[int, int | None],
    groups: Any,
    ends: tuple[bool, bool],
) -> Any:
    """Return one chunk; `place` is its pipeline rank and virtual stage."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from ep_megatron.train.layer_spec import build_layer_specs

    pp_rank, vp_stage = place
    spec, _ = build_layer_specs(config, "local", vp_stage, pp_rank)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=sizes.sequence,
        pre_process=ends[0],
        post_process=ends[1],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
        vp_stage=vp_stage,
    )


def batches(sizes: Sizes, data_rank: int, num_microbatches: int) -> Iterator[Tensor]:
    """Yield a step's micro-batches, `[batch, sequence + 1]` tokens; the same ones every time."""
    generator = torch.Generator().manual_seed(data_rank)
    for _ in range(num_microbatches):
        yield torch.randint(VOCABULARY, (sizes.batch, sizes.sequence + 1), generator=generator)


def forward_step(data: Iterator[Tensor], model: Any) -> tuple[Any, Callable[..., Any]]:
    """Make the call that a user of Megatron writes."""
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return model(inputs, positions, None, labels=labels), functools.partial(_loss)


def _loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.mean()
    return loss, {"lm loss": loss.detach().clone()}


def gradients(chunks: list[Any]) -> dict[str, Tensor]:
    """Return a copy of all gradients of this rank, by name, and forget them."""
    found = {}
    for chunk, model in enumerate(chunks):
        for name, parameter in model.named_parameters():
            found[f"{chunk}.{name}"] = parameter.grad.clone()
            parameter.grad = None
    return found
