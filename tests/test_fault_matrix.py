"""Rank 1 is killed, stopped or raises at every moment of a step: the others name it and go on."""

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests import fault_cells
from tests.fault_cells import CALLS, PACKED_CALLS, VICTIM, Cell, Moment
from tests.ranks import fresh_processes

SURVIVORS = (0, 2)
PATIENCE = 60.0  # seconds; kills and exceptions are noticed long before
DEADLINE = 2.5

MOMENTS = [Moment("before", call) for call in CALLS]
MOMENTS += [Moment("waiting in", call) for call in ("dispatch", "combine")]
MOMENTS += [Moment("inside", call) for call in ("layout", "dispatch", "cached dispatch", "combine")]
MOMENTS.append(Moment("after", "layout"))
PACKED_MOMENTS = [Moment("before", call) for call in PACKED_CALLS]
PACKED_MOMENTS += [Moment("after sending", call) for call in PACKED_CALLS]
PACKED_MOMENTS += [Moment("waiting in", "low_latency_dispatch")]
# A closed connection, whatever the rank was about to do.
SAME_OVER_GLOO = [
    Moment("before", call) for call in ("layout", "dispatch", "cached dispatch", "combine")
]
SAME_OVER_GLOO.append(Moment("after", "layout"))
# To the others a script that ends by an exception between calls is one that was killed.
RAISES = [moment for moment in MOMENTS + PACKED_MOMENTS if moment.when != "before"]
RAISES.append(Moment("before", "combine"))
STOPS = [
    Moment("before", "combine"),
    Moment("waiting in", "dispatch"),
    Moment("inside", "layout"),
    Moment("inside", "dispatch"),
    Moment("after sending", "low_latency_dispatch"),
]


def cells() -> Iterator[Cell]:
    for backend in ("shared_memory", "process_group", "hierarchical"):
        moments = MOMENTS if backend == "hierarchical" else MOMENTS + PACKED_MOMENTS
        for moment in moments:
            if backend == "shared_memory" or moment not in SAME_OVER_GLOO:
                yield Cell(backend, moment, "kill", PATIENCE)
            # Compiled code raises nothing; a layout is the same over all backends.
            is_compiled = (backend, moment.when) == ("shared_memory", "inside")
            if moment in RAISES and is_compiled == (moment.call == "layout"):
                yield Cell(backend, moment, "raise", PATIENCE)
            if moment in STOPS and (backend == "shared_memory" or moment.call != "layout"):
                yield Cell(backend, moment, "stop", DEADLINE)


class Mortals:
    """Ranks 0 and 2, which outlive the cells, and a fresh rank 1 for each."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ep_fault_matrix_")
        self.context = fresh_processes()
        self.processes: dict[int, BaseProcess] = {}
        self.pipes: dict[int, Connection] = {}
        self.num_stores = 0
        self.held: dict[int, dict[str, int]] = {}
        self.start_again()

    def start_again(self) -> None:
        """Take fresh processes, so that one failed cell fails alone."""
        for rank in self.processes:
            self.end(rank)
        self.held.clear()
        for rank in SURVIVORS:
            self.start(rank)

    def start(self, rank: int) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=fault_cells.serve, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        self.processes[rank], self.pipes[rank] = process, ours

    def store(self) -> str:
        self.num_stores += 1
        return f"{self.folder}/store{self.num_stores}"

    def tell(self, rank: int, function: Any, *args: Any) -> None:
        self.pipes[rank].send((function, args))

    def answer(self, rank: int, within: float = 120) -> Any:
        assert self.pipes[rank].poll(within), f"rank {rank} hangs"
        error, result = self.pipes[rank].recv()
        assert error is None, f"rank {rank}: {error}"
        return result

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def end(self, rank: int) -> None:
        if self.processes[rank].is_alive():
            self.processes[rank].kill()
        self.processes[rank].join()
        self.pipes[rank].close()

    def go_on(self, cell: Cell) -> None:
        """Ranks 0 and 2 leave the group and go on without rank 1, and hold no more than before."""
        for function, args in (
            (fault_cells.leave_group, ()),
            (fault_cells.go_on, (self.store(), cell)),
        ):
            for rank in SURVIVORS:
                self.tell(rank, function, *args)
            for rank in SURVIVORS:
                found = self.answer(rank)
        for rank in SURVIVORS:
            found = self.ask_held(rank)
            assert found["own threads"] == found["segments"] == 0, found
            # The first cell leaves what the process keeps for good.
            before = self.held.setdefault(rank, found)
            assert found["descriptors"] <= before["descriptors"] + 2, (before, found)
            assert found["threads"] <= before["threads"] + 2, (before, found)
            left = list(Path("/dev/shm").glob(f"ep_megatron.*.{self.pid(rank)}.*"))
            assert not left

    def ask_held(self, rank: int) -> dict[str, int]:
        self.tell(rank, fault_cells.held_by)
        held: dict[str, int] = self.answer(rank)
        return held


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    made = Mortals()
    yield made
    for rank in made.processes:
        made.end(rank)


@pytest.mark.parametrize(
    "cell", list(cells()), ids=lambda cell: f"{cell.backend}, {cell.fault} {cell.moment}"
)
def test_a_fault_is_named_and_the_others_go_on(cell: Cell, mortals: Mortals) -> None:
    mortals.start(VICTIM)
    store = mortals.store()
    for rank in range(3):
        mortals.tell(rank, fault_cells.endure, store, cell)
    try:
        for rank in SURVIVORS:
            kind, message, seconds = mortals.answer(rank)
            assert kind == "RuntimeError", message
            check_message(cell, message)
            if cell.fault == "stop":
                assert cell.timeout - 0.5 < seconds < 3 * cell.timeout + 10
            else:
                assert seconds < PATIENCE / 2
        if cell.fault == "stop":  # who comes back finds an error too, not a hang
            os.kill(mortals.pid(VICTIM), signal.SIGCONT)
            assert mortals.answer(VICTIM)[0] == "RuntimeError"
        mortals.go_on(cell)
    except BaseException:
        mortals.start_again()
        raise
    finally:
        pid = mortals.pid(VICTIM)
        mortals.end(VICTIM)
    assert not list(Path("/dev/shm").glob(f"ep_megatron.*.{pid}.*"))


def check_message(cell: Cell, message: str) -> None:
    """It says who, that rank's last call, and in which call it is missed."""
    assert re.search(rf"rank [0-9, ]*\b{VICTIM}\b", message), message
    if cell.moment.is_packed:
        assert re.search(r"in low-latency call \d", message), message
        assert re.search(r"last low-latency call \d, |no low-latency call yet", message), message
        return
    number = CALLS[cell.moment.call]
    assert re.search(r"in call \d|of call \d", message), message
    last = [int(n) for n in re.findall(r"last call (\d)", message)]
    first = number - 1
    if cell.moment.when == "before":
        assert first in last, message
    else:
        assert {first, number} & set(last), message
