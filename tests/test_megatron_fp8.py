"""FP8 on the wire in Megatron's MoELayer: chosen everywhere alike, and exact on exact values."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from ep_megatron import fp8
from ep_megatron.fp8 import FP8, MXFP8, WireDtype
from tests.megatron_gpt import Case, Layout, make_config, model_parallel, moe_layer_spec
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron
LAYOUT = Layout(ep=2)
Dtypes = tuple[WireDtype, WireDtype]


def _layer(dtypes: Dtypes, patched: bool, hidden: int = 128) -> Any:
    from ep_megatron.megatron import plugin

    words = {"dispatch_dtype": dtypes[0], "combine_grad_dtype": dtypes[1]}
    options = {"params_dtype": torch.float32, "hidden_size": hidden, "moe_router_dtype": "fp32"}
    if not patched:
        plugin.install(**words)  # type: ignore[arg-type]
    try:
        config = make_config(Case(options=options), LAYOUT)
        spec = moe_layer_spec(config).submodules.mlp
        if patched:
            spec = plugin.patch_spec(spec, **words)
        return spec(config=config)
    finally:
        if not patched:
            plugin.uninstall()


def _recipes(rank: int, dtypes: Dtypes, patched: bool) -> tuple[Any, Any]:
    with model_parallel(LAYOUT):
        dispatcher = _layer(dtypes, patched).token_dispatcher
        return dispatcher.dispatch_fp8, dispatcher.combine_grad_fp8


def _representable(seed: int) -> Tensor:
    """Rows that both recipes keep as they are: e4m3 numbers with 448 in every block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 1, 128, generator=generator).to(torch.float8_e4m3fn).float()
    x[..., ::32] = 448
    for recipe in (FP8, MXFP8):
        assert torch.equal(fp8.dequantize(*fp8.quantize(x, recipe), torch.float32), x)
    return x


def _run(rank: int, dtypes: Dtypes, exact: bool) -> dict[str, Tensor]:
    with model_parallel(LAYOUT):
        torch.manual_seed(rank)
        layer = _layer(dtypes, patched=False)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
                weight.mul_(0.05)
        x = _representable(rank) if exact else torch.randn(9, 1, 128)
        grad = _representable(10 + rank) if exact else torch.randn(9, 1, 128)
        x.requires_grad_()
        y, _ = layer(x)
        y.backward(grad)
        assert x.grad is not None
        return {"y": y.detach(), "x": x.grad} | {
            name: weight.grad for name, weight in layer.named_parameters() if "experts" in name
        }


@pytest.mark.parametrize("patched", [False, True], ids=["installed", "patched spec"])
def test_the_words_become_recipes(patched: bool) -> None:
    for dtypes in (("fp8", "mxfp8"), ("bf16", "fp8"), ("mxfp8", "bf16")):
        expected = (fp8.wire_recipe(dtypes[0]), fp8.wire_recipe(dtypes[1], is_gradient=True))
        assert run_on_ranks(2, _recipes, dtypes, patched) == [expected] * 2


@pytest.mark.parametrize("dtype", ["fp8", "mxfp8"])
def test_values_that_fp8_holds_train_as_without_it(dtype: WireDtype) -> None:
    plain = run_on_ranks(2, _run, ("bf16", "bf16"), True)
    for mine, theirs in zip(run_on_ranks(2, _run, (dtype, dtype), True), plain, strict=True):
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("dtypes", [("fp8", "bf16"), ("bf16", "mxfp8")], ids="-".join)
def test_other_values_show_which_way_is_cast(dtypes: Dtypes) -> None:
    plain = run_on_ranks(2, _run, ("bf16", "bf16"), False)
    for mine, theirs in zip(run_on_ranks(2, _run, dtypes, False), plain, strict=True):
        assert torch.equal(mine["y"], theirs["y"]) == (dtypes[0] == "bf16")
        for name, value in mine.items():
            if name != "y":
                assert not torch.equal(value, theirs[name]), name
                error = (value - theirs[name]).norm() / theirs[name].norm()
                assert error < 0.1, name


def test_words_and_sizes_that_cannot_be_are_named() -> None:
    from ep_megatron.megatron import plugin

    with pytest.raises(ValueError, match=r"expected one of bf16, fp8, mxfp8, got 'fp4'"):
        plugin.install(dispatch_dtype="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected one of bf16, fp8, mxfp8, got 'e5m2'"):
        plugin.patch_spec(None, combine_grad_dtype="e5m2")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"hidden_size to be a multiple of 128 .*, got 64"):
        run_on_ranks(2, _small_layer)


def _small_layer(rank: int) -> None:
    with model_parallel(LAYOUT):
        _layer(("bf16", "fp8"), patched=True, hidden=64)
