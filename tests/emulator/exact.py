"""Floating-point numbers as fractions, rounded by hand: a reference of arithmetic.

A format is (fraction bits, exponent bits). A value is a Fraction, or one of the strings "nan",
"inf", "-inf" and "-0".
"""

from fractions import Fraction
from math import isqrt

FORMATS = {"f64": (52, 11), "f32": (23, 8), "f16": (10, 5), "bf16": (7, 8)}
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
Value = Fraction | str


def decode(bits: int, form: str) -> Value:
    fraction_bits, exponent_bits = FORMATS[form]
    fraction = bits & ((1 << fraction_bits) - 1)
    exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1)
    negative = bits >> (fraction_bits + exponent_bits) & 1
    if exponent == (1 << exponent_bits) - 1:
        return "nan" if fraction else "-inf" if negative else "inf"
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        value = Fraction(fraction) * Fraction(2) ** (1 - bias - fraction_bits)
    else:
        value = Fraction(fraction + (1 << fraction_bits)) * Fraction(2) ** (
            exponent - bias - fraction_bits
        )
    return ("-0" if negative else value) if value == 0 else -value if negative else value


def round_units(units: Fraction, negative: bool, mode: str) -> int:
    """Round a magnitude to an integer: rn (ties to even), rz, rm (down), rp (up)."""
    whole = units.numerator // units.denominator
    rest = units - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": rest > 0 and negative,
        "rp": rest > 0 and not negative,
    }[mode]
    return whole + up


def encode(value: Value, form: str, mode: str = "rn") -> int:
    """Round to the format; by the mode, too large is infinity or the largest number."""
    fraction_bits, exponent_bits = FORMATS[form]
    sign = 1 << (fraction_bits + exponent_bits)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if isinstance(value, str):
        return {"nan": NAN.get(form, 0), "inf": infinity, "-inf": sign | infinity, "-0": sign}[
            value
        ]
    negative = value < 0
    magnitude = abs(value)
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = 1 - bias
    if magnitude:
        top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        top -= magnitude < Fraction(2) ** top
        exponent = max(exponent, top)
    units = round_units(magnitude / Fraction(2) ** (exponent - fraction_bits), negative, mode)
    bits = ((exponent + bias - 1) << fraction_bits) + units
    if bits >= infinity:
        towards_zero = mode == "rz" or mode == ("rp" if negative else "rm")
        bits = infinity - 1 if towards_zero else infinity
    return (sign if negative else 0) | bits


def square_root(value: Fraction, form: str, mode: str) -> int:
    """Round the root of a positive number: enough digits, and one more that says inexact."""
    shift = 2 * (FORMATS[form][0] + 40 + abs(value.denominator.bit_length()))
    scaled = value * 2**shift
    whole = scaled.numerator // scaled.denominator
    root = isqrt(whole)
    inexact = root * root != scaled
    return encode(Fraction(2 * root + inexact, 2 ** (shift // 2 + 1)), form, mode)
