"""Received FP8 rows in Transformer Engine's layouts, bit for bit; its classes where it is there.

Without a GPU its compiled part cannot be loaded, so nothing here multiplies matrices. The tensor
classes are stood in for by one that records what it is given, with the argument names of version
2.20, which are checked against its Python sources where they are found. test_te_classes.py makes
the classes themselves.
"""

import ast
import importlib.util
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from ep_megatron import Fp8Rows, fp8
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from ep_megatron.megatron import te_fp8
from tests.sources import folders_of

pytestmark = pytest.mark.megatron
PACKED = replace(MXFP8, scales="packed_ue8m0")
COUNTS = [128, 0, 256]

ROWWISE = {"rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"}
ROWWISE |= {"fp8_dtype", "quantizer"}
GIVEN = {
    ("tensor/mxfp8_tensor.py", "MXFP8Quantizer", "__init__"): {
        "fp8_dtype",
        "rowwise",
        "columnwise",
    },
    ("tensor/mxfp8_tensor.py", "MXFP8Tensor", "__new__"): ROWWISE | {"with_gemm_swizzled_scales"},
    ("tensor/float8_blockwise_tensor.py", "Float8BlockQuantizer", "__init__"): {
        *("fp8_dtype", "rowwise", "columnwise", "force_pow_2_scales", "block_scaling_dim")
    },
    ("tensor/float8_blockwise_tensor.py", "Float8BlockwiseQTensor", "__new__"): ROWWISE
    | {"is_2D_scaled"},
    ("tensor/grouped_tensor.py", "GroupedTensor", "__new__"): {
        *("shape", "dtype", "num_tensors", "quantizer", "data", "scale_inv"),
        *("first_dims", "tensor_offsets"),
    },
}


class Recorded(torch.Tensor):
    """A tensor that keeps the keyword arguments it was made with."""

    given: dict[str, Any]

    def __new__(cls, **given: Any) -> "Recorded":
        made: Recorded = torch.zeros(()).expand(given["shape"]).as_subclass(cls)
        made.given = given
        return made


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of Transformer Engine's names whose tensors are Recorded."""
    names = ["", ".pytorch", ".pytorch.constants", ".pytorch.tensor"]
    names += [f".pytorch.tensor.{n}" for n in ("mxfp8_tensor", "float8_blockwise_tensor")]
    names += [".pytorch.tensor.grouped_tensor"]
    for name in names:
        monkeypatch.setitem(
            sys.modules, f"transformer_engine{name}", types.ModuleType(f"transformer_engine{name}")
        )
    for path, class_name, method in GIVEN:
        module = sys.modules["transformer_engine.pytorch." + path[:-3].replace("/", ".")]
        maker: Any = Recorded if method == "__new__" else types.SimpleNamespace
        setattr(module, class_name, maker)
    constants: Any = sys.modules["transformer_engine.pytorch.constants"]
    constants.DType = types.SimpleNamespace(kFloat8E4M3="e4m3")


