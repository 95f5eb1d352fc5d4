"""A small GPT with experts, whole on one rank or in pieces on a pipeline, to be compared in bits.

Weights depend on a parameter's name and its layer's and expert's number in the whole model alone,
tokens on the micro-batch and the expert-parallel rank: so a rank can compute for itself what the
whole model gives, and compare.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron_gpt import Case as GptCase
from tests.megatron_gpt import Layout, make_config, with_plugin
from tests.ranks import drop_groups

VOCABULARY, SEQUENCE, BATCH = 64, 8, 2
NUM_LAYERS = 8
WAIT = 120.0  # seconds for another stage


@dataclass(frozen=True)
class Shape:
    """What a test's model and run vary; `options` are fields of the TransformerConfig."""

    dtype: torch.dtype = torch.float64
    num_layers: int = NUM_LAYERS
    num_microbatches: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    is_ragged: bool = False
    is_tied: bool = False


def config_of(shape: Shape, layout: Layout, **more: Any) -> Any:
    """TransformerConfig of a model of `shape`: top-2 of 8 experts, aux loss, a shared expert."""
    options: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 24,
        "moe_router_dtype": "fp64" if shape.dtype == torch.float64 else "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_shared_expert_intermediate_size": 16,
        "attention_softmax_in_fp32": False,
        "variable_seq_lengths": shape.is_ragged,
    }
    case = GptCase("deepep", options | shape.options | more, shape.dtype)
    return make_config(case, layout)


def build_gpt(
    config: Any, shape: Shape, pp_rank: int | None = None, vp_stage: int | None = None, **more: Any
) -> Any:
    """One chunk, or the whole model, with its weights set; `more` are arguments of GPTModel."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from ep_megatron.train.layer_spec import build_layer_specs

    spec, mtp = build_layer_specs(
        config, "local", vp_stage, pp_rank, has_loss=more.get("post_process", True)
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.is_tied,
        vp_stage=vp_stage,
        **more,
    ).to(shape.dtype)
    with torch.no_grad():
        for name, parameter in global_names(model):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(_whole(parameter), generator=generator, dtype=torch.float64) * 0.1
            if "norm" in name and name.endswith("weight"):
                values += 1
            parameter.copy_(_shard(values, parameter))
    return model


def _whole(parameter: Tensor) -> list[int]:
    from megatron.core import parallel_state

    sizes = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        ranks = (
            parallel_state.get_tensor_model_parallel_world_size()
            if getattr(parameter, "allreduce", True)
            else parallel_state.get_expert_tensor_parallel_world_size()
        )
        sizes[parameter.partition_dim] *= ranks  # type: ignore[attr-defined]
    return sizes


def _shard(values: Tensor, parameter: Tensor) -> Tensor:
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return values
    is_dense = getattr(parameter, "allreduce", True)
    rank = (
        parallel_state.get_tensor_model_parallel_rank()
        if is_dense
        else parallel_state.get_expert_tensor_parallel_rank()
    )
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    return values.narrow(dim, rank * parameter.shape[dim], parameter.shape[dim])


def global_names(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield every parameter under a name that is the same in the whole model."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if name.startswith("decoder.layers."):
            layer = model.decoder.layers[int(parts[2])]
            parts[2] = str(layer.layer_number)
        elif name.startswith("mtp.layers."):
            layer = model.mtp.layers[int(parts[2])].transformer_layer
        if "layers" in parts:
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                parts[at] = str(layer.mlp.local_expert_indices[int(parts[at])])
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            parts = ["embedding", "word_embeddings", "weight"]
        yield ".".join(parts), parameter


def batch(shape: Shape, microbatch: int, data_rank: int) -> Tensor:
    """Tokens `[BATCH, S + 1]`; S is another for each micro-batch where they are ragged."""
    length = 2 + microbatch % (SEQUENCE - 1) if shape.is_ragged else SEQUENCE
    generator = torch.Generator().manual_seed(1000 * data_rank + microbatch)
    return torch.randint(VOCABULARY, (BATCH, length + 1), generator=generator)


def microbatches(shape: Shape, data_rank: int) -> Iterator[Tensor]:
    """All micro-batches of a step, step after step."""
    while True:
        for microbatch in range(shape.num_microbatches):
            yield batch(shape, microbatch, data_rank)


def forward_step(data: Iterator[Tensor], model: Any) -> tuple[Any, Callable[..., Any]]:
    """What a user of Megatron writes."""
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    length = inputs.shape[1]
    positions = torch.arange(length).expand_as(inputs)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(inputs, positions, mask, labels=labels), functools.partial(_loss)


def _loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.mean()
    return loss, {"lm loss": loss.detach().clone()}


def forward_step_per_token(data: Iterator[Tensor], model: Any) -> tuple[Any, Callable[..., Any]]:
    """The same for `calculate_per_token_loss`: the sum of the losses, and of how many tokens."""
    return forward_step(data, model)[0], _loss_per_token


def _loss_per_token(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = output.sum()
    num_tokens = torch.tensor(output.numel(), dtype=torch.int)
    return loss, num_tokens, {"lm loss": loss.detach().clone()}


def whole_layout() -> Layout:
    """The layout of the whole model on the ranks that are: theirs without a pipeline."""
    from megatron.core import parallel_state

    return Layout(
        ep=parallel_state.get_expert_model_parallel_world_size(),
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def whole_model(
    shape: Shape, data_rank: int, only: range | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients of ordinary forwards and backwards of the whole model on this rank.

    Collective over the expert-parallel ranks. Of all micro-batches, or of those in `only`.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    model = build_gpt(config_of(shape, whole_layout()), shape, pp_rank=0)
    losses = []
    data = microbatches(shape, data_rank)
    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        scaler.set_loss_scale(torch.ones(1) / shape.num_microbatches)
    for microbatch in range(shape.num_microbatches):
        if only is not None and microbatch not in only:
            next(data)
            continue
        output, loss_of = forward_step(data, model)
        loss, reported = loss_of(output)
        (loss / shape.num_microbatches).backward()
        losses.append(reported["lm loss"])
    return losses, {
        name: parameter.grad
        for name, parameter in global_names(model)
        if parameter.grad is not None
    }


@contextlib.contextmanager
def pipeline_ranks(name: str, layout: Layout, wire: str = "bf16") -> Iterator[None]:
    """Megatron's process groups for a schedule, with our dispatcher and without CUDA.

    Rows and gradients travel to the experts as `wire` says.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import RotaryEmbedding
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from ep_megatron.megatron import host

    groups_before = list(dist.distributed_c10d._world.pg_map)
    plugin = with_plugin(dispatch_dtype=wire, combine_grad_dtype=wire)
    with host.without_cuda(), torch.compiler.set_stance("force_eager"), plugin:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=virtual_size(name, layout),
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        try:
            model_parallel_cuda_manual_seed(1)
            yield
            dist.barrier()  # before the groups of this layout end
        finally:
            # Globals of Megatron's, as long as the first model that used them has layers.
            get_moe_layer_wise_logging_tracker().clear()
            MTPLossLoggingHelper.tracker = {}
            RotaryEmbedding.forward.cache_clear()  # holds models, and so their groups
            parallel_state.destroy_model_parallel()
        drop_groups(groups_before)


