"""Modified and packed opcodes of the emulator against the plain ones, which other files test."""

from typing import Any

import numpy as np
import pytest

from tests.emulator.checks import COMPARE, LOGIC, klass, numbers
from tests.emulator.exact import FORMATS
from tests.emulator.machine import forms
from tests.emulator.opcodes import TESTED, Opcode, run_opcodes

Array = np.ndarray[Any, Any]


def run(texts: list[str], form: str, count: int, columns: list[Array]) -> list[Array]:
    """Run opcodes of one format on the same operands."""
    bits = klass(1 + sum(FORMATS[form]))
    return run_opcodes([Opcode(text, bits, [bits] * count, columns[:count]) for text in texts])


def operands(form: str) -> list[Array]:
    return [numbers(form, seed) for seed in (11, 12, 13)]


def floats(bits: Array) -> Array:
    return bits.astype(np.uint32).view(np.float32)


def flush(bits: Array) -> Array:
    tiny = (bits & np.uint64(0x7F800000)) == 0
    return np.where(tiny, bits & np.uint64(0x80000000), bits)


@pytest.mark.parametrize(
    ("short", "full", "form", "count"),
    [
        *((f"{op}.{f}", f"{op}.rn.{f}", f, 2) for op in ("add", "sub", "mul") for f in FORMATS),
        *(
            (f"mad.{m}.{f}", f"fma.{m}.{f}", f, 3)
            for m in ("rn", "rz", "rm", "rp")
            for f in ("f32", "f64")
        ),
    ],
)
def test_defaults_are_the_nearest_and_mad_is_fma(
    short: str, full: str, form: str, count: int
) -> None:
    one, other = run([short, full], form, count, operands(form))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "plain", "count"),
    [
        ("add.ftz.f32", "add.rn.f32", 2),
        ("add.rn.ftz.f32", "add.rn.f32", 2),
        ("sub.ftz.f32", "sub.rn.f32", 2),
        ("sub.rn.ftz.f32", "sub.rn.f32", 2),
        ("mul.ftz.f32", "mul.rn.f32", 2),
        ("mul.rn.ftz.f32", "mul.rn.f32", 2),
        ("fma.rn.ftz.f32", "fma.rn.f32", 3),
    ],
)
def test_flushed_subnormals(text: str, plain: str, count: int) -> None:
    columns = operands("f32")
    (got,) = run([text], "f32", count, columns)
    (expected,) = run([plain], "f32", count, [flush(c) for c in columns])
    np.testing.assert_array_equal(got, flush(expected))


