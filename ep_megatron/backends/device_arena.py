"""Memory that all ranks' kernels reach: slabs, added collectively, and blocks in them."""

import operator
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_megatron import _cuda
from ep_megatron.backends.base import NoRoomError
from ep_megatron.backends.device import Device
from ep_megatron.backends.meeting import Meeting

ALIGNMENT = 256
NO_PLACE = _cuda.NO_PLACE
_SLAB_SHIFT = _cuda.SLAB_SHIFT  # a place is a slab's number and an offset in it
_MIN_SLAB_BYTES = 2 << 20
_OFFER_ERROR_BYTES = 384
# Whether there is memory, its handle's length, the handle, why there is none.
_OFFER = struct.Struct(f"<?q128s{_OFFER_ERROR_BYTES}s")


def align(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class Block:
    """A piece of this rank's arena.

    Attributes:
        place: what peers are told: where it is, in their mapping as in this rank's.
        num_bytes: its size.
    """

    place: int
    num_bytes: int


NO_BLOCK = Block(NO_PLACE, 0)


class DeviceArena:
    """Blocks of shared memory of one rank, and where every rank's memory is seen from here.

    `free` may be called from any thread, also by the garbage collector in the midst of another
    method: it only notes the block, which the next call takes back.

    Args:
        device: whose memory.
        meeting: the ranks.
        max_bytes: most bytes this rank may allocate.

    Attributes:
        table: where kernels find every rank's slabs; `Slabs` in csrc/cuda/protocol.h.
    """

    def __init__(self, device: Device, meeting: Meeting, max_bytes: int) -> None:
        self._device, self._meeting, self._max_bytes = device, meeting, max_bytes
        self.table = device.allocate_host(_cuda.SLABS_BYTES)
        self._slabs: list[list[int]] = [[] for _ in range(meeting.num_ranks)]
        self._sizes: list[int] = []
        self._free: list[list[tuple[int, int]]] = []  # of each slab: (offset, bytes), ascending
        self._returned: deque[Block] = deque()
        self._in_use = 0

    @property
    def num_bytes_committed(self) -> int:
        """Bytes of this rank's slabs."""
        return sum(self._sizes)

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of blocks that are not free."""
        self._take_back()
        return self._in_use

    def address(self, rank: int, place: int) -> int:
        """Return where a rank's place is, seen from here; 0 for no place."""
        if place == NO_PLACE:
            return 0
        return self._slabs[rank][place >> _SLAB_SHIFT] + (place & ((1 << _SLAB_SHIFT) - 1))

    def addresses(self, places: Sequence[int]) -> list[int]:
        """Return where every rank's place is, seen from here."""
        return [self.address(rank, place) for rank, place in enumerate(places)]

    def place_of(self, address: int | None, num_bytes: int) -> int | None:
        """Return the place of memory that lies in this rank's arena, or None."""
        if address is None:
            return None
        own = self._slabs[self._meeting.rank]
        for slab, (start, size) in enumerate(zip(own, self._sizes, strict=True)):
            if start <= address and address + num_bytes <= start + size:
                return slab << _SLAB_SHIFT | address - start
        return None

    def allocate(self, num_bytes: int) -> Block | None:
        """Return a block of the first place with room, or None; peers know nothing of it."""
        self._take_back()
        size = align(num_bytes)
        for slab, holes in enumerate(self._free):
            for index, (offset, hole) in enumerate(holes):
                if hole < size:
                    continue
                holes[index] = (offset + size, hole - size)
                self._in_use += size
                return Block(slab << _SLAB_SHIFT | offset, size)
        return None

    def allocate_largest(self) -> Block | None:
        """Return all of the largest hole, to be trimmed when it is known what is needed."""
        self._take_back()
        largest = max((hole for holes in self._free for _, hole in holes), default=0)
        return self.allocate(largest) if largest else None

    def trim(self, block: Block, num_bytes: int) -> Block:
        """Give back the end of a block; return what remains."""
        size = align(num_bytes)
        self.free(Block(block.place + size, block.num_bytes - size))
        return Block(block.place, size)

    def free(self, block: Block) -> None:
        """Give a block back. What the device may still do with it comes before later launches."""
        if block.num_bytes:
            self._returned.append(block)

    def grow(self, operation: str, num_bytes: int) -> tuple[list[int], Block]:
        """Add a slab with room for `num_bytes` in one piece where that is not 0. Collective.

        Returns:
            places: where every rank's new slab starts; `NO_PLACE` where it has none.
            block: of `num_bytes`, at the start of this rank's; `NO_BLOCK` for 0.

        Raises:
            RuntimeError: on every rank, if one has no memory or cannot reach another's.
        """
        size, refusal = 0, ""
        if num_bytes:
            left = (self._max_bytes - self.num_bytes_committed) // ALIGNMENT * ALIGNMENT
            wanted = align(max(num_bytes, self.num_bytes_committed), _MIN_SLAB_BYTES)
            size = max(min(wanted, left), align(num_bytes))
            if len(self._sizes) == _cuda.MAX_SLABS:
                refusal = f"it has grown {_cuda.MAX_SLABS} times"
            if size > left:
                refusal = f"{num_bytes} more bytes would exceed max_bytes, {self._max_bytes}"
        places = []
        for rank, address in enumerate(
            share(self._device, self._meeting, operation, size, refusal=refusal)
        ):
            slabs = self._slabs[rank]
            places.append(NO_PLACE if address is None else len(slabs) << _SLAB_SHIFT)
            if address is not None:
                slabs.append(address)
        self._write_table()
        if not size:
            return places, NO_BLOCK
        block = Block(places[self._meeting.rank], align(num_bytes))
        self._sizes.append(size)
        self._free.append([(block.num_bytes, size - block.num_bytes)])
        self._in_use += block.num_bytes
        return places, block

    def settle(
        self, operation: str, report: _cuda.Report, needed: Sequence[int], offered: Block
    ) -> tuple[list[int], Block]:
        """Find room for what every rank receives; all grow together if one must. Collective.

        Every rank knows from the posts who has offered too little.

        Args:
            operation: for messages.
            report: of the meeting in which ranks offered blocks.
            needed: bytes, by rank.
            offered: what this rank has offered.

        Returns:
            Where every rank's rows go, and this rank's block.
        """
        rank = self._meeting.rank
        places = [word.rows_place for word in report.words]
        is_short = [need > word.rows_bytes for need, word in zip(needed, report.words, strict=True)]
        grown = NO_BLOCK
        if any(is_short):
            new_places, grown = self.grow(operation, needed[rank] if is_short[rank] else 0)
            places = [
                new if short else old
                for new, short, old in zip(new_places, is_short, places, strict=True)
            ]
        if not is_short[rank]:
            return places, self.trim(offered, needed[rank])
        self.free(offered)
        return places, grown

    def _write_table(self) -> None:
        row = struct.Struct(f"<{_cuda.MAX_SLABS}Q")
        padded = [slabs + [0] * (_cuda.MAX_SLABS - len(slabs)) for slabs in self._slabs]
        self.table.write(b"".join(row.pack(*slabs) for slabs in padded))

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._in_use -= block.num_bytes
            slab, offset = block.place >> _SLAB_SHIFT, block.place & ((1 << _SLAB_SHIFT) - 1)
            holes = sorted([*self._free[slab], (offset, block.num_bytes)])
            merged: list[tuple[int, int]] = []
            for start, size in filter(operator.itemgetter(1), holes):
                if merged and sum(merged[-1]) == start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + size)
                else:
                    merged.append((start, size))
            self._free[slab] = merged


