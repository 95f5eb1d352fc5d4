"""Three fresh processes with a Buffer each, that a test may kill, stop or interrupt."""

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from tests.ranks import fresh_processes
from tests.routing import Case
from tests.test_dispatch import send

CASE = Case("faults", (40, 30, 20), hidden=64)
TIMEOUT = 3.0


def _start(
    rank: int, backend: str, folder: Path, pipe: Connection, role: Callable[..., Any]
) -> None:
    faulthandler.register(signal.SIGUSR1, _stacks(folder, rank).open("w"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), 3, rank)
    assert dist.group.WORLD is not None
    host_id = "A" if rank == 0 else "B"  # for a backend that asks
    config = BufferConfig(backend=backend, timeout=TIMEOUT, host_id=host_id)
    buffer = Buffer(dist.group.WORLD, config=config)
    send(buffer, CASE, rank, True, torch.float32)
    pipe.send("ready")
    pipe.recv()
    start = time.monotonic()
    try:
        result = role(rank, buffer)
        pipe.send(("returned", result, time.monotonic() - start))
    except RuntimeError as error:  # or one of its kinds
        pipe.send(("RuntimeError", str(error), time.monotonic() - start))
    except BaseException as error:
        pipe.send((type(error).__name__, str(error), time.monotonic() - start))
    pipe.recv()


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"stacks_of_rank_{rank}"


class Ranks:
    """Three fresh processes that may be killed; every one is ended with the test."""

    def __init__(self, backend: str, role: Callable[..., Any]) -> None:
        context = fresh_processes()
        self._files = tempfile.TemporaryDirectory(prefix="ep_faults_")
        self.folder = Path(self._files.name)
        pipes = [context.Pipe() for _ in range(3)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(
                target=_start, args=(rank, backend, self.folder, theirs, role), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def __enter__(self) -> "Ranks":
        for pipe in self.pipes:
            assert pipe.poll(60)
            assert pipe.recv() == "ready"
        return self

    def go(self) -> None:
        for pipe in self.pipes:
            pipe.send("go")

    def answer(self, rank: int) -> tuple[str, str, float]:
        assert self.pipes[rank].poll(30), f"rank {rank} hangs:\n{self.stacks()}"
        answer: tuple[str, str, float] = self.pipes[rank].recv()
        return answer

    def others_name(self, victim: int, *, within: float = 60.0, says: str = "") -> list[str]:
        """Return the errors of the other ranks, each of which names `victim` in time."""
        messages = []
        for rank in {0, 1, 2} - {victim}:
            kind, message, seconds = self.answer(rank)
            assert kind == "RuntimeError", message
            assert f"rank {victim}" in message
            assert says in message
            assert seconds < within
            messages.append(message)
        return messages

    def stacks(self) -> str:
        """Return where the threads of all ranks are that live."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)  # that it takes them to write
        texts = [_stacks(self.folder, rank).read_text() for rank in range(3)]
        return "\n".join(f"rank {rank}\n{text}" for rank, text in enumerate(texts))

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._files.cleanup()
