"""Integer, logic and comparison opcodes of the emulator against Python's integers."""

from collections.abc import Callable
from fractions import Fraction

import pytest

from tests.emulator.checks import (
    COMPARE,
    LOGIC,
    Check,
    check,
    of_type,
    quotient,
    remainder,
    run_checks,
    signed,
)
from tests.emulator.exact import encode

INTEGER: dict[str, tuple[int, Callable[..., int]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul.lo": (2, lambda a, b: a * b),
    "mad.lo": (3, lambda a, b, c: a * b + c),
    "div": (2, quotient),
    "rem": (2, remainder),
    "min": (2, min),
    "max": (2, max),
    "sad": (3, lambda a, b, c: c + abs(a - b)),
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_arithmetic(kind: str) -> None:
    bits, read, mask = of_type(kind)
    checks = []
    for name, (count, reference) in INTEGER.items():
        checks.append(
            check(
                f"{name}.{kind}",
                bits,
                [bits] * count,
                lambda *v, f=reference: f(*map(read, v)) & mask,
            )
        )
    high: list[Check] = [
        check(f"mul.hi.{kind}", bits, [bits] * 2, lambda a, b: read(a) * read(b) >> bits & mask),
        check(
            f"mad.hi.{kind}",
            bits,
            [bits] * 3,
            lambda a, b, c: (read(a) * read(b) >> bits) + c & mask,
        ),
    ]
    checks += high
    if bits < 64:
        wide = (1 << 2 * bits) - 1
        checks += [
            check(f"mul.wide.{kind}", 2 * bits, [bits] * 2, lambda a, b: read(a) * read(b) & wide),
            check(
                f"mad.wide.{kind}",
                2 * bits,
                [bits, bits, 2 * bits],
                lambda a, b, c: read(a) * read(b) + c & wide,
            ),
        ]
    if kind[0] == "s":
        checks += [
            check(f"abs.{kind}", bits, [bits], lambda a: abs(read(a)) & mask),
            check(f"neg.{kind}", bits, [bits], lambda a: -read(a) & mask),
        ]
    shift = check(f"shr.{kind}", bits, [bits, 32], lambda a, n: read(a) >> min(n, bits) & mask)
    run_checks([*checks, shift])


@pytest.mark.parametrize("bits", [1, 16, 32, 64])
def test_logic(bits: int) -> None:
    mask = (1 << bits) - 1
    kind = "pred" if bits == 1 else f"b{bits}"
    checks = [
        check(f"and.{kind}", bits, [bits] * 2, lambda a, b: a & b),
        check(f"or.{kind}", bits, [bits] * 2, lambda a, b: a | b),
        check(f"xor.{kind}", bits, [bits] * 2, lambda a, b: a ^ b),
        check(f"not.{kind}", bits, [bits], lambda a: ~a & mask),
    ]
    if bits > 1:
        checks += [
            check(f"shl.{kind}", bits, [bits, 32], lambda a, n: a << min(n, 64) & mask),
            check(f"shr.{kind}", bits, [bits, 32], lambda a, n: a >> min(n, 64)),
        ]
    if bits >= 32:
        checks += [
            check(f"popc.{kind}", 32, [bits], lambda a: a.bit_count()),
            check(f"clz.{kind}", 32, [bits], lambda a: bits - a.bit_length()),
            check(f"brev.{kind}", bits, [bits], lambda a: int(f"{a:0{bits}b}"[::-1], 2)),
            check(
                f"bfi.{kind}",
                bits,
                [bits, bits, 32, 32],
                lambda a, b, p, n: insert(a, b, p, n, bits),
            ),
        ]
    run_checks(checks)


def insert(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 255, length & 255
    field = ((1 << length) - 1) << position & ((1 << bits) - 1)
    return (b & ~field) | (a << position & field)


def extract(a: int, position: int, length: int, kind: str) -> int:
    bits, _, mask = of_type(kind)
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    # A signed field is filled with its top bit, or the word's when it reaches beyond.
    top = min(position + length - 1, bits - 1)
    value = a >> position & ((1 << max(top - position + 1, 0)) - 1) if position < bits else 0
    if kind[0] == "s" and a >> top & 1:
        value |= -1 << min(max(top - position + 1, 0), length)
    return value & mask


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_bit_fields(kind: str) -> None:
    bits, read, _ = of_type(kind)

    def highest(a: int) -> int:
        value = read(a)
        return ((~value if value < 0 else value).bit_length() - 1) & 0xFFFFFFFF

    def highest_shift(a: int) -> int:
        found = highest(a)
        return found if found == 0xFFFFFFFF else bits - 1 - found

    run_checks(
        [
            check(f"bfe.{kind}", bits, [bits, 32, 32], lambda a, p, n: extract(a, p, n, kind)),
            check(f"bfind.{kind}", 32, [bits], highest),
            check(f"bfind.shiftamt.{kind}", 32, [bits], highest_shift),
        ]
    )


def permuted(a: int, b: int, selectors: int) -> int:
    data = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    result = 0
    for to in range(4):
        selector = selectors >> 4 * to & 15
        byte = data[selector & 7]
        result |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * to
    return result


def dot(a: int, b: int, c: int, kinds: str) -> int:
    for i in range(4):
        x, y = a >> 8 * i & 255, b >> 8 * i & 255
        c += (signed(x, 8) if kinds[0] == "s" else x) * (signed(y, 8) if kinds[1] == "s" else y)
    return c & 0xFFFFFFFF


def test_words_of_bytes_and_bits() -> None:
    both = 0xFFFFFFFFFFFFFFFF
    checks = [
        check("prmt.b32", 32, [32] * 3, permuted),
        check(
            "shf.l.wrap.b32",
            32,
            [32] * 3,
            lambda a, b, n: ((b << 32 | a) << (n & 31) & both) >> 32,
        ),
        check(
            "shf.r.wrap.b32", 32, [32] * 3, lambda a, b, n: (b << 32 | a) >> (n & 31) & 0xFFFFFFFF
        ),
        check(
            "shf.l.clamp.b32",
            32,
            [32] * 3,
            lambda a, b, n: ((b << 32 | a) << min(n, 32) & both) >> 32,
        ),
        check(
            "shf.r.clamp.b32",
            32,
            [32] * 3,
            lambda a, b, n: (b << 32 | a) >> min(n, 32) & 0xFFFFFFFF,
        ),
    ]
    for kinds in ("ss", "uu", "su", "us"):
        text = f"dp4a.{kinds[0]}32.{kinds[1]}32"
        checks.append(check(text, 32, [32] * 3, lambda a, b, c, k=kinds: dot(a, b, c, k)))
    for table in (0x96, 0xE8, 0xCA, 0x1B):
        opcode, _ = check("lop3.b32", 32, [32] * 3, dot)
        opcode.immediates = [str(table)]

        def logic(a: int, b: int, c: int, table: int = table) -> int:
            rows = zip(*(f"{v:032b}" for v in (a, b, c)), strict=True)
            return int("".join(str(table >> int("".join(row), 2) & 1) for row in rows), 2)

        checks.append((opcode, logic))
    run_checks(checks)


UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_integer_comparisons(kind: str) -> None:
    bits, read, _ = of_type(kind)
    names = {name: name for name in COMPARE} | (UNSIGNED_NAMES if kind[0] == "u" else {})
    checks = []
    for name, meaning in names.items():
        if kind[0] == "b" and name not in ("eq", "ne"):
            continue
        compare = COMPARE[meaning]
        checks.append(
            check(
                f"setp.{name}.{kind}",
                1,
                [bits] * 2,
                lambda a, b, f=compare: int(f(read(a), read(b))),
            )
        )
        for combine, function in LOGIC.items():
            checks.append(
                check(
                    f"setp.{name}.{combine}.{kind}",
                    1,
                    [bits, bits, 1],
                    lambda a, b, c, f=compare, g=function: g(int(f(read(a), read(b))), c),
                )
            )
    if kind[0] != "b":
        checks.append(check(f"selp.{kind}", bits, [bits, bits, 1], lambda a, b, c: a if c else b))
    else:
        checks.append(check(f"selp.{kind}", bits, [bits, bits, 1], lambda a, b, c: a if c else b))
    run_checks(checks)


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_conversions(kind: str) -> None:
    bits, read, _ = of_type(kind)
    source = max(bits, 16)
    low = (1 << bits) - 1
    checks = []
    for to in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        to_bits, to_read, to_mask = of_type(to)
        for register in {max(to_bits, 16), 64}:  # narrow results extend into wider registers
            mask = (1 << register) - 1
            checks.append(
                check(
                    f"cvt.{to}.{kind}",
                    register,
                    [source],
                    lambda a, r=to_read, t=to_mask, m=mask: r(read(a & low) & t) & m,
                )
            )
        least, most = (-(1 << to_bits - 1), to_mask >> 1) if to[0] == "s" else (0, to_mask)
        checks.append(
            check(
                f"cvt.sat.{to}.{kind}",
                64,
                [source],
                lambda a, x=least, y=most: min(max(read(a & low), x), y) & 2**64 - 1,
            )
        )
    for form, modes in (("f32", ("rn", "rz", "rm", "rp")), ("f64", ("rn",))):
        width = int(form[1:])
        for mode in modes:
            checks.append(
                check(
                    f"cvt.{mode}.{form}.{kind}",
                    width,
                    [source],
                    lambda a, f=form, m=mode: encode(Fraction(read(a & low)), f, m),
                )
            )
    run_checks(checks)