@pytest.mark.parametrize(("text", "count"), [("add", 2), ("mul", 2), ("fma.rn", 3)])
def test_saturated_results(text: str, count: int) -> None:
    plain = f"{text}.f32" if count == 3 else f"{text}.rn.f32"
    got, full = run([f"{text}.sat.f32", plain], "f32", count, operands("f32"))
    with np.errstate(invalid="ignore"):
        clipped = np.clip(np.nan_to_num(floats(full), nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    np.testing.assert_array_equal(floats(got), clipped)


APPROXIMATE: dict[str, Any] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_close(name: str) -> None:
    values = np.random.default_rng(0).uniform(0.01, 60, 128).astype(np.float32)
    texts = [f"{name}.approx.f32"]
    if name not in ("tanh", "sin", "cos"):
        texts.append(f"{name}.approx.ftz.f32")
    exact = APPROXIMATE[name](values.astype(np.float64))
    for got in run(texts, "f32", 1, [values.view(np.uint32).astype(np.uint64)]):
        np.testing.assert_allclose(floats(got), exact, rtol=2**-22, atol=2**-22)


def test_approximate_division_is_close() -> None:
    a, b = (np.random.default_rng(s).uniform(0.1, 9, 128).astype(np.float32) for s in (0, 1))
    columns = [c.view(np.uint32).astype(np.uint64) for c in (a, b)]
    for got in run(["div.approx.f32", "div.full.f32"], "f32", 2, columns):
        np.testing.assert_allclose(floats(got), a / b, rtol=2**-22)


@pytest.mark.parametrize("form", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("name", "count"),
    [("min", 2), ("max", 2), ("min.NaN", 2), ("max.NaN", 2), ("abs", 1), ("neg", 1)]
    + [(f"{op}", 2) for op in ("add", "sub", "mul")],
)
def test_both_halves_of_a_register(form: str, name: str, count: int) -> None:
    columns = operands(form)[:count]
    shifted = [np.roll(c, 7) for c in columns]
    text = f"{name}.{form}"
    (low,), (high,) = run([text], form, count, columns), run([text], form, count, shifted)
    packed = [c | s << np.uint64(16) for c, s in zip(columns, shifted, strict=True)]
    (got,) = run_opcodes([Opcode(text + "x2", "b32", ["b32"] * count, packed)])
    np.testing.assert_array_equal(got, low | high << np.uint64(16))


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_combined_float_comparisons(form: str) -> None:
    columns = [*operands(form)[:2], np.arange(len(numbers(form, 11)), dtype=np.uint64) & 1]
    columns[1][::3] = columns[0][::3]
    names = [name + suffix for name in COMPARE for suffix in ("", "u")] + ["num", "nan"]
    opcodes, combined = [], []
    bits = klass(1 + sum(FORMATS[form]))
    for name in names:
        opcodes.append(Opcode(f"setp.{name}.{form}", "pred", [bits] * 2, columns[:2]))
        for how in LOGIC:
            text = f"setp.{name}.{how}.{form}"
            combined.append(Opcode(text, "pred", [bits, bits, "pred"], columns))
            plain, both = run_opcodes(opcodes), iter(run_opcodes(combined))
    for result in plain:
        for function in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            np.testing.assert_array_equal(next(both), function(result, columns[2]))


@pytest.mark.parametrize("form", ["f32", "f64"])
def test_selection_of_floats(form: str) -> None:
    a, b = operands(form)[:2]
    condition = np.arange(len(a), dtype=np.uint64) & 1
    bits = klass(1 + sum(FORMATS[form]))
    (got,) = run_opcodes([Opcode(f"selp.{form}", bits, [bits, bits, "pred"], [a, b, condition])])
    np.testing.assert_array_equal(got, np.where(condition == 1, a, b))


def packed_conversions() -> list[tuple[str, str, int]]:
    """Return (packed opcode, the opcode it is compared with, bits of a part)."""
    pairs = []
    for form in ("f16", "bf16"):
        for how in ("rz", "rn.relu"):
            pairs.append((f"cvt.{how}.{form}x2.f32", f"cvt.{how}.{form}.f32", 16))
    return pairs


@pytest.mark.parametrize(("packed", "single", "bits"), packed_conversions())
def test_packed_conversions(packed: str, single: str, bits: int) -> None:
    a, b = operands("f32")[:2]
    low, high, both = run_opcodes(
        [
            Opcode(single, "b16", ["b32"], [b]),
            Opcode(single, "b16", ["b32"], [a]),
            Opcode(packed, "b32", ["b32"] * 2, [a, b]),
        ]
    )
    np.testing.assert_array_equal(both, low | high << np.uint64(bits))


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_eight_bits_without_negative_numbers(form: str) -> None:
    a, b = operands("f32")[:2]
    positive = [np.where(floats(c) < 0, np.uint64(0), c) for c in (a, b)]
    text = f"cvt.rn.satfinite.relu.{form}x2.f32"
    got, expected = run_opcodes(
        [
            Opcode(text, "b16", ["b32"] * 2, [a, b]),
            Opcode(f"cvt.rn.satfinite.{form}x2.f32", "b16", ["b32"] * 2, positive),
        ]
    )
    np.testing.assert_array_equal(got, expected)


def test_every_computing_opcode_is_tested(request: pytest.FixtureRequest) -> None:
    """Counts what the others ran: it needs all files of this kind in one run, this one last."""
    ran = {item.path.name for item in request.session.items}
    needed = {f"test_emulator_{name}.py" for name in ("conversions", "floats", "integers")}
    if not needed <= ran or request.config.getoption("keyword"):
        pytest.skip("needs the tests of all opcodes in one run")
    assert sorted(set(forms()) - TESTED) == []
