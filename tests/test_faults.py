"""A rank that dies, stops, comes late or is interrupted is named on the others, in time."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

from ep_megatron import Buffer, _cpu
from tests.mortal_ranks import CASE, TIMEOUT, Ranks
from tests.ranks import fresh_processes
from tests.test_dispatch import send

SHM = Path("/dev/shm")


def die(rank: int, buffer: Buffer) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    send(buffer, CASE, rank, True, torch.float32)


def die_in_wait(rank: int, buffer: Buffer) -> None:
    """Rank 1 is killed by the test while it waits for rank 2, which is asleep."""
    if rank == 2:
        time.sleep(2)
    send(buffer, CASE, rank, True, torch.float32)


def never_come(rank: int, buffer: Buffer) -> None:
    if rank == 1:
        time.sleep(TIMEOUT + 2)
    send(buffer, CASE, rank, True, torch.float32)


def come_late(rank: int, buffer: Buffer) -> Any:
    if rank == 1:
        time.sleep(TIMEOUT / 2)
    return send(buffer, CASE, rank, True, torch.float32)[0].shape[0]


def raise_between(rank: int, buffer: Buffer) -> None:
    """Rank 1 leaves by an exception of its own between dispatch and combine."""
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    if rank == 1:
        buffer.destroy()
        raise KeyError("the caller's own trouble")
    buffer.combine(recv_x, handle)


def die_with_work_queued(rank: int, buffer: Buffer) -> Any:
    """Rank 1 dies while the others have queued calls that need it; each event tells."""
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    events = [buffer.combine(recv_x, handle, async_finish=True)[2] for _ in range(3)]
    messages = []
    for event in events:
        with pytest.raises(RuntimeError) as raised:
            event.current_stream_wait()
        messages.append(str(raised.value))
    assert all("one that broke down" in message for message in messages[1:])
    return messages[0]


def be_interrupted_with_work_queued(rank: int, buffer: Buffer) -> None:
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    if rank == 1:
        time.sleep(2)
    buffer.combine(recv_x, handle, async_finish=True)[2].current_stream_wait()


def be_interrupted(rank: int, buffer: Buffer) -> None:
    if rank == 1:
        time.sleep(2)
    send(buffer, CASE, rank, True, torch.float32)


def use_after(rank: int, buffer: Buffer) -> Any:
    """After a break-down: the same Buffer says so at once."""
    if rank == 1:
        return None
    with pytest.raises(RuntimeError):
        send(buffer, CASE, rank, True, torch.float32)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="expected a working Buffer, got one that broke down"):
        send(buffer, CASE, rank, True, torch.float32)
    assert time.monotonic() - start < 1
    return "said so"


def use_in_fork(rank: int, buffer: Buffer) -> Any:
    """A fork of a rank must not touch the Buffer, and its end must not end it."""
    child = os.fork()
    if child == 0:
        try:
            send(buffer, CASE, rank, True, torch.float32)
        except RuntimeError as error:
            os._exit(0 if "got a fork of it" in str(error) else 1)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return send(buffer, CASE, rank, True, torch.float32)[0].shape[0]


def start_again(rank: int, buffer: Buffer) -> Any:
    """After a rank gave up, the same processes make a new Buffer and go on."""
    if rank == 1:
        time.sleep(TIMEOUT + 1)
    with pytest.raises(RuntimeError):
        send(buffer, CASE, rank, True, torch.float32)
    again = Buffer(buffer.group, config=buffer.config)
    return send(again, CASE, rank, True, torch.float32)[0].shape[0]


@pytest.mark.parametrize("backend", ["shared_memory", "process_group"])
def test_a_killed_rank_is_named(backend: str) -> None:
    with Ranks(backend, die) as ranks:
        ranks.go()
        for message in ranks.others_name(1, within=2):  # no need to wait for the deadline
            assert "last call 1, dispatch" in message
            assert backend != "shared_memory" or "rank 1 is gone" in message


def test_a_rank_killed_in_a_wait_is_named_by_all_who_wait_for_it() -> None:
    with Ranks("shared_memory", die_in_wait) as ranks:
        ranks.go()
        time.sleep(0.5)
        os.kill(ranks.pid(1), signal.SIGKILL)
        for rank in (0, 2):
            kind, message, _ = ranks.answer(rank)
            assert kind == "RuntimeError"
            assert "rank 1 is gone" in message or "rank 0 gave up" in message


@pytest.mark.parametrize("backend", ["shared_memory", "process_group"])
def test_queued_calls_name_a_killed_rank(backend: str) -> None:
    with Ranks(backend, die_with_work_queued) as ranks:
        ranks.go()
        for rank in (0, 2):
            kind, message, seconds = ranks.answer(rank)
            assert kind == "returned", message
            assert "rank 1" in message
            assert seconds < TIMEOUT + 3  # not once per call


def test_a_wait_for_queued_work_hears_ctrl_c() -> None:
    with Ranks("shared_memory", be_interrupted_with_work_queued) as ranks:
        ranks.go()
        time.sleep(0.5)
        os.kill(ranks.pid(0), signal.SIGINT)
        kind, _, seconds = ranks.answer(0)
        assert kind == "KeyboardInterrupt"
        assert seconds < 1.5
        ranks.others_name(0, says="rank 0 gave up in call 3")


@pytest.mark.parametrize("backend", ["shared_memory", "process_group", "hierarchical"])
def test_a_rank_ends_with_work_in_flight(backend: str, tmp_path: Path) -> None:
    """A script may end without waiting for its last call: the other, who is late, gets its rows."""
    code = """
