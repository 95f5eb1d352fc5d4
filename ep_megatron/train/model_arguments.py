"""The keys of a config that describe the model: Megatron's argument names and meanings."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ep_megatron.fp8 import WireDtype
from ep_megatron.train.section import Section

_PATTERN_TERM = re.compile(r"\[([01](?:,[01])*)\](?:\*(\d+))?")


def parse_layer_pattern(value: object) -> object:
    """Return a layer pattern such as '[0]*1+[1]*3' as a list; anything else as it is."""
    if not isinstance(value, str) or value.strip().isdigit():
        return value
    layers: list[int] = []
    for term in value.replace(" ", "").split("+"):
        match = _PATTERN_TERM.fullmatch(term)
        if match is None:
            raise ValueError(f"expected a pattern like '[0]*1+[1]*3', got the term {term!r}")
        layers += [int(flag) for flag in match[1].split(",")] * int(match[2] or 1)
    return layers


class ModelArguments(Section):
    """Shape of the transformer."""

    num_layers: PositiveInt
    """Number of transformer layers."""
    hidden_size: PositiveInt
    """Elements per token."""
    num_attention_heads: PositiveInt
    """Number of attention heads."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads of grouped-query attention; one per head when left out."""
    kv_channels: PositiveInt | None = None
    """Elements per attention head; hidden-size / num-attention-heads when left out."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the dense MLP; 4 x hidden-size when left out."""
    seq_length: PositiveInt
    """Tokens per sequence."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence the positions are made for; seq-length when left out."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalisation of the layers."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of the normalisation."""
    qk_layernorm: bool = False
    """Normalise queries and keys."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions are told apart."""
    rotary_base: PositiveInt = 10000
    """Base of the rotary embedding."""
    rotary_percent: PositiveFloat = 1.0
    """Share of each head that is rotated."""
    swiglu: bool = True
    """Gated SiLU MLPs, instead of GELU."""
    disable_bias_linear: bool = True
    """No bias in linear layers."""
    untie_embeddings_and_output_weights: bool = True
    """Own weights for the output layer."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded to a multiple of this times tensor-model-parallel-size."""
    hidden_dropout: NonNegativeFloat = 0.0
    """Dropout after attention and MLP."""
    attention_dropout: NonNegativeFloat = 0.0
    """Dropout of attention probabilities."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    mtp_num_layers: PositiveInt | None = None
    """Multi-token-prediction layers."""
    mtp_loss_scaling_factor: NonNegativeFloat = 0.1
    """Weight of the multi-token-prediction loss."""
    transformer_impl: Literal["local", "transformer_engine"] | None = None
    """Layers of megatron-core itself or of Transformer Engine; the latter if it is installed."""


class MLAArguments(Section):
    """Multi-latent attention."""

    multi_latent_attention: bool = False
    """Multi-latent attention (DeepSeek)."""
    q_lora_rank: PositiveInt | None = None
    """Rank of the query projection; full when left out."""
    kv_lora_rank: PositiveInt = 512
    """Rank of the key and value projection."""
    qk_head_dim: PositiveInt = 128
    """Elements of a query or key without position."""
    qk_pos_emb_head_dim: PositiveInt = 64
    """Elements of a query or key that are rotated."""
    v_head_dim: PositiveInt = 128
    """Elements of a value."""
    rope_type: Literal["rope", "yarn"] | None = None
    """Rotary embedding of multi-latent attention; yarn when left out, as in Megatron."""
    rotary_scaling_factor: PositiveFloat = 40
    """Scaling factor of yarn."""
    original_max_position_embeddings: PositiveInt = 4096
    """Sequence length that yarn stretches."""
    mscale: PositiveFloat = 1.0
    """Attention scale of yarn."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """Attention scale of yarn for all dimensions."""


class MoEArguments(Section):
    """Mixture of experts and the dispatcher that serves it."""

    num_experts: PositiveInt | None = None
    """Number of routed experts; a dense model when left out."""
    moe_layer_freq: Annotated[PositiveInt | list[int], BeforeValidator(parse_layer_pattern)] = 1
    """Every n-th layer is MoE, or a pattern such as '[0]*1+[1]*3' (0 is dense)."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Width of one expert; ffn-hidden-size when left out."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Width of the shared expert; none when left out."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens travel."""
    moe_router_topk: PositiveInt = 2
    """Experts per token."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the router."""
    moe_router_pre_softmax: bool = False
    """Softmax before, not after, the top-k."""
    moe_router_num_groups: PositiveInt | None = None
    """Groups of experts in group-limited routing."""
    moe_router_group_topk: PositiveInt | None = None
    """Groups a token may choose from."""
    moe_router_topk_scaling_factor: PositiveFloat | None = None
    """Factor on the router's probabilities."""
    moe_router_enable_expert_bias: bool = False
    """Balance the load by a bias per expert instead of by a loss."""
    moe_router_bias_update_rate: NonNegativeFloat = 1e-3
    """Step of that bias."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router; that of the weights when left out."""
    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"
    ] = "aux_loss"
    """Load-balancing loss."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss."""
    moe_z_loss_coeff: NonNegativeFloat | None = None
    """Weight of the router's z-loss."""
    moe_expert_capacity_factor: PositiveFloat | None = None
    """Capacity of an expert as a multiple of its fair share; no token is dropped when left out."""
    moe_pad_expert_input_to_capacity: bool = False
    """Pad each expert's tokens to its capacity."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens exceed the capacity."""
    moe_apply_probs_on_input: bool = False
    """Weight an expert's input instead of its output (top-1 only)."""
    moe_grouped_gemm: bool = False
    """Compute all local experts in one grouped GEMM (needs a GPU)."""
    moe_permute_fusion: bool = False
    """Fused permutation (needs Transformer Engine)."""
    moe_token_dispatcher: Literal["deepep", "alltoall", "allgather", "flex"] = "deepep"
    """How tokens reach their experts; `moe-token-dispatcher-type` is the same key."""
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """Backend of the flex dispatcher."""
    ep_backend: Literal["auto", "shared_memory", "hierarchical", "process_group"] = "auto"
    """What carries the tokens of the deepep dispatcher."""
    moe_dispatch_dtype: WireDtype = "bf16"
    """How rows travel to their experts: as they are, as FP8 (blocks of 128 columns) or MXFP8."""
    moe_combine_grad_dtype: WireDtype = "bf16"
    """Likewise for the gradients that go back the same way."""
    moe_layer_recompute: bool = False
    """Recompute MoE layers in the backward pass."""


class RecomputeArguments(Section):
    """Activations computed again in the backward pass instead of kept."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers or chosen modules."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers a full recomputation covers."""
    recompute_num_layers: NonNegativeInt | None = None
    """Layers per recomputed unit."""
    recompute_modules: list[str] | None = None
    """Modules of a selective recomputation: core_attn, moe, mlp, layernorm, moe_act ..."""
