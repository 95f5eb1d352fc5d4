"""The soak itself: starts ranks, deals out rounds and faults, and judges what comes back."""

import multiprocessing as mp
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ep_megatron.soak.rank import STACKS_SIGNAL, Report, Round, serve

FAULTS = ("none", "none", "pause", "kill", "stop", "interrupt")
BACKENDS = ("shared_memory", "shared_memory", "shared_memory", "process_group", "hierarchical")
_DEADLINE = 6.0  # of a Buffer whose rank is stopped
_PATIENCE = 120.0  # of all others
_HANG = 400.0  # a rank that says nothing for so long hangs
_STACKS_SECONDS = 1.0  # between one rank's words and the next's
# What a process may gain over the whole run, after its second round, without being called a leak.
_MARGINS = {"MiB": 96, "threads": 6, "descriptors": 12}


@dataclass
class Outcome:
    """What a soak has seen.

    Attributes:
        rounds: how many of each backend and fault.
        num_steps: of rank 0.
        num_checks: results of all ranks that were compared with their definition.
        problems: what must not be; empty after a good run.
        held: by process, what it held after its second round and after its last.
    """

    rounds: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_steps: int = 0
    num_checks: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    held: dict[int, list[dict[str, int]]] = field(default_factory=dict)


class _Ranks:
    """The processes; one that was killed is replaced."""

    def __init__(self, num_ranks: int) -> None:
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch.distributed", "ep_megatron"])
        self.num_ranks = num_ranks
        self.processes: dict[int, BaseProcess] = {}
        self.pipes: dict[int, Connection] = {}
        for rank in range(num_ranks):
            self.start(rank)

    def start(self, rank: int) -> None:
        ours, theirs = self.context.Pipe()
        args = (rank, self.num_ranks, theirs)
        process = self.context.Process(target=serve, args=args, daemon=True)
        process.start()
        theirs.close()
        self.processes[rank], self.pipes[rank] = process, ours

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def hear(self, rank: int) -> Any:
        """Return the next word of a rank; None if its process has ended."""
        if not self.pipes[rank].poll(_HANG):
            for other in self.processes:  # each writes to stderr where it is
                self.signal(other, STACKS_SIGNAL)
                time.sleep(_STACKS_SECONDS)
            raise RuntimeError(
                f"soak: expected rank {rank} to answer, got nothing in {_HANG:g} s; the stacks of "
                f"ranks 0 to {self.num_ranks - 1} are on stderr, in this order"
            )
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            return None

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


def soak(
    minutes: float,
    num_ranks: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    round_seconds: float = 8.0,
) -> Outcome:
    """Run rounds for `minutes`; every result is checked, and every fault must be named.

    Args:
        minutes: to run.
        num_ranks: processes.
        seed: of rounds, faults and all numbers.
        say: gets a line per round.
        round_seconds: of a round without a fault.
    """
    rng, outcome = random.Random(seed), Outcome()
    ranks, start = _Ranks(num_ranks), time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="ep_soak_") as folder:
            number = 0
            while time.monotonic() - start < 60 * minutes and len(outcome.problems) < 10:
                number += 1
                # The first rounds are whole: what a process keeps for good, it has then.
                fault = "none" if number <= 2 else rng.choice(FAULTS)
                backend = BACKENDS[number % len(BACKENDS)] if number <= 5 else rng.choice(BACKENDS)
                task = _round(rng, Path(folder, f"store{number}"), backend, fault, num_ranks)
                line = _play(ranks, task, fault, rng, outcome, round_seconds)
                outcome.rounds[backend, fault] += 1
                outcome.seconds = time.monotonic() - start
                say(f"{outcome.seconds:6.0f} s  round {number}: {backend}, {fault}: {line}")
    finally:
        ranks.end()
    _judge_growth(outcome)
    return outcome


def _round(rng: random.Random, store: Path, backend: str, fault: str, num_ranks: int) -> Round:
    hosts: tuple[tuple[int, ...], ...] = (tuple(range(num_ranks)),)
    if backend == "hierarchical":
        cut = rng.randint(1, num_ranks - 1)
        hosts = (tuple(range(cut)), tuple(range(cut, num_ranks)))
    timeout = _DEADLINE if fault == "stop" else _PATIENCE
    return Round(rng.randrange(1 << 30), str(store), backend, hosts, 0.0, timeout)


