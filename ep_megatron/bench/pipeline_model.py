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

from ep_megatron.pipeline.placement import V_SHAPED, groups_of_half

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


def build_chunks(schedule: str, sizes: Sizes) -> list[Any]:
    """Return this rank's chunks for a schedule on one pipeline rank: two halves of a V, or all.

    Collective over the expert ranks, which then have their parts of one model.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    if schedule not in V_SHAPED:
        return [_gpt(_config(sizes, 1), sizes, 0, groups, (True, True))]
    chunks = []
    for half in range(2):
        its_groups = groups_of_half(groups, half)
        config = _config(sizes, 2)
        chunks.append(_gpt(config, sizes, half, its_groups, (half == 0, half == 1)))
    return chunks


def _config(sizes: Sizes, num_stages: int) -> Any:
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
        expert_model_parallel_size=EXPERT_RANKS,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )


def _gpt(config: Any, sizes: Sizes, pp_rank: int, groups: Any, ends: tuple[bool, bool]) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from ep_megatron.train.layer_spec import build_layer_specs

    spec, _ = build_layer_specs(config, "local", None, pp_rank)
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
