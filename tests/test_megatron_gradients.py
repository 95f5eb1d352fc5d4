"""A MoELayer over several ranks against a dense mixture of experts in one process, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.megatron_gpt import HIDDEN, Case, Layout, make_config, model_parallel, moe_layer_spec
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

NUM_EXPERTS, FFN = 8, 48
EXPERTS = range(NUM_EXPERTS)


@dataclass(frozen=True)
class Variant:
    layout: Layout
    num_ranks: int
    options: dict[str, Any] = field(default_factory=dict)
    num_topk: int = 2
    patched_spec: bool = False
    pads_for_fp8: bool = False


class InFloat64(TorchFunctionMode):
    """Keep Megatron's router in float64: it takes softmax and sigmoid in float32 by name."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_float64 = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if is_float64 and func is Tensor.float:
            return args[0]
        if is_float64 and func is torch.softmax:
            kwargs = {**(kwargs or {}), "dtype": torch.float64}
        return func(*args, **(kwargs or {}))


def _weights() -> dict[str, Tensor]:
    """Router `[E, H]`, fc1 `[E, 2, F, H]` (gate, up) and fc2 `[E, H, F]`, the same everywhere."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "router": (NUM_EXPERTS, HIDDEN),
        "fc1": (NUM_EXPERTS, 2, FFN, HIDDEN),
        "fc2": (NUM_EXPERTS, HIDDEN, FFN),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / 4
        for name, shape in shapes.items()
    }


def _inputs(rank: int) -> tuple[Tensor, Tensor]:
    """Return x and the gradient of y, `[S, 1, H]`; every rank has another number of tokens."""
    generator = torch.Generator().manual_seed(20 + rank)
    shape = (2, 7 + 3 * rank, 1, HIDDEN)
    x, grad_y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, grad_y


def _build_layer(variant: Variant) -> Any:
    from ep_megatron.megatron.plugin import patch_spec

    options = {
        "params_dtype": torch.float64,
        "moe_router_dtype": "fp64",
        "moe_router_topk": variant.num_topk,
        # Equal sizes, so that the experts share the layer's config instead of a copy.
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
    }
    config = make_config(Case(options=options | variant.options), variant.layout)
    spec = moe_layer_spec(config).submodules.mlp
    layer = (patch_spec(spec) if variant.patched_spec else spec)(config=config)
    if variant.pads_for_fp8:
        config.fp8 = "hybrid"  # only after building: Megatron refuses it without Transformer Engine
    return layer


def _experts(layer: Any) -> Iterator[tuple[int, Any]]:
    return zip(layer.local_expert_indices, layer.experts.local_experts, strict=True)


def _shard(variant: Variant, full: Tensor, dim: int) -> Tensor:
    from megatron.core import parallel_state

    rank: int = parallel_state.get_expert_tensor_parallel_rank()
    return full.chunk(variant.layout.etp, dim)[rank]


def _set_weights(variant: Variant, layer: Any) -> None:
    weights = _weights()
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        for expert, mlp in zip(
            layer.local_expert_indices, layer.experts.local_experts, strict=True
        ):
            fc1 = _shard(variant, weights["fc1"][expert], 1)
            mlp.linear_fc1.weight.copy_(fc1.flatten(0, 1))
            mlp.linear_fc2.weight.copy_(_shard(variant, weights["fc2"][expert], 1))


def _run_layer(rank: int, variant: Variant) -> dict[str, Any]:
    """Forward and backward of the six steps on this rank; all in plain tensors."""
    from ep_megatron.megatron import plugin

    with model_parallel(variant.layout):
        if not variant.patched_spec:
            plugin.install()
        try:
            layer = _build_layer(variant)
        finally:
            if not variant.patched_spec:
                plugin.uninstall()
        _set_weights(variant, layer)
        x, grad_y = _inputs(rank)
        x.requires_grad_()
        with InFloat64():
            probs, routing_map = layer.route(x)
        probs.retain_grad()
        rows, row_weights = layer.dispatch(*layer.preprocess(x, probs, routing_map))
        counts = layer.token_dispatcher.dispatch_postprocess(rows, row_weights)[1]
        expert_rows, _ = layer.routed_experts_compute(rows, row_weights)
        y = layer.postprocess(layer.combine(expert_rows), None)
        y.backward(grad_y)
        return {
            "y": y.detach(),
            "x": x.grad,
            "probs": probs.grad * routing_map,
            "router": layer.router.weight.grad,
            "counts": counts,
            "fc1": {expert: mlp.linear_fc1.weight.grad for expert, mlp in _experts(layer)},
            "fc2": {expert: mlp.linear_fc2.weight.grad for expert, mlp in _experts(layer)},
        }


def _dense(num_ranks: int, variant: Variant) -> dict[str, Any]:
    """Every expert on every token, weighted by the router's probabilities or 0."""
    weights = {name: weight.requires_grad_() for name, weight in _weights().items()}
    blocks = [_inputs(rank) for rank in range(num_ranks)]
    x = torch.cat([block for block, _ in blocks]).squeeze(1).requires_grad_()
    logits = x @ weights["router"].T
    top = logits.topk(variant.num_topk, dim=1)
    if variant.options.get("moe_router_score_function") == "sigmoid":
        scores = top.values.sigmoid()
        scores = scores / (scores.sum(1, keepdim=True) + 1e-20) if variant.num_topk > 1 else scores
    elif variant.num_topk == 1:
        scores = logits.softmax(1).gather(1, top.indices)
    else:
        scores = top.values.softmax(1)
    probs = torch.zeros_like(logits).scatter(1, top.indices, scores)
    probs.retain_grad()
    weights_on_input = variant.options.get("moe_apply_probs_on_input", False)
    y = torch.zeros_like(x)
    for expert in EXPERTS:
        weight = probs[:, expert, None]
        is_routed = (top.indices == expert).any(1, keepdim=True)
        rows = x * weight if weights_on_input else x
        gate, up = (rows @ weights["fc1"][expert, half].T for half in (0, 1))
        out = (torch.nn.functional.silu(gate) * up) @ weights["fc2"][expert].T
        y = y + is_routed * (out if weights_on_input else out * weight)
    y.backward(torch.cat([grad for _, grad in blocks]).squeeze(1))
    is_routed = torch.zeros_like(probs).scatter(1, top.indices, 1.0)
    assert probs.grad is not None
    grads = {name: weight.grad for name, weight in weights.items()}
    return grads | {"y": y.detach(), "x": x.grad, "probs": probs.grad * is_routed}


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale)