def _play(
    ranks: _Ranks,
    task: Round,
    fault: str,
    rng: random.Random,
    outcome: Outcome,
    round_seconds: float,
) -> str:
    """Run one round and return a line about it; add to `outcome`."""
    is_whole = fault in ("none", "pause")
    seconds = round_seconds if is_whole else 0.0
    task = Round(**{**vars(task), "seconds": seconds})
    for pipe in ranks.pipes.values():
        pipe.send(task)
    reports: dict[int, Report] = {}
    for rank in ranks.pipes:
        word = ranks.hear(rank)
        if word != "started":  # the round is over before it began
            outcome.problems.append(f"rank {rank} did not start: {getattr(word, 'error', word)}")
            reports[rank] = word
    victim = rng.randrange(ranks.num_ranks)
    if not reports:
        _strike(ranks, victim, fault, rng)
    for rank in ranks.pipes:
        if rank == victim and fault == "stop" and not reports.get(rank):
            continue
        reports[rank] = reports.get(rank) or ranks.hear(rank)
    if fault == "stop":
        ranks.signal(victim, signal.SIGCONT)
        reports[victim] = ranks.hear(victim)
    if fault == "kill":
        ranks.processes[victim].join()
        outcome.held.pop(victim, None)
        ranks.start(victim)
    _judge(task, fault, victim, reports, outcome)
    first = next(report for report in reports.values() if report is not None)
    heads = [r.error[1] for r in reports.values() if r is not None and r.error is not None]
    return f"{first.num_steps} steps" + (f"; {heads[0][:160]}" if heads else "")


def _strike(ranks: _Ranks, victim: int, fault: str, rng: random.Random) -> None:
    if fault == "none":
        return
    time.sleep(rng.uniform(0.2, 3.0))
    if fault == "pause":
        for _ in range(3):
            ranks.signal(victim, signal.SIGSTOP)
            time.sleep(rng.uniform(0.05, 1.0))
            ranks.signal(victim, signal.SIGCONT)
            time.sleep(rng.uniform(0.05, 0.5))
        return
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}[fault]
    ranks.signal(victim, number)


def _judge(task: Round, fault: str, victim: int, reports: dict[int, Any], outcome: Outcome) -> None:
    """Note what must not be."""
    what = f"{task.backend}, {fault}, seed {task.seed}"
    others = {rank: report for rank, report in reports.items() if rank != victim}
    for rank, report in reports.items():
        if report is None:
            if (rank, fault) != (victim, "kill"):
                outcome.problems.append(f"{what}: rank {rank} ended")
            continue
        outcome.num_checks += report.num_checks
        outcome.num_steps += report.num_steps if rank == 0 else 0
        outcome.problems += [f"{what}: rank {rank}: {text}" for text in report.wrong]
        for name in ("segments", "own threads", "names"):
            if report.held[name]:
                outcome.problems.append(f"{what}: rank {rank} keeps {report.held[name]} {name}")
        outcome.held.setdefault(rank, []).append(report.held)
        is_whole = fault in ("none", "pause")
        if is_whole and report.error is not None:
            outcome.problems.append(f"{what}: rank {rank}: {report.error}")
        if not is_whole and rank != victim and (report.error or [""])[0] != "RuntimeError":
            outcome.problems.append(f"{what}: rank {rank} saw no fault: {report.error}")
    if fault in ("none", "pause"):
        return
    named = [r for r, report in others.items() if report and _names(report.error, victim)]
    # Over gloo a rank may see first that another has left because of the victim.
    if not named or (task.backend == "shared_memory" and len(named) < len(others)):
        texts = {rank: report.error for rank, report in others.items() if report}
        outcome.problems.append(f"{what}: rank {victim} was not named: {texts}")


def _names(error: tuple[str, str] | None, victim: int) -> bool:
    return error is not None and bool(re.search(rf"\branks? [\d, ]*\b{victim}\b", error[1]))


def _judge_growth(outcome: Outcome) -> None:
    for rank, held in outcome.held.items():
        if len(held) < 3:
            continue
        for name, margin in _MARGINS.items():
            if held[-1][name] > held[1][name] + margin:
                outcome.problems.append(
                    f"rank {rank} grew from {held[1][name]} to {held[-1][name]} {name} in "
                    f"{len(held) - 2} rounds"
                )


def words(outcome: Outcome) -> str:
    """Return what was seen, for people."""
    kinds = ", ".join(f"{n} x {b} {f}" for (b, f), n in sorted(outcome.rounds.items()))
    lines = [
        f"{outcome.seconds / 60:.1f} minutes, {sum(outcome.rounds.values())} rounds ({kinds})",
        f"{outcome.num_steps} steps, {outcome.num_checks} results compared with their definition",
    ]
    for name in _MARGINS:
        pairs = [(held[1][name], held[-1][name]) for held in outcome.held.values() if held[2:]]
        if pairs:
            before, after = (max(numbers) for numbers in zip(*pairs, strict=True))
            lines.append(
                f"{name} per process, at most: {before} after two rounds, {after} at the end"
            )
    lines += [f"problem: {problem}" for problem in outcome.problems] or ["no problem"]
    return "\n".join(lines)


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return what was seen, for programs."""
    rounds = {f"{backend}, {fault}": n for (backend, fault), n in outcome.rounds.items()}
    return {**vars(outcome), "rounds": rounds}
