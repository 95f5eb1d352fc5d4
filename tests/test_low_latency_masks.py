"""Ranks that die, stop or come late in low-latency calls: named, or masked and left out."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from tests.packed_cases import (
    PackedCase,
    as_logfmt,
    check_packed,
    expected_combined,
    expected_packed,
    expert_output,
)
from tests.ranks import fresh_processes

CASE = PackedCase((6, 7, 8))
TIMEOUT = 2.0


def step(buffer: Buffer, rank: int, number: int, masked: tuple[int, ...] = ()) -> None:
    """One dispatch and combine, compared with the definition less the masked ranks."""
    idx = CASE.topk_idx(rank, number)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(
        CASE.x(rank, number), idx, CASE.capacity, CASE.num_experts, use_fp8=False
    )
    assert isinstance(recv, torch.Tensor)
    check_packed(CASE, rank, recv, count, handle, None, number, masked)
    first = rank * CASE.experts_per_rank
    rows = torch.stack([expert_output(x, first + e) for e, x in enumerate(recv)])
    out, _, _ = buffer.low_latency_combine(rows, idx, CASE.weights(rank, number), handle)
    assert torch.equal(out, expected_combined(CASE, rank, number, masked))


def _start(
    rank: int, backend: str, shrink: bool, store: str, pipe: Connection, role: Callable[..., Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), 3, rank)
    assert dist.group.WORLD is not None
    config = BufferConfig(backend=backend, timeout=TIMEOUT if shrink else 60)
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True, enable_shrink=shrink, config=config)
    pipe.send("ready")
    pipe.recv()
    try:
        pipe.send(("returned", role(rank, buffer)))
    except BaseException as error:
        pipe.send((type(error).__name__, str(error)))
    pipe.recv()


def run(backend: str, shrink: bool, role: Callable[..., Any], dead: int = -1) -> list[Any]:
    """Return what `role` gave or raised on every rank in turn; None for the one that dies."""
    context = fresh_processes()
    store = tempfile.mkdtemp(prefix="ep_masks_") + "/store"
    pipes = [context.Pipe() for _ in range(3)]
    processes = [
        context.Process(
            target=_start, args=(rank, backend, shrink, store, theirs, role), daemon=True
        )
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        for pipe, _ in pipes:
            assert pipe.poll(120)
            assert pipe.recv() == "ready"
        for pipe, _ in pipes:
            pipe.send("go")
        answers: list[Any] = []
        for rank, (pipe, _) in enumerate(pipes):
            if rank == dead:
                answers.append(None)
                continue
            assert pipe.poll(120), f"rank {rank} hangs"
            answers.append(pipe.recv())
        return answers
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def masks(buffer: Buffer) -> list[int]:
    status = torch.full((3,), -1, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def die_and_go_on(rank: int, buffer: Buffer) -> list[int]:
    step(buffer, rank, 0)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    for number in range(1, 6):
        step(buffer, rank, number, masked=(1,))
    return masks(buffer)


@pytest.mark.parametrize("backend", ["process_group", "shared_memory"])
def test_a_dead_rank_costs_its_tokens_only(backend: str) -> None:
    answers = run(backend, True, die_and_go_on, dead=1)
    assert answers[0] == answers[2] == ("returned", [0, 1, 0])


def die_between_halves(
    rank: int, buffer: Buffer, check: Callable[..., None], use_logfmt: bool
) -> list[int]:
    """A rank dies after its sending half: `check` what arrives; its experts are gone either way."""
    idx = CASE.topk_idx(rank)
    recv, count, handle, _, hook = buffer.low_latency_dispatch(
        CASE.x(rank), idx, CASE.capacity, CASE.num_experts, use_fp8=False, return_recv_hook=True
    )
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    assert hook is not None
    hook()
    assert isinstance(recv, torch.Tensor)
    check(CASE, rank, recv, count, handle, None)
    first = rank * CASE.experts_per_rank
    rows = torch.stack([expert_output(x, first + e) for e, x in enumerate(recv)])
    out, _, _ = buffer.low_latency_combine(
        rows, idx, CASE.weights(rank), handle, use_logfmt=use_logfmt
    )
    as_sent = as_logfmt if use_logfmt else torch.Tensor.float
    assert torch.equal(out, expected_combined(CASE, rank, masked=(1,), as_sent=as_sent))
    return masks(buffer)


def check_perhaps(
    case: PackedCase, rank: int, _recv: object, _count: object, handle: Any, _: object
) -> None:
    """What a rank sent over gloo before it died may have arrived or not."""
    counts = handle[1] & 0xFFFFFFFF
    for expert, by_source in enumerate(expected_packed(case, rank)):
        for source, tokens in enumerate(by_source):
            assert int(counts[expert, source]) in {len(tokens), 0 if source == 1 else len(tokens)}


SURE = partial(die_between_halves, check=check_packed, use_logfmt=False)
PERHAPS = partial(die_between_halves, check=check_perhaps, use_logfmt=True)


def test_rows_of_a_rank_that_died_after_sending_arrive() -> None:
    answers = run("shared_memory", True, SURE, dead=1)
    assert answers[0] == answers[2] == ("returned", [0, 1, 0])


def come_late(rank: int, buffer: Buffer) -> list[int]:
    step(buffer, rank, 0)
    dist.barrier()
    if rank == 1:
        time.sleep(3 * TIMEOUT)  # the others have masked it, and it finds out
        step(buffer, rank, 1, masked=(0, 2))
        return masks(buffer)
    for number in range(1, 4):
        step(buffer, rank, number, masked=(1,))
    return masks(buffer)


def test_a_late_rank_is_masked_and_knows() -> None:
    answers = run("shared_memory", True, come_late)
    assert answers == [("returned", [0, 1, 0]), ("returned", [1, 0, 1]), ("returned", [0, 1, 0])]


def come_late_over_gloo(rank: int, buffer: Buffer) -> list[int]:
    """A deadline closes gloo's connections: those who waited need a new Buffer, as they are told.

    The late rank cannot tell them from ranks that ended: it finds itself alone.
    """
    step(buffer, rank, 0)
    dist.barrier()
    if rank == 1:
        time.sleep(2 * TIMEOUT)
        step(buffer, rank, 1, masked=(0, 2))
    else:
        with pytest.raises(
            RuntimeError, match=r"low_latency_dispatch: .* from rank 1 \(rank 1: last"
        ):
            step(buffer, rank, 1)
        with pytest.raises(RuntimeError, match="make a new Buffer"):
            step(buffer, rank, 2)
    found = masks(buffer)
    dist.barrier()
    config = BufferConfig(backend="process_group", timeout=60)
    assert dist.group.WORLD is not None
    again = Buffer(dist.group.WORLD, low_latency_mode=True, enable_shrink=True, config=config)
    step(again, rank, 3)
    assert masks(again) == [0, 0, 0]
    return found


def test_a_late_rank_over_gloo_is_named_and_a_new_buffer_works() -> None:
    answers = run("process_group", True, come_late_over_gloo)
    assert answers == [("returned", [0, 0, 0]), ("returned", [1, 0, 1]), ("returned", [0, 0, 0])]


def test_a_rank_that_died_between_the_halves_over_gloo_is_masked() -> None:
    answers = run("process_group", True, PERHAPS, dead=1)
    assert answers[0] == answers[2] == ("returned", [0, 1, 0])


def mask_by_hand(rank: int, buffer: Buffer) -> list[int]:
    masked = 1 if rank != 1 else None
    for other in range(3):
        if other != rank and (rank == 1 or other == 1):
            buffer.low_latency_update_mask_buffer(other, True)
    step(buffer, rank, 0, (masked,) if masked is not None else (0, 2))
    found = masks(buffer)
    dist.barrier()
    buffer.low_latency_clean_mask_buffer()
    dist.barrier()
    step(buffer, rank, 1)
    assert masks(buffer) == [0, 0, 0]
    with pytest.raises(ValueError, match="another rank"):
        buffer.low_latency_update_mask_buffer(rank, True)
    return found


@pytest.mark.parametrize("backend", ["process_group", "shared_memory"])
def test_masks_by_hand(backend: str) -> None:
    answers = run(backend, True, mask_by_hand)
    assert answers == [("returned", [0, 1, 0]), ("returned", [1, 0, 1]), ("returned", [0, 1, 0])]


def die_unmasked(rank: int, buffer: Buffer) -> str:
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RuntimeError, match=r"low_latency_dispatch: .*rank 1") as error:
        step(buffer, rank, 0)
    with pytest.raises(RuntimeError, match="make a new Buffer"):
        step(buffer, rank, 1)
    return str(error.value)


@pytest.mark.parametrize("backend", ["process_group", "shared_memory"])
def test_without_masks_a_dead_rank_is_named(backend: str) -> None:
    answers = run(backend, False, die_unmasked, dead=1)
    assert answers[0][0] == answers[2][0] == "returned", answers
