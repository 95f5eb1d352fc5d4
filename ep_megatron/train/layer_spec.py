"""The layers of the model: Transformer Engine's where it is installed, else megatron-core's own.

megatron-core's own ("local") layers lack a norm that knows sequence parallelism and an attention
whose values may be narrower than its keys (multi-latent attention). Both are a few lines of torch,
used for all local layers; torch's attention kernel is also the faster one on CPUs.
"""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional

logger = logging.getLogger(__name__)


class RMSNorm(nn.Module):
    """torch's RMSNorm whose weight is marked for Megatron's sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of marked weights over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., H], normalised."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class CausalAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, for one whole sequence per rank."""

    def __init__(
        self,
        config: Any,
        attention_dropout: float | None = None,
        softmax_scale: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                "attention: expected context-parallel-size to be 1 for local layers, got "
                f"{config.context_parallel_size}; context parallelism needs Transformer Engine"
            )
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Return [S, B, heads * Dv] for query [S, B, heads, D] and key, value [S, B, groups, *]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def uses_transformer_engine(transformer_impl: str | None) -> bool:
    """Return whether layers come from Transformer Engine.

    Raises:
        ValueError: it was asked for and is not installed.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if transformer_impl == "transformer_engine" and not installed:
        raise ValueError(
            "model: expected Transformer Engine to be installed for transformer-impl "
            "'transformer_engine', got none; install it or choose 'local'"
        )
    return installed and transformer_impl != "local"


def build_layer_specs(
    config: Any,
    transformer_impl: str | None,
    vp_stage: int | None,
    pp_rank: int | None = None,
    has_loss: bool | None = None,
) -> Any:
    """Return the block spec of this pipeline stage, and that of its MTP layers or None.

    Args:
        config: Megatron's TransformerConfig.
        transformer_impl: the config key of that name.
        vp_stage: the model chunk of an interleaved pipeline, else None.
        pp_rank: pipeline rank that the chunk is built as; None is this process's.
        has_loss: whether the chunk has the loss, and with it MTP layers; None asks Megatron, which
            goes by this process's pipeline rank.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlockSubmodules,
        get_mtp_layer_spec,
    )

    engine = uses_transformer_engine(transformer_impl)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=engine,
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if not engine:
        for layer in block.layer_specs:
            _use_torch_modules(layer, config.normalization)
        if block.layer_norm is not None and config.normalization == "RMSNorm":
            block.layer_norm = RMSNorm
    if not config.mtp_num_layers or has_loss is False:
        return block, None
    if block.layer_specs:
        last = block.layer_specs[-1]
    else:
        # A stage may hold MTP layers alone; they are like the last decoder layer.
        last = get_gpt_decoder_layer_specs(config, engine, config.normalization)[-1]
        if not engine:
            _use_torch_modules(last, config.normalization)
    if has_loss:
        layer = get_mtp_layer_spec(last, engine)
        mtp = MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * config.mtp_num_layers)
    else:
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=engine, vp_stage=vp_stage)
    return block, mtp


def _use_torch_modules(layer: Any, normalization: str) -> None:
    """Put CausalAttention and RMSNorm into a layer's spec, in place."""
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if normalization != "RMSNorm":
        return
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    for name in ("q_layernorm", "kv_layernorm", "k_layernorm"):
        norm = getattr(attention, name, None)
        if norm is not None and norm.__name__ != "IdentityOp":
            setattr(attention, name, RMSNorm)
