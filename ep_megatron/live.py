"""Statistics of running ranks as files, one per Buffer, and what they say together.

A rank writes at the end of a call, at most once a second, under another name first: who reads never
sees half a file. The age of a file is how long ago its rank ended a call.
"""

import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_megatron.statistics import BufferStatistics, load_sentences, wait_table

STATISTICS_VARIABLE = "EP_MEGATRON_STATISTICS_DIR"
SECONDS_BETWEEN = 1.0
_MAX_FILE_BYTES = 1 << 20
_FORMAT = 1


def statistics_folder(given: str | None) -> Path | None:
    """Return where statistics are written: as given, or as the environment says; None: nowhere."""
    folder = given or os.environ.get(STATISTICS_VARIABLE)
    return Path(folder) if folder else None


class StatisticsFile:
    """This rank's file. Writing fails silently: watching must not end what is watched."""

    def __init__(self, folder: Path, rank: int, num_ranks: int, backend: str) -> None:
        """Name the file; it is written by `update`."""
        self._head = {
            "format": _FORMAT,
            "pid": os.getpid(),
            "num_ranks": num_ranks,
            "backend": backend,
        }
        self._path = folder / f"{os.getpid()}.{secrets.token_hex(4)}.rank{rank}.json"
        self._last = -SECONDS_BETWEEN

    def update(self, statistics: Callable[[], BufferStatistics]) -> None:
        """Write, if the last time was long enough ago."""
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN or os.getpid() != self._head["pid"]:
            return
        self._last = now
        text = json.dumps({**self._head, "written": time.time(), **statistics().to_json()})
        writing = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            writing.replace(self._path)
        except OSError:
            return


@dataclass(frozen=True)
class LiveRank:
    """What one file says.

    Attributes:
        pid: of the rank.
        num_ranks: R.
        backend: in use.
        age: seconds since it was written.
        is_alive: whether there is such a process here.
        statistics: the counts.
    """

    pid: int
    num_ranks: int
    backend: str
    age: float
    is_alive: bool
    statistics: BufferStatistics


def read_folder(folder: Path) -> tuple[list[LiveRank], list[str]]:
    """Return what the files of a folder say, by rank, and why some say nothing."""
    found, unreadable = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"more than {_MAX_FILE_BYTES} bytes")
            found.append(_read(json.loads(path.read_text())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            unreadable.append(f"{path.name}: {type(error).__name__}: {error}")
    return sorted(found, key=lambda rank: rank.statistics.rank), unreadable


def _read(value: dict[str, Any]) -> LiveRank:
    if value["format"] != _FORMAT:
        raise ValueError(f"format {value['format']}, expected {_FORMAT}")
    return LiveRank(
        pid=int(value["pid"]),
        num_ranks=int(value["num_ranks"]),
        backend=str(value["backend"]),
        age=max(0.0, time.time() - float(value["written"])),
        is_alive=Path(f"/proc/{int(value['pid'])}").exists(),
        statistics=BufferStatistics.from_json(value),
    )


def live_report(folder: Path) -> str:
    """Return what running ranks wait for: calls, slow ranks, and who waited for whom."""
    found, unreadable = read_folder(folder)
    if not found:
        return "\n".join([f"no statistics in {folder}", *unreadable])
    lines = []
    for rank in found:
        calls = ", ".join(
            f"{calls.num_calls} {name}"
            for name, calls in rank.statistics.operations.items()
            if calls.num_calls
        )
        state = f"wrote {rank.age:.1f} s ago" if rank.is_alive else "has ended"
        lines.append(
            f"rank {rank.statistics.rank} of {rank.num_ranks} ({rank.backend}, process {rank.pid}) "
            f"{state}: {calls or 'no calls'}"
        )
    newest = min(found, key=lambda rank: rank.age)
    for rank in found:
        if rank.is_alive and rank.age > newest.age + 10 * SECONDS_BETWEEN:
            lines.append(f"rank {rank.statistics.rank} has ended no call for {rank.age:.0f} s")
    for sentence in dict.fromkeys(s for rank in found for s in rank.statistics.slow_ranks()):
        lines.append(sentence)
    statistics = [rank.statistics for rank in found]
    if len(found) == newest.num_ranks:
        lines += load_sentences(statistics)
    for name in dict.fromkeys(name for s in statistics for name in s.operations):
        if any(name in s.operations and s.operations[name].num_calls for s in statistics):
            lines.append(wait_table(statistics, name))
    return "\n".join([*lines, *unreadable])