import sys, time, torch, torch.distributed as dist
from ep_megatron import Buffer
rank, backend, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
buffer = Buffer(dist.group.WORLD, backend=backend)
idx = torch.tensor([[0, 1], [1, 0]])
x, _, _, _, handle, _ = buffer.dispatch(torch.ones(2, 8), topk_idx=idx, num_experts=2, expand=True)
if rank == 1:
    time.sleep(1)
out, _, event = buffer.combine(x, handle, async_finish=True)
if rank == 1:
    event.current_stream_wait()
    print(out.sum().item())
"""
    arguments = [backend, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *arguments],
            env={**os.environ, "EP_MEGATRON_HOST_ID": str(rank)},
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == ("32.0\n" if rank else ""), err


def test_a_rank_ends_while_a_thread_drops_a_group(tmp_path: Path) -> None:
    """The last to hold connections may be a thread; torch ends the process that forgets it."""
    code = """
import gc, sys, torch, torch.distributed as dist
from ep_megatron import Buffer
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
buffer = Buffer(dist.group.WORLD, backend="hierarchical")
idx = torch.tensor([[0, 1], [1, 0]])
x, _, _, _, handle, event = buffer.dispatch(
    torch.ones(2, 8), topk_idx=idx, num_experts=2, async_finish=True
)
event.current_stream_wait()
event = buffer.combine(x, handle, async_finish=True)[2]
event.current_stream_wait()
del buffer, x, handle, event
dist.destroy_process_group()
gc.collect()
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            stderr=PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


@pytest.mark.parametrize("backend", ["shared_memory", "process_group"])
def test_a_rank_that_never_comes_is_named_at_the_deadline(backend: str) -> None:
    with Ranks(backend, never_come) as ranks:
        ranks.go()
        messages = []
        for rank in (0, 2):
            kind, message, seconds = ranks.answer(rank)
            assert kind == "RuntimeError"
            assert "rank 1" in message
            assert TIMEOUT - 0.5 < seconds < TIMEOUT + 2
            messages.append(message)
        if backend == "shared_memory":  # the first to give up names it; the other may quote that
            assert any("for rank 1 (last call 1, dispatch) to begin" in m for m in messages)
            # And the late one hears at once that nobody waits any more.
            kind, message, seconds = ranks.answer(1)
            assert kind == "RuntimeError"
            assert "gave up in call 2" in message
            assert seconds < TIMEOUT + 4


@pytest.mark.parametrize("backend", ["shared_memory", "process_group"])
def test_a_late_rank_is_waited_for(backend: str) -> None:
    with Ranks(backend, come_late) as ranks:
        ranks.go()
        for rank in range(3):
            assert ranks.answer(rank)[0] == "returned"