def received(recipe: Fp8Recipe, counts: list[int] = COUNTS) -> Fp8Rows:
    x = torch.randn(sum(counts), 512, generator=torch.Generator().manual_seed(0))
    x *= torch.exp2(torch.arange(512) // 32 - 8.0)
    carrier = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
    return Fp8Rows(*fp8.quantize(x, recipe), carrier.expand(x.shape))


def widened(data: Tensor, scale: Tensor) -> Tensor:
    return data.view(torch.float8_e4m3fn).float() * scale


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("recipe", [MXFP8, PACKED, replace(PACKED, layout="column_major")], ids=str)
def test_mxfp8_scales_are_exponents_by_row(recipe: Fp8Recipe) -> None:
    for counts in (COUNTS, [5, 3, 1, 0]):
        rows = received(recipe, counts)
        expected = fp8.dequantize(rows.data, rows.scales, torch.float32).split(counts)
        tensors = te_fp8.expert_tensors(rows, counts)
        for tensor, count, wide in zip(tensors, counts, expected, strict=True):
            given = tensor.given
            assert given["dtype"] == torch.bfloat16
            assert given["rowwise_scale_inv"].shape == (-(-count // 128) * 128, 16)
            assert given["rowwise_scale_inv"].dtype == given["rowwise_data"].dtype == torch.uint8
            exponents = given["rowwise_scale_inv"][:count].float() - 127
            scales = torch.exp2(exponents).repeat_interleave(32, 1)
            assert torch.equal(widened(given["rowwise_data"], scales), wide)
            if count:
                assert given["rowwise_data"].untyped_storage().data_ptr() == (
                    rows.data.untyped_storage().data_ptr()
                )
            if count % 128 == 0 and count and recipe == PACKED:  # nothing is copied
                storage = given["rowwise_scale_inv"].untyped_storage().data_ptr()
                assert storage == rows.scales.untyped_storage().data_ptr()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("recipe", [FP8, Fp8Recipe(scales="ue8m0", layout="column_major")], ids=str)
def test_scales_of_128_columns_are_transposed_and_padded(recipe: Fp8Recipe) -> None:
    counts = [7, 0, 128, 1]
    rows = received(recipe, counts)
    expected = fp8.dequantize(rows.data, rows.scales, torch.float32).split(counts)
    for tensor, count, wide in zip(
        te_fp8.expert_tensors(rows, counts), counts, expected, strict=True
    ):
        given = tensor.given
        scales = given["rowwise_scale_inv"]
        assert scales.shape == (4, -(-count // 4) * 4)
        assert scales.is_contiguous()
        assert not scales[:, count:].any()
        assert given["is_2D_scaled"] is False
        assert vars(given["quantizer"])["block_scaling_dim"] == 1
        by_column = scales[:, :count].T.repeat_interleave(128, 1)
        assert torch.equal(widened(given["rowwise_data"], by_column), wide)


@pytest.mark.usefixtures("engine")
def test_a_grouped_tensor_shares_the_rows_and_returns_their_gradient() -> None:
    rows = received(PACKED)
    carrier = rows.carrier
    carrier.retain_grad()
    grouped = te_fp8.grouped_tensor(rows, torch.tensor(COUNTS))
    given = grouped.given
    assert given["data"].data_ptr() == rows.data.data_ptr()
    assert given["scale_inv"].data_ptr() == rows.scales.data_ptr()
    assert given["scale_inv"].shape == (sum(COUNTS) * 16,)
    assert given["tensor_offsets"].tolist() == [0, 128 * 512, 128 * 512, 384 * 512]
    assert torch.equal(given["first_dims"], torch.tensor(COUNTS))
    grad = torch.randn(384, 512)
    torch.autograd.backward(grouped, grad.to(grouped.dtype))
    assert carrier.grad is not None
    assert torch.equal(carrier.grad.float(), grad.bfloat16().float())


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"grouped_tensor: expected rows in MXFP8"):
        te_fp8.grouped_tensor(received(FP8), torch.tensor(COUNTS))
    with pytest.raises(ValueError, match=r"num_tokens_per_expert to sum to 384, got 3"):
        te_fp8.expert_tensors(received(MXFP8), [1, 2])
    if importlib.util.find_spec("transformer_engine") is None:
        with pytest.raises(ImportError, match=r"te_fp8: expected Transformer Engine 2.20"):
            te_fp8.expert_tensors(received(MXFP8), COUNTS)


@pytest.mark.parametrize("place", GIVEN, ids=lambda place: place[1])
def test_the_names_of_arguments_are_those_of_the_sources(place: tuple[str, str, str]) -> None:
    folders = folders_of("transformer_engine")
    if not folders:
        pytest.skip("no sources of transformer_engine; make build/sources")
    path, class_name, method = place
    tree = ast.parse((folders[-1] / "pytorch" / path).read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    (made,) = (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == method)
    names = {argument.arg for argument in [*made.args.args, *made.args.kwonlyargs]}
    assert GIVEN[place] <= names
    needed = {
        argument.arg
        for argument, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
        if default is None
    }
    assert needed <= GIVEN[place]
