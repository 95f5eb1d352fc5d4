"""Received FP8 rows inside Transformer Engine's own classes, from its Python sources.

Only what is compiled is stood in for, by a module of empty names, so nothing here casts, scales or
multiplies: what is checked is that its classes take the rows, that shapes and scales are those its
quantizers ask for, and that it finds every expert's bytes where it looks for them. It runs in a
process of its own, as it leaves a package in `sys.modules` that is only half there.
"""

import enum
import importlib
import sys
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_megatron import Fp8Rows, fp8
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.ranks import fresh_processes
from tests.sources import folders_of

SOURCES = folders_of("transformer_engine")
pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not SOURCES, reason="no sources of transformer_engine; make build/sources"),
]
PACKED = replace(MXFP8, scales="packed_ue8m0")
HIDDEN = 512


class Names(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Zeros(name, (), {})
        setattr(self, name, made)
        return made


class _Zeros(type):
    """A class whose every name is 0, as an enumeration of slots might have."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


class DType(enum.Enum):
    """The compiled enumeration; its names are checked by what imports it."""

    kByte = 0  # noqa: N815
    kInt32 = 2  # noqa: N815
    kFloat32 = 4  # noqa: N815
    kFloat16 = 5  # noqa: N815
    kBFloat16 = 6  # noqa: N815
    kFloat8E4M3 = 7  # noqa: N815
    kFloat8E5M2 = 8  # noqa: N815
    kFloat4E2M1 = 10  # noqa: N815

    def __int__(self) -> int:
        return int(self.value)


def with_classes(folder: Path) -> Any:
    """Make the classes importable; return the adapter."""
    compiled: Any = Names("transformer_engine_torch")
    compiled.DType = DType
    sys.modules["transformer_engine_torch"] = compiled
    for name in ("", ".common", ".pytorch"):  # whose own __init__ loads what is compiled
        package = Names(f"transformer_engine{name}")
        package.__path__ = [str(folder / name.removeprefix("."))]
        sys.modules[package.__name__] = package
    # Where no device is named, its classes ask for the GPU's.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    return importlib.import_module("ep_megatron.megatron.te_fp8")


def received(recipe: Fp8Recipe, counts: list[int]) -> Fp8Rows:
    x = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(0))
    x *= torch.exp2(torch.arange(HIDDEN) // 32 - 8.0)
    carrier = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
    return Fp8Rows(*fp8.quantize(x, recipe), carrier.expand(x.shape))


def check_expert_tensors(folder: Path) -> None:
    te_fp8 = with_classes(folder)
    for recipe, counts, name in (
        (PACKED, [128, 0, 256], "MXFP8Tensor"),
        (MXFP8, [5, 0, 130], "MXFP8Tensor"),
        (FP8, [7, 0, 128, 1], "Float8BlockwiseQTensor"),
        (Fp8Recipe(scales="ue8m0"), [4, 12], "Float8BlockwiseQTensor"),
    ):
        rows = received(recipe, counts)
        parts = rows.data.view(torch.uint8).split(counts)
        for tensor, part in zip(te_fp8.expert_tensors(rows, counts), parts, strict=True):
            quantizer, scales = tensor._quantizer, tensor._rowwise_scale_inv
            assert type(tensor).__name__ == name
            assert type(tensor).__module__.startswith("transformer_engine.pytorch.tensor.")
            assert (tensor.shape, tensor.dtype) == (part.shape, torch.bfloat16)
            assert tensor.device == rows.data.device
            assert torch.equal(tensor._rowwise_data, part)
            if len(part):
                assert tensor._rowwise_data.data_ptr() == part.data_ptr()
            assert tensor._columnwise_data is tensor._columnwise_scale_inv is None
            assert int(tensor._fp8_dtype) == int(DType.kFloat8E4M3)
            assert tuple(scales.shape) == tuple(quantizer.get_scale_shape(part.shape, False))
            assert scales.is_contiguous()
            asked = {"rowwise": True, "columnwise": False}
            assert (quantizer.rowwise_usage, quantizer.columnwise_usage) == tuple(asked.values())
            assert tensor.get_usages() == asked


def check_grouped_tensor(folder: Path) -> None:
    """Taken apart again by its own code, a grouped tensor has every expert's rows and scales."""
    te_fp8, counts = with_classes(folder), [128, 0, 256]
    rows = received(PACKED, counts)
    grouped = te_fp8.grouped_tensor(rows, torch.tensor(counts))
    module = importlib.import_module("transformer_engine.pytorch.tensor")
    assert isinstance(grouped, module.GroupedTensor)
    assert grouped.logical_shape == tuple(rows.data.shape)
    # What its own allocation for the same experts looks like.
    theirs = module.GroupedTensor.make_grouped_tensor_with_shapes(
        len(counts),
        [(count, HIDDEN) for count in counts],
        quantizer=grouped.quantizer,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    for name in ("rowwise_data", "scale_inv", "first_dims", "tensor_offsets"):
        mine, allocated = getattr(grouped, name), getattr(theirs, name)
        assert (mine.shape, mine.dtype) == (allocated.shape, allocated.dtype), name
    assert torch.equal(grouped.tensor_offsets, theirs.tensor_offsets)
    assert grouped.num_tensors == theirs.num_tensors
    assert grouped._with_gemm_swizzled_scales == theirs._with_gemm_swizzled_scales
    experts = te_fp8.expert_tensors(rows, counts)
    for part, expert in zip(grouped.split_into_quantized_tensors(), experts, strict=True):
        assert torch.equal(part._rowwise_data, expert._rowwise_data)
        assert torch.equal(part._rowwise_scale_inv, expert._rowwise_scale_inv)


@pytest.mark.parametrize(
    "check", [check_expert_tensors, check_grouped_tensor], ids=["expert tensors", "grouped tensor"]
)
def test_its_classes_take_the_rows(check: Callable[[Path], None]) -> None:
    with ProcessPoolExecutor(1, mp_context=fresh_processes()) as processes:
        processes.submit(check, SOURCES[-1]).result(timeout=300)
