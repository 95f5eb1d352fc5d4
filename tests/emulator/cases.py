"""The sample kernels as runs with a known result."""

import struct
from dataclasses import dataclass

import numpy as np

from tests.emulator.machine import Fault, Machine, sample

SLOTS = 2


@dataclass(frozen=True)
class Outcome:
    """What one run showed. `reports` are (kind, text) pairs."""

    is_right: bool
    fault: str
    reports: list[tuple[str, str]]

    @property
    def kinds(self) -> set[str]:
        """Everything that told us of a bug: report kinds, "fault", "data"."""
        found = {kind for kind, _ in self.reports}
        if self.fault:
            found.add("hang" if self.fault.startswith("hang") else "fault")
        elif not self.is_right:
            found.add("data")
        return found


def run_all(machine: Machine) -> str:
    """Run to the end; return the fault's text, or nothing."""
    try:
        machine.run()
    except Fault as fault:
        return str(fault)
    return ""


def run_exchange(
    kernel: str, seed: int, mode: str, ptx: str | None = None, num_ranks: int = 2
) -> Outcome:
    """Let every rank send rows to every rank through rings of two slots."""
    num_rows, vectors = 7, (1, 40)[seed % 2]
    machine = Machine(num_ranks, seed, mode, patience=300_000)
    machine.load(ptx or sample("exchange"))
    random = np.random.default_rng(seed)
    ranks = range(num_ranks)
    rows = [random.integers(0, 2**32, (num_rows, vectors, 4), np.uint32) for _ in ranks]
    windows, flags, inputs, outputs = [], [], [], []
    for rank in ranks:
        windows.append(machine.allocate(rank, num_ranks * SLOTS * vectors * 16, True, "window"))
        flags.append(machine.place(rank, np.zeros(2 * num_ranks, np.int32), True, "flags"))
        inputs.append(machine.place(rank, rows[rank], name="input"))
        outputs.append(machine.allocate(rank, num_ranks * rows[rank].nbytes, name="output"))
    machine.meet()
    pad = [0] * (8 - num_ranks)
    tables = struct.pack("<16Q", *windows, *pad, *flags, *pad)
    for rank in ranks:
        arguments = (tables, rank, num_ranks, num_rows, vectors, inputs[rank], outputs[rank])
        packed = machine.pack(kernel, *arguments)
        machine.launch(rank, kernel, 1, 64 * num_ranks, 0, packed)
    fault = run_all(machine)
    is_right = not fault and all(
        np.array_equal(
            machine.fetch(rank, outputs[rank], (num_ranks, num_rows, vectors, 4), np.uint32),
            np.stack(rows),
        )
        for rank in ranks
    )
    return Outcome(is_right, fault, machine.report())


def run_staging(kernel: str, seed: int, mode: str, ptx: str | None = None) -> Outcome:
    """Copy rows to the other rank through shared memory; that rank reads them after a flag."""
    num_bytes, chunks = (512, 1040)[seed % 2], 3
    machine = Machine(2, seed, mode, patience=300_000)
    machine.load(ptx or sample("staging"))
    count = num_bytes * chunks // 4
    rows = np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)
    source = machine.place(0, rows, name="input")
    target = machine.allocate(1, rows.nbytes, True, "target")
    copy = machine.allocate(1, rows.nbytes, name="copy")
    flag = machine.place(1, np.zeros(1, np.int32), True, "flag")
    machine.meet()
    packed = machine.pack(kernel, source, target, flag, num_bytes, chunks)
    machine.launch(0, kernel, 1, 64, num_bytes, packed)
    machine.launch(1, "check_rows", 1, 64, 0, machine.pack("check_rows", flag, target, copy, count))
    fault = run_all(machine)
    expected = rows ^ np.uint32(0x01010101)
    is_right = not fault and np.array_equal(machine.fetch(1, copy, count, np.uint32), expected)
    return Outcome(is_right, fault, machine.report())
