"""Opcodes with references, and operands that are worth trying."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.emulator.exact import FORMATS
from tests.emulator.opcodes import Opcode, run_opcodes

Check = tuple[Opcode, Callable[..., int]]


def edges(bits: int, count: int = 96, seed: int = 0) -> list[int]:
    """Return interesting and random patterns of a width."""
    top = 1 << (bits - 1)
    known = [0, 1, 2, 3, 7, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 31, 32, 33]
    random = np.random.default_rng(seed).integers(0, 2**63, count, np.uint64)
    scales = np.random.default_rng(seed + 1).integers(0, bits, count)
    spread = [
        (int(v) * 2 + 1 & (2 * top - 1)) >> int(s) for v, s in zip(random, scales, strict=True)
    ]
    return [value & (2 * top - 1) for value in known] + spread


def arrays(widths: list[int]) -> list[np.ndarray[Any, Any]]:
    columns = []
    for position, bits in enumerate(widths):
        values = [i & 1 for i in range(109)] if bits == 1 else edges(bits, seed=position)
        shuffled = np.random.default_rng(position + 7).permutation(len(values))
        columns.append(np.array(values, np.uint64)[shuffled if position else slice(None)])
    return columns


def klass(bits: int) -> str:
    return "pred" if bits == 1 else f"b{bits}"


def check(text: str, result: int, widths: list[int], reference: Callable[..., int]) -> Check:
    return Opcode(text, klass(result), [klass(w) for w in widths], arrays(widths)), reference


def run_checks(checks: list[Check]) -> None:
    for (opcode, reference), got in zip(
        checks, run_opcodes([opcode for opcode, _ in checks]), strict=True
    ):
        for row in zip(*opcode.values, got.tolist(), strict=True):
            *operands, result = map(int, row)
            expected = reference(*operands)
            assert result == expected, (
                f"{opcode.text} of {[hex(o) for o in operands]}: "
                f"expected {expected:#x}, got {result:#x}"
            )


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def of_type(kind: str) -> tuple[int, Callable[[int], int], int]:
    """Return the width, how to read a pattern, and the mask of an integer type."""
    bits = int(kind[1:])
    return bits, (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v), (1 << bits) - 1


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else int(Fraction(a, b))


def remainder(a: int, b: int) -> int:
    return a if b == 0 else a - b * int(Fraction(a, b))


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}


def numbers(form: str, seed: int) -> np.ndarray[Any, Any]:
    """Return patterns of a format: special values, subnormals, neighbours, random ones."""
    fraction, exponent = FORMATS[form]
    bits = 1 + fraction + exponent
    infinity = ((1 << exponent) - 1) << fraction
    sign = 1 << (bits - 1)
    one = ((1 << exponent - 1) - 1) << fraction
    known = [0, 1, 2, (1 << fraction) - 1, 1 << fraction, one, one + 1, one - 1, 2 * one]
    known += [infinity - 1, infinity, infinity | 1 << (fraction - 1)]
    known += [value | sign for value in known]
    random = np.random.default_rng(seed)
    wild = random.integers(0, 2**63, 120, np.uint64).astype(object) * 2 % (1 << bits)
    near = one + random.integers(-(3 << fraction), 3 << fraction, 120)
    values = [*known, *map(int, wild), *map(int, near)]
    return random.permutation(np.array([v & (2 * sign - 1) for v in values], np.uint64))


def spread(form: str) -> np.ndarray[Any, Any]:
    """Return numbers with halves and around the integers' limits."""
    limits = [2.0**k + d for k in (0, 7, 15, 16, 31, 32, 63, 64) for d in (-1.5, -0.5, 0, 0.5, 1.5)]
    both = np.array(limits + [-v for v in limits], np.float32 if form == "f32" else np.float64)
    return both.view(np.uint32 if form == "f32" else np.uint64).astype(np.uint64)


def round_to_integer(value: Fraction, mode: str) -> int:
    whole = value.numerator // value.denominator
    return {
        "rni": round(value),
        "rzi": int(value),
        "rmi": whole,
        "rpi": whole + (value != whole),
    }[mode]


def sign_of(value: Any) -> int:
    return -1 if value in ("-inf", "-0") or (not isinstance(value, str) and value < 0) else 1
