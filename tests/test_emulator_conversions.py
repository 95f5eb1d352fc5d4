"""The emulator's narrow formats against torch's: every pattern, midpoint and neighbour."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.emulator.opcodes import Opcode, run_opcodes

Array = np.ndarray[Any, Any]
NARROW = {
    "bf16": (torch.bfloat16, torch.int16),
    "f16": (torch.float16, torch.int16),
    "e4m3": (torch.float8_e4m3fn, torch.int8),
    "e5m2": (torch.float8_e5m2, torch.int8),
}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def patterns(form: str) -> Array:
    """Return every finite value of a format as float32."""
    kind, bits = NARROW[form]
    count = 256 if bits == torch.int8 else 65536
    every: Array = torch.arange(count).to(bits).view(kind).float().numpy()
    return every[np.isfinite(every)]


def interesting(form: str) -> Array:
    """Return all values of a format, midpoints, neighbours in float32, and random ones."""
    values = np.unique(patterns(form))
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    both = np.concatenate([values, middles])
    around = [both, np.nextafter(both, np.float32(np.inf)), np.nextafter(both, np.float32(-np.inf))]
    random = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38], np.float32)
    return np.concatenate([*around, random, special]).astype(np.float32)


def to_form(values: Array, form: str) -> Array:
    """Round by torch; for eight bits what is too large becomes the largest number."""
    kind, bits = NARROW[form]
    tensor = torch.from_numpy(values)
    if form in LARGEST:
        tensor = torch.where(tensor.isnan(), tensor, tensor.clamp(-LARGEST[form], LARGEST[form]))
    result = tensor.to(kind).view(bits).numpy().astype(np.int64)
    mask = 0xFF if bits == torch.int8 else 0xFFFF
    nan = 0x7F if bits == torch.int8 else 0x7FFF
    return np.where(np.isnan(values), nan, result & mask).astype(np.uint64)


def bits_of(values: Array) -> Array:
    return values.view(np.uint32).astype(np.uint64)


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_single_to_sixteen_bits(form: str) -> None:
    values = interesting(form)
    other = np.roll(values, 17)
    opcodes = [
        Opcode(f"cvt.rn.{form}.f32", "b16", ["b32"], [bits_of(values)]),
        Opcode(f"cvt.rn.{form}x2.f32", "b32", ["b32"] * 2, [bits_of(values), bits_of(other)]),
    ]
    single, pair = run_opcodes(opcodes)
    expected = to_form(values, form)
    np.testing.assert_array_equal(single, expected)
    np.testing.assert_array_equal(pair, expected << np.uint64(16) | to_form(other, form))


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_towards_zero_and_relu(form: str) -> None:
    values = interesting(form)
    cut, positive = run_opcodes(
        [
            Opcode(f"cvt.rz.{form}.f32", "b16", ["b32"], [bits_of(values)]),
            Opcode(f"cvt.rn.relu.{form}.f32", "b16", ["b32"], [bits_of(values)]),
        ]
    )
    kind, bits = NARROW[form]
    back = torch.from_numpy(cut.astype(np.int64)).to(bits).view(kind).float().numpy()
    finite = np.isfinite(values)
    assert np.all(np.abs(back[finite]) <= np.abs(values[finite]))
    next_up = torch.from_numpy((cut + 1).astype(np.int64)).to(bits).view(kind).float().numpy()
    beyond = np.isnan(next_up) | (np.abs(next_up) > np.abs(values))
    assert np.all(beyond[finite])
    expected = to_form(np.where(values < 0, np.float32(0), values), form)
    np.testing.assert_array_equal(positive, expected)


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_sixteen_bits_to_single(form: str) -> None:
    kind, bits = NARROW[form]
    every = np.arange(65536, dtype=np.uint64)
    (wide,) = run_opcodes([Opcode(f"cvt.f32.{form}", "b32", ["b16"], [every])])
    expected = torch.arange(65536).to(bits).view(kind).float().numpy()
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(wide[~is_nan], bits_of(expected)[~is_nan])
    assert np.all(wide[is_nan] == 0x7FFFFFFF)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_single_to_eight_bits(form: str) -> None:
    values = np.concatenate([interesting(form), patterns("bf16")])
    other = np.roll(values, 3)
    (pair,) = run_opcodes(
        [
            Opcode(
                f"cvt.rn.satfinite.{form}x2.f32",
                "b16",
                ["b32"] * 2,
                [bits_of(values), bits_of(other)],
            )
        ]
    )
    np.testing.assert_array_equal(
        pair, to_form(values, form) << np.uint64(8) | to_form(other, form)
    )


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_eight_bits_to_and_from_half(form: str) -> None:
    every = np.arange(65536, dtype=np.uint64)
    wide, narrow = run_opcodes(
        [
            Opcode(f"cvt.rn.f16x2.{form}x2", "b32", ["b16"], [every]),
            Opcode(
                f"cvt.rn.satfinite.{form}x2.f16x2", "b16", ["b32"], [every | every << np.uint64(16)]
            ),
        ]
    )
    kind, bits = NARROW[form]
    table = torch.arange(256).to(bits).view(kind).half().view(torch.int16).numpy()
    half = table.astype(np.int64) & 0xFFFF
    half[torch.arange(256).to(bits).view(kind).float().isnan().numpy()] = 0x7FFF
    np.testing.assert_array_equal(wide, half[every >> np.uint64(8)] << 16 | half[every & 0xFF])
    halves = torch.arange(65536).to(torch.int16).view(torch.float16).float().numpy()
    expected = to_form(halves, form)
    np.testing.assert_array_equal(narrow, expected << np.uint64(8) | expected)


def test_powers_of_two_as_scales() -> None:
    exponents = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    values = np.concatenate([exponents, exponents * np.float32(1.5), interesting("bf16")])
    values = np.abs(values[np.isfinite(values) & (values != 0)])
    up, down, back = run_opcodes(
        [
            Opcode("cvt.rp.satfinite.ue8m0x2.f32", "b16", ["b32"] * 2, [bits_of(values)] * 2),
            Opcode("cvt.rz.satfinite.ue8m0x2.f32", "b16", ["b32"] * 2, [bits_of(values)] * 2),
            Opcode("cvt.rn.bf16x2.ue8m0x2", "b32", ["b16"], [np.arange(65536, dtype=np.uint64)]),
        ]
    )
    exact = values.astype(np.float64)
    as_number = lambda code: np.ldexp(1.0, (code & 0xFF).astype(np.int64) - 127)  # noqa: E731
    inside = (exact >= 2.0**-127) & (exact <= 2.0**127)
    assert np.all(as_number(up)[inside] >= exact[inside])
    assert np.all(as_number(up)[inside] < 2 * exact[inside])
    assert np.all(as_number(down)[inside] <= exact[inside])
    assert np.all(2 * as_number(down)[inside] > exact[inside])
    assert np.all((up & 0xFF)[exact > 2.0**127] == 0xFE)
    table = torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu).to(torch.bfloat16)
    words = table.view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    words[255] = 0x7FFF
    every = np.arange(65536)
    np.testing.assert_array_equal(back, words[every >> 8] << 16 | words[every & 0xFF])
