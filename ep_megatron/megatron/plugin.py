"""Make an unforked Megatron accept `moe_token_dispatcher_type="deepep"`.

Two ways over one dispatcher:

- `install` rebinds names, so that TransformerConfig, MoELayer and every command line parser with a
  `--moe-token-dispatcher-type` option accept "deepep", and recomputation keeps handles;
- `patch_spec` touches nothing inside Megatron: it returns a copy of a layer or block spec in which
  every MoELayer is an EPMoELayer.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import megatron.core.transformer.moe.moe_layer as megatron_moe_layer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from ep_megatron import recompute
from ep_megatron.fp8 import WireDtype, wire_recipe
from ep_megatron.megatron.token_dispatcher import DeepEPTokenDispatcher

DISPATCHER_TYPE = "deepep"


class _AskedFor(str):
    """A `moe_flex_dispatcher_backend` that came from `moe_token_dispatcher_type="deepep"`.

    Equal to "deepep", so every rule Megatron has for its own flex dispatcher with DeepEP holds
    (which inputs 1F1B overlap may free, what may be combined). An attribute of the config beside
    its fields would be lost in `dataclasses.replace`; the type of a field's value is not.
    """

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class _Choice:
    options: dict[str, Any]  # of DeepEPTokenDispatcher
    replace_flex: bool


# What is patched belongs to the process, so what is installed is a fact of the process too.
_choice: _Choice | None = None
_rebound: list[tuple[Any, str, Any, Any]] = []  # owner, name, ours, theirs


def install(
    backend: str = "auto",
    replace_flex: bool = False,
    *,
    dispatch_dtype: WireDtype = "bf16",
    combine_grad_dtype: WireDtype = "bf16",
) -> None:
    """Make Megatron accept "deepep" as a token dispatcher type; not collective.

    Call it before arguments are parsed, configs made or models built. A config made with "deepep"
    then reads "flex" with backend "deepep", as Megatron's own rules for DeepEP apply to it. Calling
    it again changes the choice for layers built later.

    Args:
        backend: as for `Buffer`, one of `ep_megatron.config.BACKENDS`.
        replace_flex: also serve configs that ask for Megatron's own flex dispatcher with its
            "deepep" backend. Without it they stay Megatron's.
        dispatch_dtype: "bf16", "fp8" or "mxfp8", see `DeepEPTokenDispatcher`.
        combine_grad_dtype: likewise.
    """
    global _choice
    _choice = _Choice(_options(backend, dispatch_dtype, combine_grad_dtype), replace_flex)
    if not _rebound:
        _rebind(TransformerConfig, "__post_init__", _with_deepep)
        _rebind(megatron_moe_layer, "MoEFlexTokenDispatcher", _flex_or_ours)
        _rebind(megatron_random, "CheckpointFunction", _keeping_handles)
        # Megatron-LM's parser takes its choices from a list or from the type of the config's field,
        # depending on its version; here both arrive. The groups of a parser share this base class.
        _rebind(argparse._ActionsContainer, "add_argument", _with_deepep_choice)


def _options(
    backend: str, dispatch_dtype: WireDtype, combine_grad_dtype: WireDtype
) -> dict[str, Any]:
    dtypes = {"dispatch_dtype": dispatch_dtype, "combine_grad_dtype": combine_grad_dtype}
    # A word that is none raises here, long before a layer is built.
    return {"backend": backend} | {k: name for k, name in dtypes.items() if wire_recipe(name)}


def uninstall() -> None:
    """Put back what `install` rebound.

    Raises:
        RuntimeError: if someone rebound one of the names after `install`; nothing is changed then.
    """
    global _choice
    for owner, name, ours, _ in _rebound:
        if getattr(owner, name) is not ours:
            raise RuntimeError(
                f"uninstall: expected {owner.__name__}.{name} to be what install() put there, got "
                f"{getattr(owner, name)!r}; undo the later change first"
            )
    while _rebound:
        owner, name, _, theirs = _rebound.pop()
        setattr(owner, name, theirs)
    _choice = None


def _rebind(owner: Any, name: str, wrap: Any) -> None:
    theirs = getattr(owner, name)
    ours = wrap(theirs)
    setattr(owner, name, ours)
    _rebound.append((owner, name, ours, theirs))


def _with_deepep(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def __post_init__(config: Any) -> None:  # noqa: N807
        if config.moe_token_dispatcher_type == DISPATCHER_TYPE:
            if config.moe_flex_dispatcher_backend != DISPATCHER_TYPE:
                raise ValueError(
                    "TransformerConfig: expected moe_flex_dispatcher_backend to be left out with "
                    'moe_token_dispatcher_type="deepep", got '
                    f'"{config.moe_flex_dispatcher_backend}"; choose one of the two'
                )
            config.moe_token_dispatcher_type = "flex"
            config.moe_flex_dispatcher_backend = _AskedFor(DISPATCHER_TYPE)
        if _is_asked_for(config) and config.moe_shared_expert_overlap:
            # Megatron 0.16 allows the overlap only with alltoall, as its flex dispatcher lacks it.
            # Ours has it, on the same terms as alltoall.
            config.moe_token_dispatcher_type = "alltoall"
            theirs(config)
            config.moe_token_dispatcher_type = "flex"
        else:
            theirs(config)

    return __post_init__


def _keeping_handles(theirs: Any) -> Any:
    class CheckpointFunction(theirs):
        """Megatron's, whose second run of the function dispatches the way of the first."""

        @classmethod
        def apply(cls, function: Any, *args: Any) -> Any:
            return theirs.apply(recompute.remember(function), *args)

    return CheckpointFunction