EP2 = Layout(ep=2)
ON_INPUT = {"moe_router_pre_softmax": True, "moe_apply_probs_on_input": True}
VARIANTS = {
    "ep1": Variant(Layout(ep=1), 1),
    "ep2": Variant(EP2, 2),
    "ep2 top-3 sigmoid": Variant(
        EP2, 2, {"moe_router_score_function": "sigmoid"}, num_topk=3, patched_spec=True
    ),
    "ep2 probabilities on the input": Variant(EP2, 2, ON_INPUT, num_topk=1),
    "ep2 blocks padded for fp8": Variant(EP2, 2, pads_for_fp8=True),
    "ep4": Variant(Layout(ep=4), 4),
    "ep2 x expert-tp2": Variant(Layout(ep=2, etp=2), 4),
    "tp2 x ep2 x expert-tp2": Variant(Layout(tp=2, ep=2, etp=2), 4),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_layer_and_its_gradients_equal_a_dense_mixture(variant: Variant) -> None:
    ranks = run_on_ranks(variant.num_ranks, _run_layer, variant)
    dense = _dense(variant.num_ranks, variant)
    for name in ("y", "x"):
        _assert_close(torch.cat([rank[name] for rank in ranks]).squeeze(1), dense[name])
    _assert_close(torch.cat([rank["probs"] for rank in ranks]), dense["probs"])
    _assert_close(torch.stack([rank["router"] for rank in ranks]).sum(0), dense["router"])
    owners = [[rank for rank in ranks if expert in rank["fc1"]] for expert in EXPERTS]
    # Expert data parallel ranks would each hold a part of the sum; here there are none.
    assert {len(of_expert) for of_expert in owners} == {variant.layout.etp}
    fc1 = [
        [rank["fc1"][expert].view(2, -1, HIDDEN) for rank in owners[expert]] for expert in EXPERTS
    ]
    fc2 = [[rank["fc2"][expert] for rank in owners[expert]] for expert in EXPERTS]
    _assert_close(torch.stack([torch.cat(shards, 1) for shards in fc1]), dense["fc1"])
    _assert_close(torch.stack([torch.cat(shards, 1) for shards in fc2]), dense["fc2"])
    for rank in ranks:
        assert rank["counts"].dtype == torch.int64
        assert rank["counts"].device.type == "cpu"
        multiple = 16 if variant.pads_for_fp8 else 1
        assert not (rank["counts"] % multiple).any()


def _run_interleaved(rank: int) -> None:
    from ep_megatron.megatron import plugin

    variant = VARIANTS["ep2"]
    with model_parallel(variant.layout):
        plugin.install()
        try:
            layer = _build_layer(variant)
        finally:
            plugin.uninstall()
        _set_weights(variant, layer)

        def forward(scale: float) -> tuple[Tensor, Tensor]:
            x = (scale * _inputs(rank)[0]).requires_grad_()
            return x, layer(x)[0]

        alone: list[Any] = []
        for scale in (1.0, -0.7):
            x, y = forward(scale)
            y.sum().backward()
            alone.append(x.grad)
        pairs: list[tuple[Any, Tensor]] = [forward(1.0), forward(-0.7)]
        for _, y in pairs:
            y.sum().backward()
        assert torch.equal(pairs[0][0].grad, alone[0])
        assert torch.equal(pairs[1][0].grad, alone[1])
        assert not torch.equal(alone[0], alone[1])
        with pytest.raises(RuntimeError, match="token_combine: expected a dispatch"):
            layer.combine(pairs[0][0])


def test_two_microbatches_may_be_in_flight_on_one_layer() -> None:
    run_on_ranks(2, _run_interleaved)