def virtual_size(name: str, layout: Layout) -> int | None:
    """Megatron's virtual pipeline size for a schedule: two chunks where it takes any number."""
    from ep_megatron.pipeline import placement

    if layout.pp == 1:
        return None
    return 2 if name == "interleaved-overlap" else placement.num_virtual_chunks(name)


def build_chunks(name: str, shape: Shape, layout: Layout) -> list[Any]:
    """This rank's chunks for a schedule."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from ep_megatron.pipeline import placement

    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = virtual_size(name, layout)
    config = config_of(
        shape,
        layout,
        virtual_pipeline_model_parallel_size=virtual,
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=False,
    )
    if layout.pp == 1 and name in placement.V_SHAPED:
        return _v_on_one_rank(shape, layout, groups)
    chunks = []
    for chunk in range(placement.num_models(name, virtual)):
        placed = placement.place_chunk(name, chunk, config, groups)
        chunks.append(build_gpt(config, shape, placed.pp_rank, **placed.model_arguments()))
    placement.join_chunks(name, chunks, groups.pp)
    return chunks


def _v_on_one_rank(shape: Shape, layout: Layout, groups: Any) -> list[Any]:
    """Both chunks of a V with P = 1: Megatron itself has no virtual stages without a pipeline."""
    from ep_megatron.pipeline import placement

    config = config_of(shape, replace(layout, pp=2))
    chunks = []
    for half in range(2):
        its_groups = placement.groups_of_half(groups, half)
        ends = {"pre_process": half == 0, "post_process": half == 1}
        chunks.append(build_gpt(config, shape, half, pg_collection=its_groups, **ends))
    return chunks


def run_schedule(
    name: Any, shape: Shape, chunks: list[Any], data_rank: int, **settings: Any
) -> list[Tensor]:
    """One step of a schedule over `chunks`; the losses reported here."""
    from ep_megatron.pipeline.forward_backward import get_forward_backward_func

    reported = get_forward_backward_func(name, timeout=WAIT, **settings)(
        forward_step_func=forward_step,
        data_iterator=[microbatches(shape, data_rank) for _ in chunks],
        model=chunks,
        num_microbatches=shape.num_microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
    )
    return [losses["lm loss"] for losses in reported]