def _is_asked_for(config: Any) -> bool:
    is_flex: bool = config.moe_token_dispatcher_type == "flex"
    return is_flex and isinstance(config.moe_flex_dispatcher_backend, _AskedFor)


def _is_deepep(config: Any) -> bool:
    flex = ("flex", DISPATCHER_TYPE)
    asked = (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend)
    return asked[0] == DISPATCHER_TYPE or asked == flex


def _flex_or_ours(theirs: Any) -> Any:
    def make_token_dispatcher(
        num_local_experts: int, local_expert_indices: list[int], *, config: Any, **groups: Any
    ) -> Any:
        assert _choice is not None  # uninstall puts the original back
        make, options = theirs, {}
        if _is_asked_for(config) or (_choice.replace_flex and _is_deepep(config)):
            make, options = DeepEPTokenDispatcher, _choice.options
        return make(num_local_experts, local_expert_indices, config=config, **options, **groups)

    return make_token_dispatcher


def _with_deepep_choice(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def add_argument(container: Any, *names: Any, **options: Any) -> Any:
        choices = options.get("choices")
        if "--moe-token-dispatcher-type" in names and choices and DISPATCHER_TYPE not in choices:
            options["choices"] = (*choices, DISPATCHER_TYPE)
        return theirs(container, *names, **options)

    return add_argument


class EPMoELayer(MoELayer):
    """Megatron's MoELayer with a DeepEPTokenDispatcher; put into a layer spec by `patch_spec`.

    Args:
        config: TransformerConfig whose `moe_token_dispatcher_type` is "deepep", or "flex" with
            backend "deepep".
        pg_collection: process groups; None takes Megatron's global ones.
        backend: as for `Buffer`.
        dispatch_dtype: see `DeepEPTokenDispatcher`; likewise `combine_grad_dtype`.
        options: further arguments of this Megatron version's MoELayer.

    Raises:
        ValueError: if the config asks for another dispatcher, whose rules Megatron would apply.
    """

    def __init__(
        self,
        config: Any,
        *,
        pg_collection: Any = None,
        backend: str = "auto",
        dispatch_dtype: WireDtype = "bf16",
        combine_grad_dtype: WireDtype = "bf16",
        **options: Any,
    ) -> None:
        if not _is_deepep(config):
            raise ValueError(
                'EPMoELayer: expected moe_token_dispatcher_type to be "deepep" (or "flex" with '
                f'backend "deepep"), got "{config.moe_token_dispatcher_type}"; change the config '
                "or leave the spec unpatched"
            )
        if getattr(config, "transformer_impl", "") == "inference_optimized":
            raise ValueError(
                'EPMoELayer: expected transformer_impl to be one for training, got "'
                'inference_optimized"; it brings its own dispatchers'
            )
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        with _shown_as_allgather(config):
            super().__init__(config=config, pg_collection=pg_collection, **options)
        self.token_dispatcher = DeepEPTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
            **_options(backend, dispatch_dtype, combine_grad_dtype),
        )
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)


@contextlib.contextmanager
def _shown_as_allgather(config: Any) -> Iterator[None]:
    """Let MoELayer build the one dispatcher whose constructor allocates nothing, to replace it."""
    asked = config.moe_token_dispatcher_type
    config.moe_token_dispatcher_type = "allgather"
    try:
        yield
    finally:
        config.moe_token_dispatcher_type = asked


def patch_spec(
    spec: Any,
    backend: str = "auto",
    *,
    dispatch_dtype: WireDtype = "bf16",
    combine_grad_dtype: WireDtype = "bf16",
) -> Any:
    """Return a copy of a layer, block or model spec in which every MoELayer is an EPMoELayer.

    Not collective. Takes the specs of Megatron 0.16 (`ModuleSpec`) and 0.19 (`functools.partial`),
    alone or inside dataclasses, lists and tuples. Parts without a MoELayer are not copied.

    Args:
        spec: what `get_gpt_layer_local_spec`, `get_gpt_decoder_block_spec` and the like return.
        backend: as for `Buffer`.
        dispatch_dtype: see `DeepEPTokenDispatcher`.
        combine_grad_dtype: likewise.
    """
    return _patched(spec, _options(backend, dispatch_dtype, combine_grad_dtype))


def _patched(spec: Any, options: dict[str, Any]) -> Any:
    if spec is MoELayer:
        return functools.partial(EPMoELayer, **options)
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        return dataclasses.replace(spec, module=EPMoELayer, params={**spec.params, **options})
    parts, rebuild = _take_apart(spec)
    patched = [_patched(part, options) for part in parts]
    is_same = all(new is old for new, old in zip(patched, parts, strict=True))
    return spec if is_same else rebuild(patched)


def _take_apart(spec: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return what may hold a spec inside `spec`, and a function that builds a copy from such."""
    if isinstance(spec, functools.partial):
        names = list(spec.keywords)
        return [spec.func, *spec.keywords.values()], lambda parts: functools.partial(
            parts[0], *spec.args, **dict(zip(names, parts[1:], strict=True))
        )
    if type(spec) in (list, tuple):
        return list(spec), type(spec)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        names = [field.name for field in dataclasses.fields(spec)]

        def rebuild(parts: list[Any]) -> Any:
            rebuilt = copy.copy(spec)
            for name, part in zip(names, parts, strict=True):
                setattr(rebuilt, name, part)
            return rebuilt

        return [getattr(spec, name) for name in names], rebuild
    return [], lambda _parts: spec
