"""The compiled casts to e4m3 and back against fp8.py, bit for bit, on every instruction set."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from ep_megatron import _cpu, casts, fp8
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.test_row_kernels import ISAS, Output, each_isa, wild_rows

RECIPES = [
    Fp8Recipe(block, scales, layout, min_amax)
    for block in get_args(fp8.BlockSize)
    for scales in get_args(fp8.ScaleFormat)
    for layout in get_args(fp8.ScaleLayout)
    for min_amax in (fp8.MIN_AMAX, fp8.TINY_AMAX)
]
each_dtype = pytest.mark.parametrize(
    "dtype", fp8.INPUT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def kernel_quantize(isa: str, x: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor]:
    num_rows, hidden = x.shape
    data = Output(num_rows * hidden)
    scales = recipe.new_scales(num_rows, hidden, "cpu")
    _cpu.quantize_rows(
        isa,
        casts.dtype_name(x.dtype),
        casts.format_of(recipe),
        data.address,
        scales.data_ptr(),
        casts.scale_strides(scales),
        x.data_ptr(),
        num_rows,
        hidden,
    )
    return data.read(torch.uint8).view(torch.float8_e4m3fn).view(x.shape), scales


def kernel_dequantize(isa: str, data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    out = Output(data.numel() * dtype.itemsize)
    _cpu.dequantize_rows(
        isa,
        casts.dtype_name(dtype),
        casts.format_like("test", data, scales),
        out.address,
        data.data_ptr(),
        scales.data_ptr(),
        casts.scale_strides(scales),
        *data.shape,
    )
    return out.read(dtype).view(data.shape)


def assert_quantizes_like_the_reference(x: Tensor, recipe: Fp8Recipe) -> None:
    expected_data, expected_scales = fp8.quantize(x, recipe)
    for isa in ISAS:
        data, scales = kernel_quantize(isa, x, recipe)
        assert torch.equal(bits(data), bits(expected_data)), isa
        assert torch.equal(bits(scales), bits(expected_scales)), isa
        assert scales.stride() == expected_scales.stride()


def test_every_bfloat16_in_mixed_blocks() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    finite = every[every.view(torch.bfloat16).isfinite()].view(torch.bfloat16)
    finite = torch.cat([finite, finite[: -len(finite) % 512]])
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        if seed < 3:  # neighbours in size share a block, so that all of e4m3 is met
            noise = torch.rand(len(finite), generator=generator) * 2.0 ** (3 * seed)
            order = (finite.view(torch.int16).int().bitwise_and(0x7FFF) / 64 + noise).argsort()
        else:
            order = torch.randperm(len(finite), generator=generator)
        x = finite[order].view(-1, 512)
        for recipe in (FP8, MXFP8, Fp8Recipe(scales="ue8m0"), Fp8Recipe(block=32)):
            assert_quantizes_like_the_reference(x, recipe)
    everything = every.view(torch.bfloat16)[torch.randperm(1 << 16)].view(-1, 512)
    assert_quantizes_like_the_reference(everything, MXFP8)


@each_dtype
def test_random_bits_subnormals_nan_and_infinity(dtype: torch.dtype) -> None:
    for hidden, num_rows in ((512, 9), (1536, 4), (7168, 1), (0, 3), (512, 0)):
        wild = torch.empty(num_rows, hidden, dtype=dtype)
        if wild.numel():
            wild = torch.stack(wild_rows(num_rows, hidden, dtype, seed=hidden))
            # Where every block has a NaN or an infinity, nothing is tested.
            wild[::2] = torch.where(wild[::2].isfinite(), wild[::2], 1.0)
        calm = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        for recipe, x in itertools.product(RECIPES, (wild, calm, calm * 1e-7)):
            assert_quantizes_like_the_reference(x, recipe)


@each_isa
@pytest.mark.parametrize("recipe", [Fp8Recipe(scales="ue8m0"), MXFP8], ids=str)
def test_ties_of_neighbouring_e4m3_numbers_go_to_even(isa: str, recipe: Fp8Recipe) -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    around = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0), codes])
    around = torch.cat([around, -around])
    blocks = torch.zeros(-(-len(around) // 31), 32)
    blocks[:, 0] = 448  # the scale is 1: x is rounded as it is
    for column in range(31):
        part = around[column::31]
        blocks[: len(part), column + 1] = part
    x = blocks.repeat(1, recipe.block // 32)
    assert_quantizes_like_the_reference(x, recipe)
    data, scales = kernel_quantize(isa, x, recipe)
    assert (scales == 1).all()
    is_tie = torch.isin(x.abs(), ties)
    assert is_tie.sum() >= 2 * len(ties)
    assert not (data.view(torch.uint8)[is_tie] & 1).any()


@each_isa
@each_dtype
def test_every_byte_is_widened(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    data = torch.stack([torch.randperm(256, generator=generator) for _ in range(24)])
    data = data.to(torch.uint8).view(12, 512).view(torch.float8_e4m3fn)
    for block in (32, 128):
        shape = (12, 512 // block)
        scales = torch.rand(shape, generator=generator) * torch.exp2(
            torch.randint(-140, 120, shape, generator=generator).float()
        )
        scales[0, 0], scales[1, 0], scales[2, 0] = 0, torch.nan, torch.inf
        packed = torch.randint(-(1 << 31), 1 << 31, (12, shape[1] // 4), generator=generator)
        for each in (scales, packed.int()):
            for layout in (each, fp8.in_columns(each)):
                actual = kernel_dequantize(isa, data, layout, dtype)
                assert torch.equal(bits(actual), bits(fp8.dequantize(data, each, dtype)))


@each_dtype
def test_the_chosen_casts_give_the_reference_bits(dtype: torch.dtype) -> None:
    x = torch.randn(7, 1024, generator=torch.Generator().manual_seed(4)).to(dtype)
    strided = torch.stack([x, x], 2)[:, :, 0]
    for recipe in RECIPES:
        data, scales = casts.quantize(strided.requires_grad_(), recipe)
        expected = fp8.quantize(x, recipe)
        assert torch.equal(bits(data), bits(expected[0]))
        assert torch.equal(bits(scales), bits(expected[1]))
        assert not data.requires_grad
        for out in fp8.OUTPUT_DTYPES:
            widened = casts.dequantize(data, scales, out)
            assert torch.equal(bits(widened), bits(fp8.dequantize(*expected, out)))
    batched = x.view(7, 4, 256)
    for mine, theirs in zip(casts.quantize(batched), fp8.quantize(batched), strict=True):
        assert torch.equal(bits(mine), bits(theirs))


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(1, 128)
    arguments = (0, 0, (4, 4), x.data_ptr(), 0)
    with pytest.raises(ValueError, match=r"quantize_rows: expected isa to be one of .*, got mmx"):
        _cpu.quantize_rows("mmx", "float32", (128, 0, 1.0), *arguments, 128)
    with pytest.raises(ValueError, match=r"quantize_rows: expected dtype .*, got float64"):
        _cpu.quantize_rows("", "float64", (128, 0, 1.0), *arguments, 128)
    for block, kind, hidden in ((128, 0, 100), (64, 0, 128), (32, 2, 96)):
        with pytest.raises(ValueError, match=rf"quantize_rows: expected hidden .*, got {hidden}"):
            _cpu.quantize_rows("", "float32", (block, kind, 1.0), *arguments, hidden)
    with pytest.raises(ValueError, match=r"quantize: expected x to be bfloat16.*, got torch.int32"):
        casts.quantize(x.int())
    with pytest.raises(ValueError, match=r"dequantize: expected scales .*, got .*\[1, 3\]"):
        casts.dequantize(x.to(torch.float8_e4m3fn), torch.zeros(1, 3))


def test_the_fastest_build_is_one_of_them() -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(5))
    for isa, recipe in itertools.product(ISAS, (FP8, replace(MXFP8, scales="packed_ue8m0"))):
        for mine, theirs in zip(
            kernel_quantize("", x, recipe), kernel_quantize(isa, x, recipe), strict=True
        ):
            assert torch.equal(bits(mine), bits(theirs))
