"""One line about calls that were made under many interleavings."""

import time
from collections.abc import Callable


def has_failed(what: str, num_seeds: int, run: Callable[[int], object]) -> bool:
    """Call `run` with every seed until one raises; print how that went, and return whether one did.

    `run` raises where a bit is wrong or the machine has a report.
    """
    begin, outcome, failed = time.monotonic(), "no difference, no report", False
    seed = 0
    try:
        for seed in range(num_seeds):
            run(seed)
    except (AssertionError, RuntimeError, ValueError) as error:
        outcome, failed = f"FAILED in seed {seed}: {error}", True
    seconds = time.monotonic() - begin
    print(f"{what}: {num_seeds} seeds, {outcome} ({seconds:.0f} s)", flush=True)
    return failed
