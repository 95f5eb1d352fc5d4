"""docs/api.md names everything that is public, arguments and attributes included."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ep_megatron
from ep_megatron import (
    casts,
    deep_ep,
    elastic,
    elastic_handle,
    experts,
    fp8,
    handle,
    logfmt,
    ops,
    recompute,
    sizes,
    statistics,
    streams,
)

TEXT = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
# Names in code, in tables and blocks alike.
WORDS = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`|```.*?```", TEXT, re.DOTALL))))
CLASSES = (
    ep_megatron.Buffer,
    ep_megatron.BufferConfig,
    ep_megatron.DispatchHandle,
    ep_megatron.Fp8Recipe,
    ep_megatron.Fp8Rows,
    elastic.ElasticBuffer,
    elastic_handle.EPHandle,
    experts.GroupedExperts,
    handle.CapacityHandle,
    logfmt.LogRows,
    sizes.Config,
    statistics.BufferStatistics,
    streams.CPUStream,
    streams.EventHandle,
    streams.EventOverlap,
)
FUNCTIONS = (
    ep_megatron.fused_combine,
    ep_megatron.fused_dispatch,
    ep_megatron.fused_dispatch_fp8,
    casts.quantize,
    casts.dequantize,
    deep_ep.enable,
    experts.moe_forward,
    experts.moe_reference,
    fp8.error_bound,
    fp8.pack_ue8m0,
    fp8.unpack_ue8m0,
    casts.encode_logfmt,
    casts.decode_logfmt,
    logfmt.encode,
    logfmt.decode,
    logfmt.error_bound,
    ops.register,
    ops.num_handles,
    ops.dispatch._init_fn,
    ops.combine._init_fn,
    recompute.contexts,
    recompute.remember,
)
# Python's own.
_OF_OTHERS = {"self", "cls", "args", "kwargs", "_", "__", "exc_type", "exc", "traceback"}


# What the package itself calls on values that it hands out.
INTERNAL = {"settle", "settled", "of", "of_code", "block_on", "check_rows", "new_scales", "code"}


def methods_of(cls: type) -> dict[str, Callable[..., Any]]:
    """Return public methods and the constructor, inherited ones of this package included."""
    found = {}
    for name, member in inspect.getmembers(cls, callable):
        is_ours = (getattr(member, "__module__", None) or "").startswith("ep_megatron")
        if is_ours and not name.startswith("_") and name not in INTERNAL:
            found[name] = member
    return found | {"__init__": vars(cls)["__init__"]}


def described() -> dict[str, Callable[..., Any]]:
    """Return every public callable by its name."""
    found = {f.__name__: f for f in FUNCTIONS}
    for cls in CLASSES:
        found |= {f"{cls.__name__}.{name}": method for name, method in methods_of(cls).items()}
    return found


def arguments_of(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in _OF_OTHERS]


def test_every_public_name_is_in_the_documentation() -> None:
    names = set(ep_megatron.__all__) | {cls.__name__ for cls in CLASSES}
    for name, function in described().items():
        names |= {name.rpartition(".")[2], *arguments_of(function)} - {"__init__"}
    for cls in CLASSES:
        names |= {
            name
            for name, member in inspect.getmembers(cls)
            if isinstance(member, property) and not name.startswith("_") and name not in INTERNAL
        }
    assert sorted(names - WORDS) == []
