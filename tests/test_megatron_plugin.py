"""The plugin against Megatron's real config, MoELayer, specs and, where it exists, parser."""

import argparse
import copy
import dataclasses
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.megatron_gpt import Case, Layout, make_config, model_parallel, moe_layer_spec
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron
pytest.importorskip("megatron.core")

from ep_megatron.megatron import plugin  # noqa: E402

LAYOUT = Layout()


@pytest.fixture
def _installed() -> Iterator[None]:
    plugin.install()
    yield
    plugin.uninstall()


def _dispatcher_class(rank: int, case: Case, replace_flex: bool) -> str:
    """Build a MoELayer of the case with the plugin installed; return its dispatcher's class."""
    with model_parallel(LAYOUT):
        plugin.install(replace_flex=replace_flex)
        try:
            config = make_config(case, LAYOUT)
            layer = moe_layer_spec(config).submodules.mlp(config=config)
        finally:
            plugin.uninstall()
    return type(layer.token_dispatcher).__name__


@pytest.mark.parametrize(
    ("dispatcher", "replace_flex", "expected"),
    [
        ("deepep", False, "DeepEPTokenDispatcher"),
        ("alltoall", True, "MoEAlltoAllTokenDispatcher"),
        ("allgather", True, "MoEAllGatherTokenDispatcher"),
        ("flex", True, "DeepEPTokenDispatcher"),
    ],
)
def test_the_config_decides_which_dispatcher_a_layer_gets(
    dispatcher: str, replace_flex: bool, expected: str
) -> None:
    assert run_on_ranks(1, _dispatcher_class, Case(dispatcher), replace_flex) == [expected]


def test_flex_stays_megatrons_unless_asked() -> None:
    # Megatron's own flex dispatcher refuses one rank; ours would not.
    with pytest.raises(AssertionError, match="requires TPxEP > 1"):
        run_on_ranks(1, _dispatcher_class, Case("flex"), False)


@pytest.mark.usefixtures("_installed")
def test_the_choice_survives_copies_of_the_config() -> None:
    config = make_config(Case("deepep"), LAYOUT)
    copies = [
        dataclasses.replace(config, num_layers=4),
        copy.copy(config),
        copy.deepcopy(config),
    ]
    for other in [config, *copies]:
        assert other.moe_token_dispatcher_type == "flex"
        assert other.moe_flex_dispatcher_backend == "deepep"
        assert plugin._is_asked_for(other)
    assert plugin._is_asked_for(
        argparse.Namespace(
            moe_token_dispatcher_type="flex",
            moe_flex_dispatcher_backend=pickle.loads(
                pickle.dumps(config.moe_flex_dispatcher_backend)
            ),
        )
    )
    assert not plugin._is_asked_for(make_config(Case("flex"), LAYOUT))


@pytest.mark.usefixtures("_installed")
def test_subclasses_of_the_config_take_part() -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_token_dispatcher_type="deepep",
    )
    assert plugin._is_asked_for(config)


@pytest.mark.usefixtures("_installed")
def test_a_second_backend_for_flex_is_a_contradiction() -> None:
    case = Case("deepep", {"moe_flex_dispatcher_backend": "hybridep"})
    with pytest.raises(ValueError, match=r'moe_flex_dispatcher_backend to be left out.*"hybridep"'):
        make_config(case, LAYOUT)


@pytest.mark.usefixtures("_installed")
def test_overlapped_shared_experts_keep_megatrons_other_rules() -> None:
    options = {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 32}
    config = make_config(Case("deepep", options), LAYOUT)
    assert config.moe_token_dispatcher_type == "flex"
    assert config.moe_shared_expert_overlap
    assert dataclasses.replace(config).moe_shared_expert_overlap
    with pytest.raises(ValueError, match="moe_shared_expert_intermediate_size"):
        make_config(Case("deepep", options | {"moe_shared_expert_intermediate_size": -1}), LAYOUT)


def _names_rebound() -> list[Any]:
    import megatron.core.transformer.moe.moe_layer as moe_layer
    from megatron.core.transformer.transformer_config import TransformerConfig

    return [
        TransformerConfig.__post_init__,
        moe_layer.MoEFlexTokenDispatcher,
        argparse._ActionsContainer.add_argument,
    ]


def test_install_twice_and_uninstall_leave_megatron_as_it_was() -> None:
    before = _names_rebound()
    plugin.install()
    once = _names_rebound()
    plugin.install(backend="process_group")
    assert _names_rebound() == once
    assert not set(once) & set(before)
    plugin.uninstall()
    assert _names_rebound() == before
    plugin.uninstall()
    assert make_config(Case("deepep"), LAYOUT).moe_token_dispatcher_type == "deepep"


