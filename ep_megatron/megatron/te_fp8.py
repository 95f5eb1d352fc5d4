"""Received FP8 rows as Transformer Engine's own quantised tensors, without a second cast.

The bytes that dispatch delivered are what the expert matrix products read:

- `grouped_tensor`: all experts' rows as one MXFP8 GroupedTensor, which `te.ops.GroupedLinear` takes
  as it is (Transformer Engine 2.20; its module `te.GroupedLinear` refuses quantised input);
- `expert_tensors`: one tensor per expert, `MXFP8Tensor` or `Float8BlockwiseQTensor`, for code that
  calls the grouped matrix product itself.

Both hold row-wise data only, as the forward product reads them. What a weight gradient needs by
column is Transformer Engine's to derive.

Source: the layouts are those that TransformerEngine 2.20 allocates itself (pytorch/ep.py,
`tensor/mxfp8_tensor.py`, `tensor/float8_blockwise_tensor.py`: `get_scale_shape`).
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ep_megatron.autograd import Fp8Rows
from ep_megatron.fp8 import block_of, column_rows, pack_ue8m0, unpack_ue8m0

# Rows of an MXFP8 tensor's scales are padded to it; blocks of rows aligned to it need no padding.
MXFP8_ROWS = 128


def grouped_tensor(rows: Fp8Rows, num_tokens_per_expert: Tensor) -> Any:
    """Return MXFP8 rows `[N, H]` as one GroupedTensor, differentiable through `rows.carrier`.

    Local. Shares the memory of `rows`. Dispatch with `expand=True`, `expert_alignment=128` and the
    recipe `replace(fp8.MXFP8, scales="packed_ue8m0")`.

    Args:
        rows: expert-major rows in MXFP8.
        num_tokens_per_expert: `[L]` int64 on the device of the rows, padding included.

    Raises:
        ImportError: without Transformer Engine.
        ValueError: rows of another recipe.
    """
    scale_bytes = _mxfp8_scales("grouped_tensor", rows)
    grouped: Any = _Grouped.apply(rows.carrier, rows.data, scale_bytes, num_tokens_per_expert)
    return grouped


class _Grouped(torch.autograd.Function):
    """A GroupedTensor of rows; the gradient goes to their carrier."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, data: Tensor, scale_bytes: Tensor, counts: Tensor
    ) -> Any:
        """See `grouped_tensor`."""
        tensors = _engine("pytorch.tensor.grouped_tensor")
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts * data.shape[1], 0, out=offsets[1:])
        return tensors.GroupedTensor(
            shape=tuple(data.shape),
            dtype=carrier.dtype,
            num_tensors=len(counts),
            quantizer=_mxfp8_quantizer(),
            data=data.view(torch.uint8).reshape(-1),
            scale_inv=scale_bytes.reshape(-1),
            first_dims=counts,
            tensor_offsets=offsets,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Hand the gradient on."""
        return grad, None, None, None


def expert_tensors(rows: Fp8Rows, num_tokens_per_expert: Sequence[int]) -> list[Any]:
    """Return each expert's rows as a quantised tensor of Transformer Engine.

    Local; not differentiable. Data are views; scales are, for MXFP8 blocks of rows that are
    multiples of 128, and else small copies in the layout that the matrix product wants.

    Args:
        rows: expert-major rows; blocks of 32 with powers of two become `MXFP8Tensor`, blocks of 128
            with float32 scales `Float8BlockwiseQTensor` (H a multiple of 128).
        num_tokens_per_expert: rows of each expert, padding included.

    Raises:
        ImportError: without Transformer Engine.
        ValueError: counts that are not those of the rows, or a recipe that it has no tensor for.
    """
    if sum(num_tokens_per_expert) != len(rows.data):
        raise ValueError(
            f"expert_tensors: expected num_tokens_per_expert to sum to {len(rows.data)}, "
            f"got {sum(num_tokens_per_expert)}; dispatch with expand=True"
        )
    counts = list(num_tokens_per_expert)
    dtype = rows.carrier.dtype
    parts = rows.data.view(torch.uint8).split(counts)
    if block_of("expert_tensors", "rows", rows.data, rows.scales) == 32:
        scales = _mxfp8_scales("expert_tensors", rows).split(counts)
        return [_mxfp8_tensor(*part, dtype) for part in zip(parts, scales, strict=True)]
    wide = unpack_ue8m0(rows.scales) if rows.scales.dtype == torch.int32 else rows.scales
    return [_blockwise_tensor(*part, dtype) for part in zip(parts, wide.split(counts), strict=True)]


def _mxfp8_scales(operation: str, rows: Fp8Rows) -> Tensor:
    """Return the exponents `[N, H / 32]` as bytes; a view of packed scales by row."""
    if block_of(operation, "rows", rows.data, rows.scales) != 32 or rows.data.shape[1] % 128:
        raise ValueError(
            f"{operation}: expected rows in MXFP8, blocks of 32 columns and H a multiple of 128, "
            f"got {list(rows.data.shape)} with scales {list(rows.scales.shape)}; dispatch with "
            "fp8.MXFP8"
        )
    packed = rows.scales if rows.scales.dtype == torch.int32 else pack_ue8m0(rows.scales)
    return packed.contiguous().view(torch.uint8)


def _mxfp8_tensor(data: Tensor, exponents: Tensor, dtype: torch.dtype) -> Any:
    if len(exponents) % MXFP8_ROWS:
        exponents = pad(exponents, (0, 0, 0, -len(exponents) % MXFP8_ROWS))
    return _engine("pytorch.tensor.mxfp8_tensor").MXFP8Tensor(
        shape=data.shape,
        dtype=dtype,
        rowwise_data=data,
        rowwise_scale_inv=exponents,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=_e4m3(),
        quantizer=_mxfp8_quantizer(),
        with_gemm_swizzled_scales=False,
        device=data.device,
    )


def _blockwise_tensor(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
    module = _engine("pytorch.tensor.float8_blockwise_tensor")
    quantizer = module.Float8BlockQuantizer(
        fp8_dtype=_e4m3(),
        rowwise=True,
        columnwise=False,
        force_pow_2_scales=False,
        block_scaling_dim=1,
    )
    by_column = scales.new_zeros(scales.shape[1], column_rows(len(scales)))
    by_column[:, : len(scales)] = scales.T
    return module.Float8BlockwiseQTensor(
        shape=data.shape,
        dtype=dtype,
        rowwise_data=data,
        rowwise_scale_inv=by_column,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=_e4m3(),
        quantizer=quantizer,
        is_2D_scaled=False,
        device=data.device,
    )


def _mxfp8_quantizer() -> Any:
    module = _engine("pytorch.tensor.mxfp8_tensor")
    return module.MXFP8Quantizer(fp8_dtype=_e4m3(), rowwise=True, columnwise=False)


def _e4m3() -> Any:
    return _engine("pytorch.constants").DType.kFloat8E4M3


def _engine(name: str) -> Any:
    try:
        return importlib.import_module(f"transformer_engine.{name}")
    except (ImportError, RuntimeError, OSError) as error:  # its own checks raise the latter two
        raise ImportError(
            f"te_fp8: expected Transformer Engine 2.20 or later to be installed, got '{error}'; "
            "install it, or let dispatch widen the rows"
        ) from error
