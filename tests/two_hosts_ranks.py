"""What one rank does in tests/test_two_hosts.py: started there, on a host with a network."""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.bench.two_hosts import LinkMeter
from tests.routing import CASES, Case
from tests.test_dispatch import send
from tests.test_hierarchical import check_bits

BYTES_CASE = Case(
    "bytes", (300, 260, 310, 290), num_topk=6, experts_per_rank=4, hidden=1024, style="holes"
)
NUM_CALLS = 3


def exact(rank: int) -> None:
    """Every routing for this many ranks, bit for bit, on the backend that is found by itself."""
    assert dist.group.WORLD is not None
    buffer = Buffer(dist.group.WORLD, config=BufferConfig(timeout=60))
    assert buffer.backend == "hierarchical"
    layout = os.environ["EP_TEST_LAYOUT"]
    for case in CASES:
        if case.num_ranks == dist.get_world_size():
            for dtype in (torch.bfloat16, torch.float32):
                check_bits(rank, layout, case, dtype, buffer)


def count_bytes(rank: int) -> None:
    """Print what leaves this host in some dispatches and combines, by backend."""
    assert dist.group.WORLD is not None
    is_first = os.environ["LOCAL_RANK"] == "0"
    sent, meter = {}, LinkMeter(os.environ["GLOO_SOCKET_IFNAME"], is_first)
    for backend in ("hierarchical", "process_group"):
        buffer = Buffer(dist.group.WORLD, config=BufferConfig(backend=backend, timeout=60))

        def step(buffer: Buffer) -> None:
            recv_x, _, _, handle = send(buffer, BYTES_CASE, rank, False, torch.bfloat16)
            buffer.combine(recv_x, handle)

        step(buffer)
        before = meter.read()
        for _ in range(NUM_CALLS):
            step(buffer)
        sent[backend] = meter.read() - before
    if is_first:
        print("SENT", json.dumps(sent), flush=True)


def lose_a_rank(rank: int) -> None:
    """The last rank, on the second host, is killed; everybody names it, on both hosts."""
    assert dist.group.WORLD is not None
    buffer = Buffer(dist.group.WORLD, config=BufferConfig(timeout=10))
    case = Case("faults", (40, 30, 20), hidden=64)
    recv_x, _, _, handle = send(buffer, case, rank, True, torch.float32)
    last = dist.get_world_size() - 1
    if rank == last:
        print("NAMED", rank, "itself", flush=True)
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank {last}"):
        buffer.combine(recv_x, handle)
    assert time.monotonic() - start < 13
    print("NAMED", rank, flush=True)
    os._exit(0)


ROLES: dict[str, Callable[[int], None]] = {
    "exact": exact,
    "count_bytes": count_bytes,
    "lose_a_rank": lose_a_rank,
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    for role in sys.argv[1:]:
        ROLES[role](dist.get_rank())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
