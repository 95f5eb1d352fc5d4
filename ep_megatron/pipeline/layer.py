"""The layers of a megatron-core GPT chunk as nodes: attention+router | experts | residual.

Nothing is copied or wrapped inside the model: the nodes call the layers' own parts in the order in
which `TransformerLayer.forward` and `MoELayer.forward` call them, so parameters, checkpoints and
random numbers are the model's. Layers without experts have no exchange; they run in the compute
node they fall into.

What a model must be is checked once, by `check_chunk`.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_megatron.pipeline.exchange import Combine, Dispatch, Route
from ep_megatron.pipeline.nodes import Compute, Exchange, Pass, Tensors
from ep_megatron.pipeline.observer import Observer
from ep_megatron.pipeline.recompute import CheckpointRandomStates, Recompute, recompute_of
from ep_megatron.pipeline.weight_grad import defer

_Hidden = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the model that a forward step made: GPTModel.forward's arguments by name."""

    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Return an argument."""
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None


def bind_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call of `model`, a GPTModel, with all its arguments named. Not collective.

    Raises:
        ValueError: for arguments that belong to inference.
    """
    bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments.pop("self", None)
    for name in ("inference_context", "inference_params"):
        if arguments.pop(name, None) is not None:
            raise ValueError(f"pipeline: expected {name} to be None, got one; schedules train")
    return Call(arguments)


