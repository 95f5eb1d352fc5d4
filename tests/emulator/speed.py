"""How fast the emulator is here: `python -m tests.emulator.speed`, best of three runs per mode."""

import struct
import time

import numpy as np

from tests.emulator.machine import Machine, sample


def exchange_seconds(mode: str, seed: int, num_ranks: int = 4) -> tuple[int, float]:
    """Return the warp instructions and CPU seconds of one exchange of 64 rows of 4 KB."""
    rows, vectors = 64, 256
    machine = Machine(num_ranks, seed, mode)
    machine.load(sample("exchange"))
    inputs, outputs, windows, flags = [], [], [], []
    for rank in range(num_ranks):
        inputs.append(machine.place(rank, np.zeros((rows, vectors, 4), np.uint32)))
        outputs.append(machine.allocate(rank, num_ranks * rows * vectors * 16))
        windows.append(machine.allocate(rank, num_ranks * 2 * vectors * 16, True))
        flags.append(machine.place(rank, np.zeros(2 * num_ranks, np.int32), True))
    machine.meet()
    pad = [0] * (8 - num_ranks)
    tables = struct.pack("<16Q", *windows, *pad, *flags, *pad)
    for rank in range(num_ranks):
        arguments = (tables, rank, num_ranks, rows, vectors, inputs[rank], outputs[rank])
        packed = machine.pack("exchange", *arguments)
        machine.launch(rank, "exchange", 1, 64 * num_ranks, 0, packed)
    begin = time.process_time()
    machine.run()
    return machine.steps, time.process_time() - begin


def main() -> None:
    for mode in ("plain", "race", "weak", "race+weak"):
        runs = [exchange_seconds(mode, seed) for seed in range(3)]
        best = max(steps / seconds for steps, seconds in runs)
        print(f"{mode:10s} {best / 1e6:5.1f} million warp instructions per CPU second")


if __name__ == "__main__":
    main()
