"""One rank of a soak: rounds of random steps until the round ends or something goes wrong."""

import faulthandler
import gc
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import fp8
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import FP8
from ep_megatron.soak.step import Step

STACKS_SIGNAL = signal.SIGUSR1  # makes a rank write to stderr what its threads are in
_CAPACITY = 256  # most tokens of a rank in a low-latency call
_STEPS_PER_WORD = 8  # steps between which the ranks agree whether to go on


@dataclass(frozen=True)
class Round:
    """What all ranks do until the next one.

    Attributes:
        seed: of its first step.
        store: path of a file for the rendezvous.
        backend: of the Buffer.
        hosts: ranks by host; more than one only for `hierarchical`.
        seconds: that it lasts; without end until something goes wrong if 0.
        timeout: of the Buffer.
    """

    seed: int
    store: str
    backend: str
    hosts: tuple[tuple[int, ...], ...]
    seconds: float
    timeout: float


@dataclass
class Report:
    """How a round went on one rank, and what its process holds afterwards."""

    num_steps: int = 0
    num_checks: int = 0
    error: tuple[str, str] | None = None
    wrong: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)


def serve(rank: int, num_ranks: int, pipe: Connection) -> None:
    """Run the rounds that come through `pipe` until it closes."""
    torch.set_num_threads(1)
    faulthandler.register(STACKS_SIGNAL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has no jobs
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(rank, num_ranks, task, pipe))


def _run(rank: int, num_ranks: int, task: Round, pipe: Connection) -> Report:
    report = Report()
    try:
        _take_steps(rank, num_ranks, task, report, pipe)
    except BaseException as error:
        kind = RuntimeError if isinstance(error, RuntimeError) else type(error)
        report.error = kind.__name__, str(error)
        error.__traceback__ = None
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
    except RuntimeError as error:
        report.wrong.append(f"the group could not be left: {error}")
    report.held = held()
    return report


def _take_steps(rank: int, num_ranks: int, task: Round, report: Report, pipe: Connection) -> None:
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{task.store}", patience, num_ranks, rank)
    assert dist.group.WORLD is not None
    host = next(number for number, members in enumerate(task.hosts) if rank in members)
    config = BufferConfig(backend=task.backend, timeout=task.timeout, host_id=f"host {host}")
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True, config=config)
    pipe.send("started")
    start = time.monotonic()
    kinds = ("rows", "rows", "fp8", "low_latency")
    while True:
        for _ in range(_STEPS_PER_WORD):
            step = Step.draw(task.seed + report.num_steps, num_ranks, kinds)
            _take(rank, buffer, step, task.hosts, report)
            report.num_steps += 1
        if task.seconds:
            is_over = torch.tensor(int(time.monotonic() - start > task.seconds))
            dist.all_reduce(is_over)
            if is_over:
                return


def _take(
    rank: int, buffer: Buffer, step: Step, hosts: tuple[tuple[int, ...], ...], report: Report
) -> None:
    if step.kind == "low_latency":
        _take_low_latency(rank, buffer, step, report)
        return
    recipe = FP8 if step.kind == "fp8" else None
    x = step.x(rank)
    recv, _, _, _, handle, event = buffer.dispatch(
        x,
        topk_idx=step.topk_idx(rank),
        topk_weights=step.weights(rank),
        num_experts=step.num_experts,
        expand=step.expand,
        expert_alignment=step.alignment,
        fp8=recipe,
        async_finish=step.is_queued,
    )
    if step.is_queued:
        event.current_stream_wait()
    sent = [step.x(source) for source in range(len(step.num_tokens))]
    if recipe is None:
        _check(
            report,
            step,
            "rows",
            recv,
            step.expected_rows(rank, [s for s in sent if isinstance(s, Tensor)]),
        )
        rows = recv
    else:
        cast = [fp8.quantize(tensor, recipe) for tensor in sent]
        _check(report, step, "FP8 rows", recv[0], step.expected_rows(rank, [c[0] for c in cast]))
        _check(report, step, "scales", recv[1], step.expected_rows(rank, [c[1] for c in cast]))
        # Rows in full again, along the same handle.
        rows, _, _, _, _, event = buffer.dispatch(x, handle=handle, async_finish=step.is_queued)
        if step.is_queued:
            event.current_stream_wait()
    assert isinstance(rows, Tensor)
    combined, _, event = buffer.combine(rows, handle, async_finish=step.is_queued)
    if step.is_queued:
        event.current_stream_wait()
    _check(report, step, "sums", combined, step.expected_sum(rank, hosts))


def _take_low_latency(rank: int, buffer: Buffer, step: Step, report: Report) -> None:
    idx = step.topk_idx(rank)
    recv, count, handle, _, hook = buffer.low_latency_dispatch(
        step.x(rank), idx, _CAPACITY, step.num_experts, use_fp8=False,
        return_recv_hook=step.is_queued,
    )  # fmt: skip
    if hook is not None:
        hook()
    assert isinstance(recv, Tensor)
    expected = [
        torch.cat([
            step.x(source)[(step.topk_idx(source) == expert).nonzero()[:, 0]]
            for source in range(len(step.num_tokens))
        ])
        for expert in range(rank * step.experts_per_rank, (rank + 1) * step.experts_per_rank)
    ]  # fmt: skip
    got = [recv[local, : int(n)] for local, n in enumerate(count)]
    _check(report, step, "packed rows", torch.cat(got), torch.cat(expected))
    combined, _, hook = buffer.low_latency_combine(
        recv, idx, step.weights(rank), handle, step.use_logfmt, return_recv_hook=step.is_queued
    )
    if hook is not None:
        hook()
    _check(report, step, "weighted sums", combined, step.expected_weighted_sum(rank))


def _check(report: Report, step: Step, what: str, got: Any, expected: Tensor) -> None:
    report.num_checks += 1
    is_same = got.shape == expected.shape and got.dtype == expected.dtype
    if is_same:
        pair = [tensor.contiguous().view(torch.uint8) for tensor in (got, expected)]
        is_same = torch.equal(*pair)
    if not is_same:
        report.wrong.append(f"{what} of {step} differ from their definition")


def held() -> dict[str, int]:
    """Count what this process holds: bytes, threads, descriptors, mapped segments, named ones."""
    deadline = time.monotonic() + 60
    while True:  # threads end a moment after their owner
        gc.collect()
        own = sum("ep_megatron" in thread.name for thread in threading.enumerate())
        if own == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return {
        "MiB": psutil.Process().memory_info().rss >> 20,
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "segments": Path("/proc/self/maps").read_text().count("/ep_megatron."),
        "own threads": own,
        "names": len(list(Path("/dev/shm").glob(f"ep_megatron.*.{os.getpid()}.*"))),
    }
