"""Where the rows of low-latency calls are in the memory that each GPU shows its peers.

A window has four places of one size: slots for two calls, taken in turn, and rows of two combines.
Where some ranks are out of reach it has as many again: what leaves for them in two dispatches, and
what comes from them in two combines. Whose turn it is kernels know, who count the calls: of two
places taken in turn the host knows the first, that of calls of even number.
E experts, C the most tokens of a rank, H hidden.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from ep_megatron.backends.packed import DISPATCH, LowLatencyCall

NUM_PLACES = 4
_ALIGNMENT = 256
_NEVER = 0  # the call that used a place last, before any has


@dataclass(frozen=True)
class SlotBytes:
    """Bytes of a row as it travels, of its scales, and of both with what aligns them.

    Slots come in blocks of C, with 4 bytes each in front for the source's index; see `block_at` in
    csrc/cuda/packed_slots.cuh.
    """

    x: int
    scales: int
    slot: int
    block: int

    @staticmethod
    def of(call: LowLatencyCall) -> "SlotBytes":
        """Return those of a dispatch."""
        x, scales = 2 * call.hidden, 0
        if call.recipe is not None:
            x = call.hidden
            scales = call.recipe.num_scales(call.hidden) * call.recipe.scale_dtype.itemsize
        slot, num_slots = (x + scales + 15) // 16 * 16, call.num_max_dispatch_tokens_per_rank
        return SlotBytes(x, scales, slot, (4 * num_slots + 15) // 16 * 16 + num_slots * slot)


@dataclass(eq=False)
class Place:
    """Rows of a combine.

    Attributes:
        index: among such places, as kernels count.
        offset: from the window's start.
        last_call: whose rows were there last, as the host counts.
    """

    index: int
    offset: int
    last_call: int = _NEVER


class Window:
    """Which place is whose; the same sizes on all ranks.

    Args:
        num_bytes: of the first four places; what DeepEP's size hint says is enough.
        is_far: whether some ranks are out of reach.

    Attributes:
        slots_at: where the slots of a call begin.
        outbox_at: where a dispatch lays out what leaves for ranks out of reach.
        inbox_at: where the rows of a combine come from ranks out of reach.
        places: for rows of combines.
    """

    def __init__(self, num_bytes: int, is_far: bool = False) -> None:
        self.place_bytes = num_bytes // NUM_PLACES // _ALIGNMENT * _ALIGNMENT
        self.near_bytes = NUM_PLACES * self.place_bytes
        self.num_bytes = self.near_bytes * (2 if is_far else 1)
        self.slots_at = 0
        self.outbox_at = self.near_bytes * is_far
        self.inbox_at = self.outbox_at + 2 * self.place_bytes
        self.places = [Place(index, (2 + index) * self.place_bytes) for index in range(2)]
        self._next: tuple[Place, Tensor, int] | None = None
        self._taken: dict[int, Place] = {}  # by address, until their combine is sent

    def refusal(self, call: LowLatencyCall) -> str:
        """Return why a call does not fit; empty if it does."""
        rows = call.num_max_dispatch_tokens_per_rank * 2 * call.hidden
        needed = call.num_experts * (
            SlotBytes.of(call).block if call.operation == DISPATCH else rows
        )
        if needed <= self.place_bytes:
            return ""
        return (
            f"expected num_rdma_bytes of the Buffer to be at least {NUM_PLACES * needed}, got "
            f"{self.near_bytes}; pass Buffer.get_low_latency_rdma_size_hint(...)"
        )

    def free_place(self, pending: Collection[int], *, for_caller: bool = False) -> Place | None:
        """Return the place for rows whose last readers came first; None if all are in use.

        Args:
            pending: calls that lack their receiving half here.
            for_caller: who will write to it before the call, so nobody else may be.
        """
        held = list(self._taken.values())
        if self._next is not None and not for_caller:
            held.append(self._next[0])
        free = [place for place in self.places if place not in held]
        place = min(free, key=lambda place: place.last_call, default=None)
        return None if place is None or place.last_call in pending else place

    def next_buffer(self, shape: tuple[int, ...], graph: int) -> Tensor | None:
        """Return the caller's buffer for the next combine, if there is one as asked for.

        Args:
            shape: of the buffer.
            graph: what its combine goes into; see `Turn`.
        """
        if self._next is not None and self._next[1].shape == shape and self._next[2] == graph:
            return self._next[1]
        return None

    def next_graph(self, otherwise: int) -> int:
        """Return what the combine with the caller's buffer must go into."""
        return otherwise if self._next is None else self._next[2]

    def set_next_buffer(self, place: Place, buffer: Tensor, graph: int) -> None:
        """Keep a buffer that the caller writes into."""
        self._next = place, buffer, graph

    def take_next_buffer(self) -> Tensor:
        """Hand that buffer to a combine to come."""
        assert self._next is not None
        place, buffer, _ = self._next
        self._taken[buffer.data_ptr()] = place
        self._next = None
        return buffer

    def taken_place(self, address: int) -> Place | None:
        """Return the place of a buffer that was taken, once; None for other memory."""
        return self._taken.pop(address, None)
