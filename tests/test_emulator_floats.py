"""Floating-point opcodes of the emulator against arithmetic on fractions."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.emulator.checks import (
    COMPARE,
    Check,
    klass,
    numbers,
    round_to_integer,
    run_checks,
    sign_of,
    spread,
)
from tests.emulator.exact import FORMATS, NAN, decode, encode, square_root
from tests.emulator.opcodes import Opcode


def add_values(a: Any, b: Any, mode: str) -> Any:
    special = [v for v in (a, b) if v in ("nan", "inf", "-inf")]
    if special:
        return "nan" if "nan" in special or len(set(special)) == 2 else special[0]
    x, y = (Fraction(0) if v == "-0" else v for v in (a, b))
    if x + y == 0 and (a, b) != (Fraction(0), Fraction(0)):
        both = a == b == "-0"
        return "-0" if both or mode == "rm" else Fraction(0)
    return x + y


def multiply_values(a: Any, b: Any) -> Any:
    sign = sign_of(a) * sign_of(b)
    zero = [v in ("-0", Fraction(0)) for v in (a, b)]
    infinite = [v in ("inf", "-inf") for v in (a, b)]
    if "nan" in (a, b) or (any(zero) and any(infinite)):
        return "nan"
    if any(infinite):
        return "inf" if sign > 0 else "-inf"
    if any(zero):
        return Fraction(0) if sign > 0 else "-0"
    return a * b


def divide_values(a: Any, b: Any) -> Any:
    if b in ("-0", Fraction(0)):
        inverse = "inf" if sign_of(b) > 0 else "-inf"
        return "nan" if a in ("-0", Fraction(0), "nan") else multiply_values(a, inverse)
    if b in ("inf", "-inf"):
        zero = Fraction(0) if sign_of(b) > 0 else "-0"
        return "nan" if a in ("inf", "-inf", "nan") else multiply_values(a, zero)
    return "nan" if b == "nan" else multiply_values(a, 1 / b)


def rounded(value: Any, form: str, mode: str, sign: int) -> int:
    """Encode; a result that rounds to zero keeps its sign."""
    bits = encode(value, form, mode)
    if bits == 0 and sign < 0 and not isinstance(value, str) and value != 0:
        return 1 << sum(FORMATS[form])
    return bits


def float_checks(form: str, modes: tuple[str, ...]) -> list[Check]:
    fraction, exponent = FORMATS[form]
    bits = 1 + fraction + exponent
    columns = [numbers(form, seed) for seed in range(3)]

    def make(text: str, count: int, function: Callable[..., Any], mode: str) -> Check:
        def reference(*patterns: int) -> int:
            value = function(*(decode(p, form) for p in patterns))
            return rounded(value, form, mode, sign_of(value))

        return Opcode(text, klass(bits), [klass(bits)] * count, columns[:count]), reference

    checks = []
    for mode in modes:
        dot_mode = f".{mode}"

        def fused(a: Any, b: Any, c: Any, mode: str = mode) -> Any:
            return add_values(multiply_values(a, b), c, mode)

        checks += [
            make(f"add{dot_mode}.{form}", 2, lambda a, b, m=mode: add_values(a, b, m), mode),
            make(
                f"sub{dot_mode}.{form}",
                2,
                lambda a, b, m=mode: add_values(a, multiply_values(b, Fraction(-1)), m),
                mode,
            ),
            make(f"mul{dot_mode}.{form}", 2, multiply_values, mode),
            make(f"fma{dot_mode}.{form}", 3, fused, mode),
        ]
        if form in ("f32", "f64"):
            checks += [
                make(f"div{dot_mode}.{form}", 2, divide_values, mode),
                make(f"rcp{dot_mode}.{form}", 1, lambda a: divide_values(Fraction(1), a), mode),
            ]
    return checks


def drop_nans(checks: list[Check], form: str) -> list[Check]:
    """Leave out rows whose double result is NaN: PTX does not fix those bits."""
    if form in NAN:
        return checks
    kept = []
    for opcode, reference in checks:
        rows = list(zip(*opcode.values, strict=True))
        good = [i for i, row in enumerate(rows) if reference(*map(int, row)) != 0]
        opcode.values = [values[good] for values in opcode.values]
        kept.append((opcode, reference))
    return kept


@pytest.mark.parametrize("form", ["f32", "f64", "f16", "bf16"])
def test_float_arithmetic(form: str) -> None:
    modes = ("rn", "rz", "rm", "rp") if form in ("f32", "f64") else ("rn",)
    run_checks(drop_nans(float_checks(form, modes), form))


@pytest.mark.parametrize("form", ["f32", "f64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_square_roots(form: str, mode: str) -> None:
    values = numbers(form, 5)
    positive = [v for v in values if not isinstance(decode(int(v), form), str)]
    positive = [v for v in positive if decode(int(v), form) > 0]  # type: ignore[operator]
    bits = klass(1 + sum(FORMATS[form]))
    opcode = Opcode(f"sqrt.{mode}.{form}", bits, [bits], [np.array(positive)])

    def reference(pattern: int) -> int:
        value = decode(pattern, form)
        assert isinstance(value, Fraction)
        return square_root(value, form, mode)

    run_checks([(opcode, reference)])


def test_packed_halves_do_what_single_ones_do() -> None:
    for form in ("f16", "bf16"):
        singles = float_checks(form, ("rn",))
        packed = []
        for opcode, reference in singles:
            values = [v | (np.roll(v, 5) << np.uint64(16)) for v in opcode.values]

            def both(*patterns: int, f: Callable[..., int] = reference) -> int:
                return f(*(p >> 16 for p in patterns)) << 16 | f(*(p & 0xFFFF for p in patterns))

            text = opcode.text + "x2"
            packed.append((Opcode(text, "b32", ["b32"] * len(values), values), both))
        run_checks(packed)


@pytest.mark.parametrize("form", ["f32", "f64", "f16", "bf16"])
def test_extremes_and_signs(form: str) -> None:
    bits = 1 + sum(FORMATS[form])
    top = 1 << (bits - 1)

    def order(pattern: int) -> int:
        return -(pattern & ~top) - 1 if pattern & top else pattern

    def extreme(a: int, b: int, least: bool, propagate: bool) -> int:
        lost = [decode(v, form) == "nan" for v in (a, b)]
        if any(lost) and (propagate or all(lost)):
            return NAN[form]
        if any(lost):
            return b if lost[0] else a
        return (min if least else max)(a, b, key=order)

    columns = [numbers(form, 1), numbers(form, 2)]
    if form not in NAN:  # two NaNs have no fixed result
        good = [decode(int(v), form) != "nan" for v in columns[0]]
        columns = [c[good] for c in columns]
    checks: list[Check] = []
    for name, least in (("min", True), ("max", False)):
        for suffix, propagate in (("", False), (".NaN", True)):
            if propagate and form == "f64":
                continue
            opcode = Opcode(f"{name}{suffix}.{form}", klass(bits), [klass(bits)] * 2, columns)
            checks.append(
                (opcode, lambda a, b, x=least, y=propagate: extreme(a, b, x, y)),
            )
    finite = [np.array([v for v in columns[0] if decode(int(v), form) != "nan"])]
    kind = [klass(bits)]
    checks.append((Opcode(f"abs.{form}", kind[0], kind, finite), lambda a: a & ~top))
    checks.append((Opcode(f"neg.{form}", kind[0], kind, finite), lambda a: a ^ top))
    run_checks(checks)


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_float_comparisons(form: str) -> None:
    bits = 1 + sum(FORMATS[form])
    columns = [numbers(form, 1), numbers(form, 2)]
    columns[1][::4] = columns[0][::4]  # some are equal
    view = np.float32 if form == "f32" else np.float64
    word = np.uint32 if form == "f32" else np.uint64

    def number(pattern: int) -> float:
        return float(np.array([pattern], word).view(view)[0])

    checks: list[Check] = []
    for name, compare in COMPARE.items():
        for unordered in (False, True):

            def reference(
                a: int, b: int, f: Callable[..., bool] = compare, u: bool = unordered
            ) -> int:
                x, y = number(a), number(b)
                return int(u if x != x or y != y else f(x, y))

            text = f"setp.{name}{'u' if unordered else ''}.{form}"
            checks.append((Opcode(text, "pred", [klass(bits)] * 2, columns), reference))
    for text, function in (
        (f"setp.num.{form}", lambda a, b: int(number(a) == number(a) and number(b) == number(b))),
        (f"setp.nan.{form}", lambda a, b: int(number(a) != number(a) or number(b) != number(b))),
    ):
        checks.append((Opcode(text, "pred", [klass(bits)] * 2, columns), function))
    run_checks(checks)


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_float_to_integer(form: str) -> None:
    bits = 1 + sum(FORMATS[form])
    values = np.concatenate([numbers(form, 3), spread(form)])
    checks: list[Check] = []
    for kind, mode in itertools.product(
        ("s16", "u16", "s32", "u32", "s64", "u64"), ("rni", "rzi", "rmi", "rpi")
    ):
        width = int(kind[1:])
        least, most = (
            (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
        )

        def reference(
            a: int, mode: str = mode, width: int = width, least: int = least, most: int = most
        ) -> int:
            value = decode(a, form)
            if value == "nan":
                return 1 << 63 if width == 64 else 0
            if isinstance(value, str):
                value = Fraction({"inf": most, "-inf": least, "-0": 0}[value])
            return min(max(round_to_integer(value, mode), least), most) & (1 << width) - 1

        text = f"cvt.{mode}.{kind}.{form}"
        checks.append((Opcode(text, klass(width), [klass(bits)], [values]), reference))
    run_checks(checks)


def test_rounding_between_float_formats() -> None:
    checks: list[Check] = []
    wide, single = np.concatenate([numbers("f64", 3), spread("f64")]), numbers("f32", 3)
    close = single.astype(np.uint32).view(np.float32).astype(np.float64).view(np.uint64)
    wide = np.concatenate([wide, close, close + np.uint64(1), close - np.uint64(1)])
    for mode in ("rn", "rz", "rm", "rp"):

        def narrow(a: int, mode: str = mode) -> int:
            value = decode(a, "f64")
            return rounded(value, "f32", mode, sign_of(value))

        checks.append((Opcode(f"cvt.{mode}.f32.f64", "b32", ["b64"], [wide]), narrow))
    numeric = np.array([v for v in single if decode(int(v), "f32") != "nan"])
    checks.append(
        (
            Opcode("cvt.f64.f32", "b64", ["b32"], [numeric]),
            lambda a: encode(decode(a, "f32"), "f64"),
        )
    )
    for form, values in (("f32", numeric), ("f64", spread("f64"))):
        bits = klass(1 + sum(FORMATS[form]))
        for mode in ("rni", "rzi", "rmi", "rpi"):

            def integral(a: int, form: str = form, mode: str = mode) -> int:
                value = decode(a, form)
                if isinstance(value, str):
                    return a
                result = Fraction(round_to_integer(value, mode))
                if result == 0 and value < 0:
                    return encode("-0", form)
                return encode(result, form)

            checks.append((Opcode(f"cvt.{mode}.{form}.{form}", bits, [bits], [values]), integral))

    def saturated(a: int) -> int:
        value = decode(a, "f32")
        if isinstance(value, str):
            return encode(Fraction({"inf": 1}.get(value, 0)), "f32")
        return encode(min(max(value, Fraction(0)), Fraction(1)), "f32")

    checks.append((Opcode("cvt.sat.f32.f32", "b32", ["b32"], [single]), saturated))
    run_checks(checks)