def test_uninstall_will_not_undo_what_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    plugin.install()
    with monkeypatch.context() as later:
        later.setattr(TransformerConfig, "__post_init__", lambda _config: None)
        with pytest.raises(RuntimeError, match=r"TransformerConfig\.__post_init__"):
            plugin.uninstall()
    plugin.uninstall()


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("grouped", [False, True])
def test_any_parsers_dispatcher_option_takes_deepep(grouped: bool) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    options = parser.add_argument_group("moe") if grouped else parser
    options.add_argument("--moe-token-dispatcher-type", choices=["allgather", "flex"])
    options.add_argument("--other", choices=["a"])
    arguments = parser.parse_args(["--moe-token-dispatcher-type", "deepep"])
    assert arguments.moe_token_dispatcher_type == "deepep"
    for refused in (["--moe-token-dispatcher-type", "deepepp"], ["--other", "deepep"]):
        with pytest.raises(argparse.ArgumentError, match="invalid choice"):
            parser.parse_args(refused)


def test_patch_spec_leaves_the_spec_it_was_given() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    config = make_config(Case(options={"moe_layer_freq": [0, 1]}), LAYOUT)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, pp_rank=0)
    patched = plugin.patch_spec(block, backend="process_group")
    assert _classes(block) == {MoELayer: 1}
    assert _classes(patched) == {plugin.EPMoELayer: 1}
    assert patched.layer_specs[0] is block.layer_specs[0]
    assert patched.layer_norm is block.layer_norm
    assert plugin.patch_spec(patched) is patched


def _classes(block: Any) -> dict[type, int]:
    """Count the MoE layer classes of a block spec, in either version's form."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    found: dict[type, int] = {}
    for layer in block.layer_specs:
        mlp = layer.submodules.mlp
        module = mlp.func if isinstance(mlp, functools.partial) else mlp.module
        if isinstance(module, type) and issubclass(module, MoELayer):
            found[module] = found.get(module, 0) + 1
    return found


def test_patch_spec_takes_the_partials_of_megatron_0_19() -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    submodules = MoESubmodules(experts=object)
    inside = {"mlp": [functools.partial(MoELayer, submodules=submodules)]}
    patched = plugin.patch_spec(inside["mlp"], backend="shared_memory")[0]
    assert patched.func is plugin.EPMoELayer
    assert patched.keywords == {"submodules": submodules, "backend": "shared_memory"}
    assert inside["mlp"][0].func is MoELayer


def _build_patched(rank: int, case: Case) -> tuple[str, str, str]:
    with model_parallel(LAYOUT):
        config = make_config(case, LAYOUT)
        spec = plugin.patch_spec(moe_layer_spec(config).submodules.mlp, backend="process_group")
        layer = spec(config=config)
        dispatcher = layer.token_dispatcher
        return type(dispatcher).__name__, dispatcher.backend, config.moe_token_dispatcher_type


@pytest.mark.parametrize("dispatcher", ["deepep", "flex"])
def test_a_patched_layer_has_our_dispatcher_and_its_config_untouched(dispatcher: str) -> None:
    expected = ("DeepEPTokenDispatcher", "process_group", dispatcher)
    assert run_on_ranks(1, _build_patched, Case(dispatcher)) == [expected]


def test_a_patched_layer_refuses_a_config_for_another_dispatcher() -> None:
    with pytest.raises(
        AssertionError, match=r'moe_token_dispatcher_type to be "deepep".*"alltoall"'
    ):
        run_on_ranks(1, _build_patched, Case("alltoall"))


def test_padding_to_the_capacity_is_refused() -> None:
    options = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    with pytest.raises(AssertionError, match="moe_pad_expert_input_to_capacity"):
        run_on_ranks(1, _build_patched, Case("deepep", options))


def _buffers_of_a_group(rank: int) -> None:
    import gc

    import torch.distributed as dist

    from ep_megatron.megatron.token_dispatcher import _buffers, shared_buffer

    before = len(_buffers)
    group = dist.new_group([0])
    first = shared_buffer(group, "process_group")
    assert shared_buffer(group, "process_group") is first
    other = dist.new_group([0])
    assert shared_buffer(other, "process_group") is not first
    dist.destroy_process_group(group)
    dist.destroy_process_group(other)
    del first, group, other
    gc.collect()
    assert len(_buffers) == before


def test_layers_share_a_buffer_which_goes_with_the_last_of_them() -> None:
    run_on_ranks(1, _buffers_of_a_group)


def test_the_stand_in_takes_no_memory_and_passes_gradients() -> None:
    from ep_megatron.megatron.stand_in import hide, show

    rows = torch.randn(5, 4, requires_grad=True)
    stand_in, hidden = hide(rows * 2)
    at_node = stand_in.detach().requires_grad_()  # as a schedule node cuts the graph
    shown = show(at_node, hidden)
    assert torch.equal(shown, rows * 2)
    stand_in.untyped_storage().resize_(0)
    assert torch.equal(shown, rows * 2)
    shown.backward(torch.arange(20.0).view(5, 4))
    assert at_node.grad is not None
    stand_in.backward(at_node.grad)
    assert rows.grad is not None
    assert torch.equal(rows.grad, 2 * torch.arange(20.0).view(5, 4))
