"""Whether anything notices when an instruction that synchronises our kernels is weakened or lost.

`python -m tests.cuda.mutants` judges every one of every kernel and prints the score. It fails where
more or fewer survive than `HARMLESS` explains.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Collection
from unittest.mock import patch

import pytest

from tests.cuda import emulated
from tests.cuda.emulated import shipped_ptx
from tests.cuda.workloads import WORKLOADS
from tests.emulator.machine import Fault
from tests.emulator.mutate import Verdict, judge, mutants, table

SEEDS = range(2)
_HANG_SECONDS = 40  # that a host waits in vain before this is noticed
# Changes that leave a kernel right, or that emulation cannot notice: how many survive, and why.
_MASKED = (
    "a rank that finds out here that it is masked reads no more of that peer in this call, and "
    "writes to its memory only behind the acquire of the same word in begin"
)
_TICKET = (
    "the ticket of the report of replays, which an emulated host makes 0 while no kernel of its "
    "GPU runs: what the acquire orders is not emulated"
)
HARMLESS: dict[tuple[str, str], tuple[int, str]] = {
    ("ep_packed_meet_kernel", "acquire to relaxed"): (5, f"four: {_MASKED}; one: {_TICKET}"),
    ("ep_packed_meet_kernel", "sys to gpu"): (1, _TICKET),
    ("ep_packed_finish_kernel", "acquire to relaxed"): (2, _MASKED),
    ("ep_packed_mask_kernel", "acquire to relaxed"): (1, _MASKED),
    ("ep_packed_mask_kernel", "release to relaxed"): (
        1,
        "a word of this rank's own memory, which nobody but itself reads",
    ),
}


def kernels() -> dict[str, str]:
    """Return the module of every kernel that synchronises anything, by the kernel's name."""
    modules = {
        kernel: ptx
        for ptx in shipped_ptx()
        for kernel in re.findall(r"^\.visible \.entry (\w+)", ptx, re.MULTILINE)
    }
    return {kernel: ptx for kernel, ptx in modules.items() if any(mutants(ptx, kernel))}


def noticed(kernel: str, text: str, seed: int, mode: str) -> set[str]:
    """Return what is noticed of a module in which one kernel was changed."""
    ptx = [text if f".entry {kernel}(" in other else other for other in shipped_ptx()]
    for start, workloads in WORKLOADS.items():
        if not kernel.startswith(start):
            continue
        for workload in workloads:
            try:
                reports = workload(ptx, seed, mode)
            except (
                AssertionError,
                pytest.fail.Exception,
                Fault,
                ValueError,
                RuntimeError,
            ) as error:
                return {f"{workload.__name__}: {'fault' if isinstance(error, Fault) else 'error'}"}
            if reports:
                return {f"{workload.__name__}: {kind}" for kind, _ in reports}
    return set()


def verdicts(kernel: str, seeds: range = SEEDS, without: Collection[str] = ()) -> list[Verdict]:
    """Judge every mutant of a kernel, but for some changes."""
    with patch.object(emulated, "HANG_SECONDS", _HANG_SECONDS):
        return judge(
            kernels()[kernel],
            kernel,
            lambda text, seed, mode: noticed(kernel, text, seed, mode),
            seeds,
            without,
        )


def unexplained(kernel: str, judged: list[Verdict]) -> list[str]:
    """Return where more or fewer survive than `HARMLESS` says."""
    survivors = Counter(verdict.mutant.change for verdict in judged if not verdict.noticed)
    allowed = {change: n for (name, change), (n, _) in HARMLESS.items() if name == kernel}
    return [
        f"{kernel}, {change}: {survivors[change]} survive, {allowed.get(change, 0)} explained"
        for change in sorted({*survivors, *allowed})
        if survivors[change] != allowed.get(change, 0)
    ]


def main() -> None:
    """Print a line per mutant and the score."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kernels", nargs="*", help="whose mutants; all kernels'")
    judged, wrong = [], []
    for kernel in parser.parse_args().kernels or kernels():
        begin, of_kernel = time.monotonic(), verdicts(kernel)
        print(f"{kernel} ({time.monotonic() - begin:.0f} s)\n{table(of_kernel)}", flush=True)
        judged += of_kernel
        wrong += unexplained(kernel, of_kernel)
    num_noticed = sum(bool(verdict.noticed) for verdict in judged)
    print(f"all: {num_noticed} of {len(judged)}, {num_noticed / len(judged):.1%}", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
