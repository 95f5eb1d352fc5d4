"""`import deep_ep` without DeepEP: the package's names for code that is written against it.

`enable()` puts modules of that name into this process. A real DeepEP is never shadowed unless that
is asked for. For a script that is not to be changed:

    torchrun --nproc-per-node 2 -m ep_megatron.deep_ep pretrain_gpt.py ...

Source: the names of modules and members follow DeepEP (MIT), of both its major versions: callers
import the events from `deep_ep.utils` and from `deep_ep.utils.event`.
"""

import importlib.util
import runpy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

import ep_megatron
from ep_megatron import fp8
from ep_megatron.buffer import Buffer
from ep_megatron.elastic import ElasticBuffer
from ep_megatron.elastic_handle import EPHandle
from ep_megatron.handle import DispatchHandle
from ep_megatron.sizes import Config
from ep_megatron.streams import EventHandle, EventOverlap

topk_idx_t = torch.int64
_MARK = "__ep_megatron__"
_EVENTS: dict[str, Any] = {"EventHandle": EventHandle, "EventOverlap": EventOverlap}


def align(value: int, alignment: int) -> int:
    """Return `value` rounded up to a multiple of `alignment`."""
    return ceil_div(value, alignment) * alignment


def ceil_div(value: int, divisor: int) -> int:
    """Return the quotient rounded up."""
    return -(-value // divisor)


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast `[T, H]` rows to e4m3 with a float32 scale per 128 columns; see `fp8.quantize`."""
    return fp8.quantize(x)


def per_token_cast_back(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply e4m3 rows by their scales, to bfloat16; see `fp8.dequantize`."""
    return fp8.dequantize(x, scales)


_MATH = {f.__name__: f for f in (align, ceil_div, per_token_cast_to_fp8, per_token_cast_back)}
_MODULES: dict[str, dict[str, Any]] = {
    "deep_ep": {
        "Buffer": Buffer,
        "Config": Config,
        "ElasticBuffer": ElasticBuffer,
        "EPHandle": EPHandle,
        "DispatchHandle": DispatchHandle,
        "topk_idx_t": topk_idx_t,
        "__version__": f"0+ep_megatron.{ep_megatron.__version__}",
        **_EVENTS,
    },
    "deep_ep.buffer": {"Buffer": Buffer},
    "deep_ep.buffers": {},
    "deep_ep.buffers.elastic": {"ElasticBuffer": ElasticBuffer, "EPHandle": EPHandle},
    "deep_ep.buffers.legacy": {"Buffer": Buffer},
    "deep_ep.utils": _EVENTS,
    "deep_ep.utils.event": _EVENTS,
    "deep_ep.utils.math": _MATH,
}


def enable(*, replace: bool = False) -> None:
    """Let `import deep_ep` find this package in this process; twice is as good as once.

    To be called before anything imports `deep_ep`, or finds out whether it is there: Megatron does
    when its MoE modules are imported.

    Args:
        replace: whether to take the place of a real DeepEP.

    Raises:
        RuntimeError: if a real DeepEP is installed or imported, or Megatron has looked already.
    """
    if is_enabled():
        return
    is_there = "deep_ep" in sys.modules or importlib.util.find_spec("deep_ep") is not None
    if is_there and not replace:
        raise RuntimeError(
            "deep_ep.enable: expected no DeepEP, got an installed one; uninstall it, or ask for "
            "this in its place by replace=True"
        )
    asker = sys.modules.get("megatron.core.transformer.moe.fused_a2a")
    if asker is not None and not asker.HAVE_DEEP_EP:
        raise RuntimeError(
            "deep_ep.enable: expected to be called before megatron.core's MoE modules are "
            "imported, got a process where they found no deep_ep; call it first"
        )
    for name in [n for n in sys.modules if n == "deep_ep" or n.startswith("deep_ep.")]:
        del sys.modules[name]
    for name, members in _MODULES.items():
        module = ModuleType(name, __doc__)
        has_inner = any(other.startswith(f"{name}.") for other in _MODULES)
        module.__spec__ = ModuleSpec(name, None, is_package=has_inner)
        if has_inner:
            module.__path__ = []  # nothing else is to be found inside
        module.__dict__.update(members, **{_MARK: True})
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def is_enabled() -> bool:
    """Return whether `import deep_ep` finds this package."""
    return hasattr(sys.modules.get("deep_ep"), _MARK)


def main() -> None:
    """Run a script with `deep_ep` enabled: `python -m ep_megatron.deep_ep script.py ...`."""
    if len(sys.argv) < 2:
        raise SystemExit("python -m ep_megatron.deep_ep: expected a script and its arguments")
    enable()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
