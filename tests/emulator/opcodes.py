"""Run single opcodes over arrays of operands."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator.machine import Machine

LANES = 32
TESTED: set[str] = set()  # every opcode that has run here
WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}

PARAMETERS = ", ".join(f".param .u64 p{i}" for i in range(6))
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


@dataclass
class Opcode:
    """One opcode, the register class of its result, its operands' classes or immediates."""

    text: str
    result: str
    operands: list[str]
    values: list[np.ndarray[Any, Any]]
    immediates: list[str] = field(default_factory=list)

    def kernel(self, name: str) -> str:
        """Return PTX that applies the opcode to element i of each array."""
        lines = [
            ".reg .b32 %t<4>; .reg .b64 %addr<2>; .reg .b64 %raw<8>;",
            f".reg .{self.result} %d;",
            "mov.u32 %t0, %ctaid.x; mov.u32 %t1, %tid.x; mov.u32 %t2, %ntid.x;",
            "mad.lo.s32 %t3, %t0, %t2, %t1;",
        ]
        names = []
        for i, kind in enumerate(self.operands):
            lines += [
                f".reg .{kind} %o{i};",
                f"ld.param.u64 %addr0, [p{i + 1}];",
                "mad.wide.u32 %addr1, %t3, 8, %addr0;",
                f"ld.global.b64 %raw{i}, [%addr1];",
                convert(f"%o{i}", f"%raw{i}", kind),
            ]
            names.append(f"%o{i}")
        lines += [
            f"{self.text} %d, {', '.join(names + self.immediates)};",
            "ld.param.u64 %addr0, [p0]; mad.wide.u32 %addr1, %t3, 8, %addr0;",
            widen("%raw7", "%d", self.result),
            "st.global.b64 [%addr1], %raw7; ret;",
        ]
        return f".visible .entry {name}({PARAMETERS}) {{\n" + "\n".join(lines) + "\n}\n"


def convert(register: str, raw: str, kind: str) -> str:
    if kind == "pred":
        return f"setp.ne.u64 {register}, {raw}, 0;"
    return f"cvt.u{WIDTHS[kind]}.u64 {register}, {raw};"


def widen(raw: str, register: str, kind: str) -> str:
    if kind == "pred":
        return f"selp.b64 {raw}, 1, 0, {register};"
    return f"cvt.u64.u{WIDTHS[kind]} {raw}, {register};"


def run_opcodes(opcodes: list[Opcode]) -> list[np.ndarray[Any, Any]]:
    """Return each opcode's results as uint64 arrays."""
    TESTED.update(opcode.text for opcode in opcodes)
    machine = Machine(1)
    machine.load(HEAD + "".join(op.kernel(f"k{i}") for i, op in enumerate(opcodes)))
    outputs = []
    for i, opcode in enumerate(opcodes):
        count = len(opcode.values[0])
        padded = -(-count // LANES) * LANES
        arrays = [np.resize(values.astype(np.uint64), padded) for values in opcode.values]
        outputs.append((machine.allocate(0, 8 * padded), padded, count))
        addresses = [outputs[-1][0]] + [machine.place(0, array) for array in arrays]
        addresses += [0] * (6 - len(addresses))
        packed = machine.pack(f"k{i}", *addresses)
        machine.launch(0, f"k{i}", padded // LANES, LANES, 0, packed)
    machine.run()
    assert not machine.report()
    return [
        machine.fetch(0, address, padded, np.uint64)[:count] for address, padded, count in outputs
    ]
