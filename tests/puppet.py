"""A peer that says what a test wants: it writes posts and flags by hand into shared memory.

`csrc/cpu/control.h` has the meaning of every word and `_cpu.control_layout()` its place.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_megatron import _cpu
from ep_megatron.backends.base import Call

LAYOUT = _cpu.control_layout()
CONTROL_BYTES = LAYOUT["control_bytes"]
NO_PLACE = (1 << 64) - 1
MAGIC = 0x65705F6D65676131
_FORMS = {"rows_offset": "Q", "rows_bytes": "Q", "weights_offset": "Q", "committed": "Q"}


class Words:
    """The control part of one segment, mapped at `memory`."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def write(self, at: int, form: str, *values: Any) -> None:
        struct.pack_into("<" + form, self.memory, at, *values)

    def read(self, at: int, form: str) -> Any:
        return struct.unpack_from("<" + form, self.memory, at)[0]

    def epoch(self) -> int:
        return int(self.read(LAYOUT["epoch"], "I"))

    def introduce(self, rank: int, num_ranks: int) -> None:
        self.write(LAYOUT["magic"], "Q", MAGIC)
        self.write(LAYOUT["rank"], "II", rank, num_ranks)

    def begin(self, epoch: int, operation: int) -> None:
        self.write(LAYOUT["epoch"], "II", epoch, operation)

    def raise_flag(self, flags: str, source: int, epoch: int) -> None:
        """Raise `posted` or `finished` of rank `source` in this segment."""
        self.write(LAYOUT[flags] + source * LAYOUT["flag_bytes"], "I", epoch)

    def flag(self, flags: str, source: int) -> int:
        return int(self.read(LAYOUT[flags] + source * LAYOUT["flag_bytes"], "I"))

    def give_up(self, epoch: int, because: bytes) -> None:
        self.write(LAYOUT["gave_up_because"], f"{len(because)}s", because)
        self.write(LAYOUT["gave_up"], "I", epoch)

    def post(
        self,
        epoch: int,
        call: Sequence[int],
        counts: tuple[Sequence[int], Sequence[int]] = ((), ()),
        error: tuple[int, bytes] = (0, b""),
        **offer: int,
    ) -> None:
        """Write a post: counts per rank and per expert, offsets and sizes by name."""
        start = LAYOUT["posts"] + epoch % 2 * LAYOUT["post_bytes"]
        self.write(start + LAYOUT["post.epoch"], "II", epoch, error[0])
        self.write(start + LAYOUT["post.call"], f"{len(call)}q", *call)
        self.write(start + LAYOUT["post.error"], f"{len(error[1])}s", error[1])
        for name, form in _FORMS.items():
            self.write(start + LAYOUT[f"post.{name}"], form, offer.get(name, NO_PLACE))
        for name, numbers in zip(("rank", "expert"), counts, strict=True):
            at = start + LAYOUT[f"post.num_tokens_per_{name}"]
            self.write(at, f"{len(numbers)}i", *numbers)

    def grant(self, epoch: int, rows_offset: int, committed: int, error: bytes = b"") -> None:
        self.write(LAYOUT["grant.rows_offset"], "QQ", rows_offset, committed)
        self.write(LAYOUT["grant.error"], f"{len(error)}s", error)
        self.write(LAYOUT["grant"], "I", epoch)


class PuppetPeer:
    """Rank 1 of two, in this process; a `Gathering` for the backend that is rank 0.

    Its flags are raised before rank 0 calls, so that no call waits.
    """

    rank, num_ranks = 0, 2

    def __init__(self, folder: Path, arena_bytes: int) -> None:
        self.folder, self.num_bytes = folder, CONTROL_BYTES + arena_bytes
        self.name = f"ep_megatron.test.{os.getpid()}.{id(self)}"
        self._descriptors: list[int] = []
        (folder / self.name).touch(0o600)
        os.truncate(folder / self.name, self.num_bytes)
        self.own = self._map(self.name)
        self.own.introduce(1, 2)
        self.theirs: Words | None = None
        self.epoch = 0

    def _map(self, name: str) -> Words:
        descriptor = os.open(self.folder / name, os.O_RDWR)
        self._descriptors.append(descriptor)
        return Words(mmap.mmap(descriptor, 0))

    def gather_text(self, operation: str, text: str, num_bytes: int = 256) -> Sequence[str]:
        if not text or not (self.folder / text).exists():
            return [text, ""]
        self.theirs = self._map(text)
        return [text, self.name]

    def take_part(self, call: Call, lie: Sequence[int] = (), **post: Any) -> None:
        """Post the next call (or `lie` in its place) and say that it is finished."""
        assert self.theirs is not None
        self.epoch += 1
        self.own.begin(self.epoch, call.operation)
        self.own.post(self.epoch, lie or list(call), **post)
        for flags in ("posted", "finished"):
            self.theirs.raise_flag(flags, 1, self.epoch)

    def close(self) -> None:
        (self.folder / self.name).unlink(missing_ok=True)
        for words in (self.own, self.theirs):
            if words is not None:
                words.memory.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


def mapped_segments() -> dict[int, Words]:
    """Return the control parts of all segments that this process has mapped, by rank.

    With them a rank can do by hand what its Buffer would do, and stop anywhere.
    """
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/ep_megatron." not in line:
            continue
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if end - start < CONTROL_BYTES:
            continue
        words = Words((ctypes.c_char * CONTROL_BYTES).from_address(start))
        if words.read(LAYOUT["magic"], "Q") == MAGIC:
            found[words.read(LAYOUT["rank"], "I")] = words
    return found