def check_chunk(model: Any) -> None:
    """Refuse a model whose layers cannot be taken apart. Not collective.

    Raises:
        ValueError: names what is in the way.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from ep_megatron.megatron.token_dispatcher import DeepEPTokenDispatcher

    if not isinstance(model, GPTModel):
        raise ValueError(
            f"pipeline: expected the model to be a GPTModel, got {type(model).__name__}; "
            "Megatron's own schedules take other models"
        )
    config = model.config
    _check_config(config)
    recompute_of(config)
    for layer in model.decoder.layers:
        where = f"layer {layer.layer_number}"
        if not isinstance(layer, TransformerLayer):
            raise ValueError(
                f"pipeline: expected {where} to be a TransformerLayer, got {type(layer).__name__}"
            )
        if not layer.is_moe_layer:
            continue
        dispatcher = layer.mlp.token_dispatcher
        if not isinstance(dispatcher, DeepEPTokenDispatcher):
            raise ValueError(
                f"pipeline: expected the token dispatcher of {where} to be DeepEPTokenDispatcher, "
                f'got {type(dispatcher).__name__}; set moe_token_dispatcher_type to "deepep"'
            )
        if model.training and layer.mlp.attn_tp_group.size() > 1 and not config.sequence_parallel:
            raise ValueError(
                "pipeline: expected sequence_parallel to be on for experts with tensor "
                "parallelism, got off"
            )


def _check_config(config: Any) -> None:
    for name, advice in (
        ("cpu_offloading", "activations stay where they are"),
        ("fine_grained_activation_offloading", "activations stay where they are"),
        ("hybrid_context_parallel", "Megatron has a schedule of its own for it"),
        ("defer_embedding_wgrad_compute", "a schedule with W does the same"),
        ("moe_shared_expert_overlap", "shared experts run beside the exchanges anyway"),
        ("heterogeneous_block_specs", "its layers differ from GPT's"),
    ):
        if getattr(config, name, False):
            raise ValueError(f"pipeline: expected {name} to be off, got on; {advice}")
    if getattr(config, "cuda_graph_impl", "none") != "none":
        raise ValueError(
            "pipeline: expected cuda_graph_impl to be none, got "
            f"{config.cuda_graph_impl}; a graph would hold nodes in one order"
        )


def make_pass(
    model: Any,
    call: Call,
    finish: Callable[[Tensor], Tensor],
    observer: Observer,
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Pass:
    """Return the nodes of one micro-batch in one chunk. Not collective.

    The pass takes one input, the hidden states `[S, B, H]` of the stage before or None, and gives
    one output: hidden states, or on the last stage what `finish` makes of the model's output.

    Args:
        model: a GPTModel that `check_chunk` let through.
        call: the micro-batch.
        finish: model output -> the pass's output, inside the last node.
        observer: is told of the nodes.
        scope: entered around every compute node.
    """
    return _Builder(model, call, finish, scope).build(observer)


class _Builder:
    """Puts the nodes of one pass together; the nodes' functions are its bound methods."""

    def __init__(
        self,
        model: Any,
        call: Call,
        finish: Callable[[Tensor], Tensor],
        scope: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self.model, self.call, self.finish, self.scope = model, call, finish, scope
        self.config = model.config
        self.rotary: dict[str, Any] = {}
        self.padding_mask: Tensor | None = None

    def build(self, observer: Observer) -> Pass:
        recompute = recompute_of(self.config) if self.model.training else Recompute()
        compute: list[Compute] = []
        exchanges: list[Exchange] = []
        begin: _Hidden = self._enter
        dense: list[Any] = []
        for index, layer in enumerate(self.model.decoder.layers):
            if not layer.is_moe_layer:
                dense.append(layer)
                continue
            route = self._route(layer, index)
            attention = functools.partial(self._until_router, begin, tuple(dense), layer, route)
            experts = functools.partial(self._experts, layer, route)
            compute.append(self._node("attention", index, attention, recompute.attention))
            exchanges.append(Dispatch(route))
            compute.append(self._node("experts", index, experts, recompute.experts))
            exchanges.append(Combine(route))
            begin, dense = functools.partial(self._residual, layer, route), []
        tail = functools.partial(self._leave, begin, tuple(dense))
        name = "head" if self.model.post_process else "residual"
        compute.append(self._node(name, None, tail, recompute.tail and not self.model.post_process))
        return Pass(compute, exchanges, observer)

    def _node(
        self, name: str, layer: int | None, function: Callable[..., Tensors], again: bool
    ) -> Compute:
        random = CheckpointRandomStates() if again else None
        return Compute(name, layer, function, random, self.scope)

    def _route(self, layer: Any, index: int) -> Route:
        dispatcher = layer.mlp.token_dispatcher
        return Route(
            dispatcher.buffer,
            dispatcher.num_experts,
            dispatcher.expert_alignment,
            index,
            dispatcher.dispatch_fp8,
            dispatcher.combine_grad_fp8,
        )

    def _enter(self, hidden: Tensor | None = None) -> Tensor:
        model, call = self.model, self.call
        if not model.pre_process:
            model.decoder.set_input_tensor(hidden)
        prepared = model._preprocess(
            input_ids=call.input_ids,
            position_ids=call.position_ids,
            decoder_input=call.decoder_input,
            packed_seq_params=call.packed_seq_params,
            padding_mask=call.padding_mask,
        )
        names = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "sequence_len_offset")
        self.rotary = dict(zip(names, prepared[1:5], strict=True))
        self.padding_mask = prepared[5]
        if model.pre_process:
            hidden = prepared[0]
        else:
            model.decoder.set_input_tensor(None)
        assert hidden is not None
        return hidden

    def _until_router(
        self, begin: _Hidden, dense: tuple[Any, ...], layer: Any, route: Route, *inputs: Tensor
    ) -> Tensors:
        hidden = self._dense(dense, begin(*inputs))
        moe = layer.mlp
        mask = self.padding_mask
        with self._layer_scope(layer):
            hidden = self._attention(layer, hidden)
            normed = layer.pre_mlp_layernorm(hidden)
            shared = moe.shared_experts_compute(normed)
            mask = None if mask is None else mask.transpose(0, 1).bool()
            probs, routing_map = moe.route(normed, mask)
            tokens, weights = moe.preprocess(normed, probs, routing_map)
        # Kept here, as another micro-batch may use the dispatcher before this one's residual.
        route.topk_idx = moe.token_dispatcher.topk_idx
        route.hidden_shape = moe.token_dispatcher.hidden_shape
        self._defer_engine(layer.self_attention, moe.shared_experts)
        return (tokens, weights, hidden) if shared is None else (tokens, weights, hidden, shared)

    def _experts(self, layer: Any, route: Route, rows: Tensor, row_weights: Tensor) -> Tensors:
        assert route.handle is not None
        counts = torch.tensor(
            route.handle.num_recv_tokens_per_expert, dtype=torch.int64, device="cpu"
        )
        with self._layer_scope(layer):
            output, bias = layer.mlp.experts(rows, counts, row_weights)
        if bias is not None:
            raise ValueError(
                f"pipeline: expected experts of layer {layer.layer_number} to have no bias, got "
                "one; set add_bias_linear=False"
            )
        self._defer_engine(layer.mlp.experts)
        return (output,)

    def _residual(
        self,
        layer: Any,
        route: Route,
        combined: Tensor,
        hidden: Tensor,
        shared: Tensor | None = None,
    ) -> Tensor:
        with self._layer_scope(layer):
            layer.mlp.token_dispatcher.hidden_shape = route.hidden_shape
            output = layer.mlp.postprocess(combined, shared)
            result: Tensor = layer._forward_post_mlp((output, None), hidden)
        return result

    def _dense(self, layers: tuple[Any, ...], hidden: Tensor) -> Tensor:
        for layer in layers:
            with self._layer_scope(layer):
                hidden = layer._forward_mlp(
                    self._attention(layer, hidden), padding_mask=self.padding_mask
                )
            self._defer_engine(layer.self_attention, layer.mlp)
        return hidden

    def _attention(self, layer: Any, hidden: Tensor) -> Tensor:
        extra = self.call.extra_block_kwargs or {}
        attended: Tensor = layer._forward_attention(
            hidden_states=hidden,
            attention_mask=self.call.attention_mask,
            packed_seq_params=self.call.packed_seq_params,
            padding_mask=self.padding_mask,
            **self.rotary,
            **extra,
        )[0]
        return attended

    def _leave(self, begin: _Hidden, dense: tuple[Any, ...], *inputs: Tensor) -> Tensors:
        model, call = self.model, self.call
        hidden = self._dense(dense, begin(*inputs))
        if model.decoder.final_layernorm is not None:
            hidden = model.decoder.final_layernorm(hidden)
        output = model._postprocess(
            hidden_states=hidden,
            input_ids=call.input_ids,
            position_ids=call.position_ids,
            labels=call.labels,
            mtp_in_postprocess=model.mtp_process,
            loss_mask=call.loss_mask,
            attention_mask=call.attention_mask,
            packed_seq_params=call.packed_seq_params,
            runtime_gather_output=call.runtime_gather_output,
            extra_block_kwargs=call.extra_block_kwargs,
            **self.rotary,
        )
        return (self.finish(output),)

    @contextlib.contextmanager
    def _layer_scope(self, layer: Any) -> Iterator[None]:
        """Enter what TransformerBlock enters around a layer."""
        from megatron.core.fp8_utils import get_fp8_context
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with contextlib.ExitStack() as stack:
            if self.config.sequence_parallel:
                stack.enter_context(get_cuda_rng_tracker().fork())
            if self.config.fp8:
                # With delayed scaling the recipe is one for all layers.
                delayed = self.config.fp8_recipe == "delayed"
                number = () if delayed else (layer.layer_number - 1,)
                stack.enter_context(get_fp8_context(self.config, *number))
            yield

    def _defer_engine(self, *modules: Any) -> None:
        """Leave the weight gradients that Transformer Engine's layers hold back to the node."""
        if self.config.delay_wgrad_compute and torch.is_grad_enabled():
            for module in modules:
                if module is not None:
                    defer(module.backward_dw)