def share(
    device: Device,
    meeting: Meeting,
    operation: str,
    num_bytes: int,
    *,
    is_zeroed: bool = False,
    refusal: str = "",
) -> list[int | None]:
    """Allocate `num_bytes` that peers reach (0: none); map what the others allocate. Collective.

    Returns:
        The address of every rank's memory as seen from here, None where it allocated none.

    Raises:
        RuntimeError: on every rank, if one cannot, or has a `refusal`.
    """
    own, handle = 0, b""
    if num_bytes and not refusal:
        try:
            own, handle = device.allocate_shared(num_bytes, is_zeroed)
        except RuntimeError as error:
            refusal = str(error)
    message = _OFFER.pack(
        bool(num_bytes), len(handle), handle, refusal.encode()[:_OFFER_ERROR_BYTES]
    )
    answers = meeting.exchange(operation, torch.frombuffer(bytearray(message), dtype=torch.uint8))
    addresses: list[int | None] = []
    errors = []
    for rank, answer in enumerate(answers):
        has_memory, length, theirs, text = _OFFER.unpack(bytes(answer.tolist()))
        addresses.append(None)
        if text.rstrip(b"\0"):
            errors.append(f"rank {rank}: {text.rstrip(bytes(1)).decode(errors='replace')}")
        elif has_memory and rank == meeting.rank:
            addresses[rank] = own
        elif has_memory:
            try:
                addresses[rank] = device.open_shared(theirs[:length])
            except RuntimeError as error:
                errors.append(f"rank {rank} out of reach of rank {meeting.rank}: {error}")
    # Who could not map a peer's memory tells the others.
    said = "; ".join(errors).encode()[:_OFFER_ERROR_BYTES].decode(errors="ignore")
    problems = list(filter(None, meeting.gather_text(operation, said, _OFFER_ERROR_BYTES)))
    if problems:
        raise NoRoomError(
            f"{operation}: expected room that all ranks reach, got {problems[0]}; "
            "raise max_bytes, free GPU memory, or use backend='process_group'"
        )
    return addresses
