"""What a host has, and one rank's share of it: the defaults of backends in shared memory."""

import os
from pathlib import Path

from ep_megatron.config import MIB

_MAX_THREADS = 4


def count_cores() -> int:
    """Return how many cores this process may use: its affinity, and its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        share, period = quota.read_text().split()
        if share != "max":
            cores = min(cores, max(1, int(share) // int(period)))
    return cores


def default_threads(num_ranks: int) -> int:
    """Return this rank's share of the cores, at most four: ranks share the memory's bandwidth."""
    return max(1, min(_MAX_THREADS, count_cores() // num_ranks))


def default_max_bytes(folder: str, num_ranks: int) -> int:
    """Return this rank's share of most of what is free on the memory file system."""
    status = os.statvfs(folder)
    return max(MIB, int(0.8 * status.f_bavail * status.f_frsize / num_ranks) // MIB * MIB)


def default_streaming_bytes() -> int:
    """Return a quarter of the last-level cache: more than that is not read again from it."""
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    return max(sizes, default=16 * MIB) // 4