def test_a_stopped_rank_is_late_and_may_go_on() -> None:
    with Ranks("shared_memory", come_late) as ranks:
        os.kill(ranks.pid(2), signal.SIGSTOP)
        ranks.go()
        time.sleep(TIMEOUT / 3)
        os.kill(ranks.pid(2), signal.SIGCONT)
        for rank in range(3):
            assert ranks.answer(rank)[0] == "returned"


def test_a_rank_that_leaves_is_named() -> None:
    with Ranks("shared_memory", raise_between) as ranks:
        ranks.go()
        assert ranks.answer(1)[0] == "KeyError"
        ranks.others_name(1, says="rank 1 is gone: its process ended or closed its Buffer")


def test_a_wait_hears_ctrl_c() -> None:
    with Ranks("shared_memory", be_interrupted) as ranks:
        ranks.go()
        time.sleep(0.5)
        os.kill(ranks.pid(0), signal.SIGINT)
        kind, _, seconds = ranks.answer(0)
        assert kind == "KeyboardInterrupt"
        assert seconds < 1.5
        ranks.others_name(0, says="rank 0 gave up in call 2")


def test_a_broken_buffer_says_so() -> None:
    with Ranks("shared_memory", use_after) as ranks:
        ranks.go()
        for rank in (0, 2):
            assert ranks.answer(rank)[:2] == ("returned", "said so")


@pytest.mark.parametrize("backend", ["shared_memory", "process_group"])
def test_a_fork_is_refused(backend: str) -> None:
    with Ranks(backend, use_in_fork) as ranks:
        ranks.go()
        for rank in range(3):
            assert ranks.answer(rank)[0] == "returned"


def test_the_same_processes_can_start_again() -> None:
    with Ranks("shared_memory", start_again) as ranks:
        ranks.go()
        for rank in range(3):
            assert ranks.answer(rank)[0] == "returned"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_no_segment_is_left_behind(how: signal.Signals) -> None:
    with Ranks("shared_memory", come_late) as ranks:
        pids = [ranks.pid(rank) for rank in range(3)]
        for pid in pids:
            os.kill(pid, how)
    assert not [p for pid in pids for p in SHM.glob(f"ep_megatron.*.{pid}.*")]


def _lone_exchange(folder: Path, name: str) -> _cpu.Exchange:
    """One rank of two, whose peer nobody has met yet."""
    return _cpu.Exchange(
        folder=str(folder),
        name=name,
        rank=0,
        num_ranks=2,
        max_bytes=1 << 20,
        max_view_bytes=0,
        streaming_bytes=0,
        num_threads=1,
        timeout=1.0,
        has_core_per_rank=True,
    )


def _leave_a_segment(pipe: Connection) -> None:
    exchange = _lone_exchange(SHM, f"ep_megatron.{os.geteuid()}.{os.getpid()}.left")
    pipe.send(os.getpid())
    assert exchange.committed
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_start_left_is_removed_by_the_next() -> None:
    """Killed before all ranks had mapped it: the name is still there, and nobody holds its lock."""
    context = fresh_processes()
    ours, theirs = context.Pipe()
    process = context.Process(target=_leave_a_segment, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    (left,) = SHM.glob(f"ep_megatron.{os.geteuid()}.{ours.recv()}.*")
    process.join()
    assert left.stat().st_mode & 0o777 == 0o600
    prefix = f"ep_megatron.{os.geteuid()}."
    _cpu.remove_stale_segments(str(SHM), prefix)
    assert left.exists()  # it could be one that is being made just now
    old = time.time() - 60
    os.utime(left, (old, old))
    assert _cpu.remove_stale_segments(str(SHM), prefix) >= 1
    assert not left.exists()


def test_a_foreign_segment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fake").write_bytes(b"x" * (1 << 20))
    exchange = _lone_exchange(tmp_path, "own")
    with pytest.raises(RuntimeError, match="is not a file of this user with mode 0600"):
        exchange.attach(["own", "fake"])
    (tmp_path / "fake").chmod(0o600)
    with pytest.raises(RuntimeError, match="is not the segment of rank 1 of 2"):
        exchange.attach(["own", "fake"])
    (tmp_path / "fake").write_bytes(b"x")
    with pytest.raises(RuntimeError, match="is too small"):
        exchange.attach(["own", "fake"])
    with pytest.raises(RuntimeError, match="not a segment name"):
        exchange.attach(["own", "../fake"])
