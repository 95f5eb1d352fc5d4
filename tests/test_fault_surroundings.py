"""Faults around a Buffer: no memory, no space, Ctrl-C, a group destroyed first, an early end."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.backends.base import Rows
from ep_megatron.backends.hierarchical import HierarchicalBackend
from ep_megatron.backends.host_plan import HostPlan
from ep_megatron.config import MIB
from tests.mortal_ranks import CASE, Ranks
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import send
from tests.test_faults import be_interrupted, be_interrupted_with_work_queued

BACKENDS = ("shared_memory", "process_group", "hierarchical")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A memory file system of 24 MiB, with a file that takes half of it."""
    folder = Path(tempfile.mkdtemp(prefix="ep_small_"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    folder.chmod(0o1777)
    (folder / "filler").write_bytes(bytes(12 * MIB))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def use_a_full_disk(rank: int, folder: str) -> None:
    config = BufferConfig(
        backend="shared_memory", timeout=60, initial_bytes=0, max_bytes=64 * MIB, shm_dir=folder
    )
    buffer = Buffer(dist.group.WORLD, config=config)
    large = Case("large", (1000, 800), hidden=1024)
    small = Case("small", (9, 8), hidden=64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"expected room for all rows, got rank [01]"):
            send(buffer, large, rank, True, torch.float32)
        recv_x, _, _, handle = send(buffer, small, rank, True, torch.float32)
        buffer.combine(recv_x, handle)
        del recv_x, handle
    dist.barrier()
    if rank == 0:
        (Path(folder) / "filler").unlink()
    dist.barrier()
    medium = Case("medium", (60, 50), hidden=1024)
    send(buffer, medium, rank, True, torch.float32)


def start_on_a_full_disk(rank: int, folder: str) -> None:
    config = BufferConfig(backend="shared_memory", timeout=60, initial_bytes=MIB, shm_dir=folder)
    with pytest.raises(RuntimeError, match="Buffer: expected every rank to share its memory, got"):
        Buffer(dist.group.WORLD, config=config)


def test_a_full_file_system_is_an_error_on_every_rank_and_calls_go_on(small_disk: Path) -> None:
    run_on_ranks(2, use_a_full_disk, str(small_disk))
    assert list(small_disk.iterdir()) == []


def test_a_buffer_that_finds_no_space_leaves_nothing(small_disk: Path) -> None:
    with (small_disk / "more").open("wb") as file:  # the last byte
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError:
            pass
    run_on_ranks(2, start_on_a_full_disk, str(small_disk))
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "more"]


def run_out_of_memory(rank: int, buffer: Buffer) -> None:
    """Rank 1 finds no memory for the rows that it would receive; it, and its Buffer, live on."""
    if rank == 1:
        Rows.new_arrived = _no_memory  # type: ignore
    send(buffer, CASE, rank, True, torch.float32)


def _no_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")  # torch's own word for it


def run_out_before_the_first_hop(rank: int, buffer: Buffer) -> None:
    """Rank 1, a gateway, has agreed on a dispatch, and sends no row to the other host."""
    if rank == 1:
        HostPlan.inner_idx = _no_memory  # type: ignore
    send(buffer, CASE, rank, True, torch.float32)


def run_out_between_the_hops(rank: int, buffer: Buffer) -> None:
    """Rows have changed hosts, and rank 1 takes no part in spreading them."""
    if rank == 1:
        HostPlan.settle = _no_memory  # type: ignore
    send(buffer, CASE, rank, True, torch.float32)


def run_out_inside_the_host(rank: int, buffer: Buffer) -> None:
    """A combine: rank 1 has no place for its host's sums, which rank 2 would help to make."""
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    if rank == 1:
        assert isinstance(buffer._backend, HierarchicalBackend)
        buffer._backend._inside.combine = _no_memory  # type: ignore
    buffer.combine(recv_x, handle)


def run_out_behind_the_sums(rank: int, buffer: Buffer) -> None:
    """A combine: rank 1 has its host's sums, and returns none."""
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    if rank == 1:
        assert isinstance(buffer._backend, HierarchicalBackend)
        buffer._backend._wire.status = _no_memory  # type: ignore
    buffer.combine(recv_x, handle)


@pytest.mark.parametrize(
    ("backend", "role", "waiting"),
    [
        ("process_group", run_out_of_memory, (0, 2)),
        ("hierarchical", run_out_before_the_first_hop, (0, 2)),
        ("hierarchical", run_out_between_the_hops, (2,)),
        ("hierarchical", run_out_inside_the_host, (0, 2)),
        ("hierarchical", run_out_behind_the_sums, (0,)),
    ],
)
def test_a_rank_without_memory_ends_the_call_of_the_others_at_once(
    backend: str, role: Any, waiting: tuple[int, ...]
) -> None:
    with Ranks(backend, role) as ranks:
        ranks.go()
        for rank in waiting:  # the other has all that it needs already
            kind, message, seconds = ranks.answer(rank)
            assert kind == "RuntimeError", message
            assert re.search(r"rank [0-9, ]*\b1\b", message), message
            assert seconds < 2.5
        kind, message, _ = ranks.answer(1)
        assert (kind, "allocate memory" in message) == ("RuntimeError", True)


@pytest.mark.parametrize("role", [be_interrupted, be_interrupted_with_work_queued])
def test_a_wait_over_gloo_hears_ctrl_c(role: Any) -> None:
    with Ranks("process_group", role) as ranks:
        ranks.go()
        time.sleep(0.5)
        os.kill(ranks.pid(0), signal.SIGINT)
        kind, _, seconds = ranks.answer(0)
        assert kind == "KeyboardInterrupt"
        assert seconds < 1.8
        ranks.others_name(0)


def lose_the_group(rank: int, store: str, backend: str) -> None:
    """A Buffer needs the group it was made with no more; a new group can be made beside it."""
    own = dist.group.WORLD
    host_id = "A" if rank == 0 else "B"
    buffer = Buffer(own, config=BufferConfig(backend=backend, timeout=60, host_id=host_id))
    dist.barrier()
    dist.destroy_process_group()
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    combined, _, event = buffer.combine(recv_x, handle, async_finish=True)
    event.current_stream_wait()
    used = (CASE.topk_idx(rank) >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(combined, CASE.x(rank, torch.float32) * used)
    buffer.destroy()
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), 3, rank)
    again = Buffer(dist.group.WORLD, config=BufferConfig(backend=backend, host_id=host_id))
    send(again, CASE, rank, True, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_destroyed_first_takes_no_buffer_with_it(backend: str, tmp_path: Path) -> None:
    run_on_ranks(3, lose_the_group, str(tmp_path / "store"), backend)
