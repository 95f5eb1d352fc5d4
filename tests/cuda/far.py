"""Low-latency calls between nodes under many interleavings: `python -m tests.cuda.far --seeds 20`.

Every layout, in race and in weak mode, BF16 and FP8; all bits are the definition's, and nothing may
be reported.
"""

import argparse
import sys
from functools import partial

from ep_megatron import Buffer
from tests.cuda.buffers import NodeBuffers
from tests.cuda.seeds import has_failed
from tests.packed_cases import PackedCase
from tests.test_low_latency import check_cases

FOUR = PackedCase((6, 0, 8, 3), num_topk=4)
EIGHT = PackedCase((4, 1, 8, 0, 2, 7, 3, 5), num_topk=5)
LAYOUTS = {"AABB": FOUR, "ABBA": FOUR, "AAAABBBB": EIGHT, "AABBCCDD": EIGHT}


def check_twice(rank: int, buffer: Buffer, case: PackedCase) -> None:
    """Calls one after the other, so that every place is written again."""
    for _ in range(2):
        check_cases(rank, buffer, [case], ["bf16", "fp8"])


def run(layout: str, mode: str, seed: int) -> None:
    """Raise where a bit is wrong or anything is reported."""
    buffers = NodeBuffers(layout, seed, mode)
    buffers.call(check_twice, LAYOUTS[layout])
    reports = buffers.machine.report()
    assert reports == [], (layout, mode, seed, reports)


def main() -> None:
    """Print a line per layout and mode."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    num_seeds = parser.parse_args().seeds
    any_failed = False
    for layout in LAYOUTS:
        for mode in ("race", "weak"):
            any_failed |= has_failed(f"{layout} {mode}", num_seeds, partial(run, layout, mode))
    sys.exit(any_failed)


if __name__ == "__main__":
    main()
