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
from ep_megatron.pipeline.prediction import Predictions, Step
from ep_megatron.pipeline.recompute import CheckpointRandomStates, Recompute, recompute_of
from ep_megatron.pipeline.weight_grad import defer


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
    if model.mtp_process and not model.post_process:
        raise ValueError(
            "pipeline: expected layers of multi-token prediction to be on the stage of the loss, "
            "got them on another; leave them out of pipeline_model_parallel_layout"
        )
    for layer in layers_of(model):
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


def layers_of(model: Any) -> list[Any]:
    """Return all transformer layers of a GPTModel, those of multi-token prediction last."""
    layers = list(model.decoder.layers)
    if model.mtp_process:
        layers += [layer.transformer_layer for layer in model.mtp.layers]
    return layers


def _through(steps: tuple[Step, ...], hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for step in steps:
        hidden = step(*hidden)
    return hidden


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
        self.recompute = recompute_of(model.config) if model.training else Recompute()
        self.compute: list[Compute] = []
        self.exchanges: list[Exchange] = []
        self.num_layers = 0
        # What the next compute node begins with, and does then; hidden states first, and with
        # them those that the loss will need of depths that are done.
        self.begin: Step = self._enter
        self.steps: list[Step] = []
        self.rotary: dict[str, Any] = {}
        self.padding_mask: Tensor | None = None

    def build(self, observer: Observer) -> Pass:
        model = self.model
        for layer in model.decoder.layers:
            self._append(layer)
        self.steps.append(self._final_norm)
        if model.mtp_process:
            for before, layer, behind in Predictions(model, self.call).layers():
                self.steps.append(before)
                self._append(layer)
                self.steps.append(behind)
        tail = functools.partial(self._leave, self.begin, tuple(self.steps))
        name = "head" if model.post_process else "residual"
        again = self.recompute.tail and not model.post_process
        self.compute.append(self._node(name, None, tail, again))
        return Pass(self.compute, self.exchanges, observer)

    def _append(self, layer: Any) -> None:
        """Add a layer's nodes and exchanges; without experts, a step of the node it falls into."""
        index = self.num_layers
        self.num_layers += 1
        if not layer.is_moe_layer:
            self.steps.append(functools.partial(self._dense, layer))
            return
        route = self._route(layer, index)
        attention = functools.partial(
            self._until_router, self.begin, tuple(self.steps), layer, route
        )
        experts = functools.partial(self._experts, layer, route)
        self.compute.append(self._node("attention", index, attention, self.recompute.attention))
        self.exchanges.append(Dispatch(route))
        self.compute.append(self._node("experts", index, experts, self.recompute.experts))
        self.exchanges.append(Combine(route))
        self.begin, self.steps = functools.partial(self._residual, layer, route), []

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

    def _enter(self, hidden: Tensor | None = None) -> tuple[Tensor, ...]:
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
        return (hidden,)

    def _until_router(
        self, begin: Step, steps: tuple[Step, ...], layer: Any, route: Route, *inputs: Tensor
    ) -> Tensors:
        hidden, *earlier = _through(steps, begin(*inputs))
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
        return (tokens, weights, hidden, *(() if shared is None else (shared,)), *earlier)

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
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        shared, earlier = None, list(others)
        if layer.mlp.use_shared_expert:
            shared, *earlier = others
        with self._layer_scope(layer):
            layer.mlp.token_dispatcher.hidden_shape = route.hidden_shape
            output = layer.mlp.postprocess(combined, shared)
            result: Tensor = layer._forward_post_mlp((output, None), hidden)
        return (result, *earlier)

    def _dense(self, layer: Any, hidden: Tensor, *earlier: Tensor) -> tuple[Tensor, ...]:
        with self._layer_scope(layer):
            hidden = layer._forward_mlp(
                self._attention(layer, hidden), padding_mask=self.padding_mask
            )
        self._defer_engine(layer.self_attention, layer.mlp)
        return (hidden, *earlier)

    def _final_norm(self, hidden: Tensor, *earlier: Tensor) -> tuple[Tensor, ...]:
        norm = self.model.decoder.final_layernorm
        return (hidden if norm is None else norm(hidden), *earlier)

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

    def _leave(self, begin: Step, steps: tuple[Step, ...], *inputs: Tensor) -> Tensors:
        model, call = self.model, self.call
        last, *earlier = _through(steps, begin(*inputs))
        output = model._postprocess(
            # Depth after depth, as Megatron's MTP block hands them on.
            hidden_states=torch.cat([*earlier, last]) if earlier else last,
            input_ids=call.input_ids,
            position_ids=call.position_ids,
            labels=call.labels,
            mtp_in_postprocess=False,  # they were nodes
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
                # Megatron gives MTP layers no number of their own.
                is_alike = (
                    self.config.fp8_recipe == "delayed"
                    or layer.layer_number > self.config.num_layers
                )
                number = () if is_alike else (layer.layer_number - 1,)
                stack.enter_context(get_fp8_context(self.config, *number))
            yield

    def _defer_engine(self, *modules: Any) -> None:
        """Leave the weight gradients that Transformer Engine's layers hold back to the node."""
        if self.config.delay_wgrad_compute and torch.is_grad_enabled():
            for module in modules:
                if module is not None:
                    defer(module.backward_dw)
