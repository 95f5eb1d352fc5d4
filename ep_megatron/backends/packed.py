"""What low-latency calls move: packed rows per local expert, and how ranks agree on a call.

E experts, R ranks, C the most tokens a rank may send (`num_max_dispatch_tokens_per_rank`),
H hidden, T tokens here, K top-k. Source: layouts and names of DeepEP's low-latency API (MIT).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ep_megatron.backends.base import PeerReport
from ep_megatron.fp8 import Fp8Recipe

LOW_LATENCY_OPERATIONS = ("low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer")
DISPATCH, COMBINE, CLEAN = range(3)
BLOCK = 128  # columns per scale


class LowLatencyCall(NamedTuple):
    """What all ranks must agree on; compared field by field."""

    operation: int
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    fp8: int = 0
    use_logfmt: int = 0

    @property
    def name(self) -> str:
        """The verb."""
        return LOW_LATENCY_OPERATIONS[self.operation]

    @property
    def recipe(self) -> Fp8Recipe | None:
        """How rows are cast as they are sent."""
        return Fp8Recipe.of_code(self.fp8) if self.fp8 else None


NUM_FIELDS = len(LowLatencyCall._fields)


class LowLatencyHandle(NamedTuple):
    """What a dispatch leaves for its combine; a value, and DeepEP's 5-tuple.

    Attributes:
        packed_recv_src_info: `[E/R, R*C]` int32, the token's index at its source.
        packed_recv_layout_range: `[E/R, R]` int64 by source rank: the low 32 bits count its rows,
            the high 32 bits are the first one's place.
        num_max_dispatch_tokens_per_rank: C.
        hidden: H.
        num_experts: E.
    """

    packed_recv_src_info: Tensor
    packed_recv_layout_range: Tensor
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int


@dataclass(frozen=True)
class Packed:
    """Tensors that a dispatch fills: rows by local expert, source rank and token.

    Attributes:
        x: `[E/R, R*C, H]` bfloat16 or float8_e4m3fn; rows behind the count are not written.
        scales: `[E/R, R*C, S]` float32 or int32, column-major in the last two dimensions, or None.
        count: `[E/R]` int32.
        src_info: see `LowLatencyHandle`.
        layout_range: likewise.
        waited: `[R]` int64, nanoseconds spent waiting for each rank.
    """

    x: Tensor
    scales: Tensor | None
    count: Tensor
    src_info: Tensor
    layout_range: Tensor
    waited: Tensor

    @staticmethod
    def empty(call: LowLatencyCall, num_ranks: int, device: torch.device) -> "Packed":
        """Return uninitialised tensors for what `call` brings."""
        local = call.num_experts // num_ranks
        rows = num_ranks * call.num_max_dispatch_tokens_per_rank
        recipe = call.recipe
        scales = None
        if recipe is not None:
            columns = recipe.num_scales(call.hidden)
            scales = torch.empty(local, columns, rows, dtype=recipe.scale_dtype, device=device)
            scales = scales.transpose(1, 2)
        dtype = torch.bfloat16 if recipe is None else torch.float8_e4m3fn
        return Packed(
            torch.empty(local, rows, call.hidden, dtype=dtype, device=device),
            scales,
            torch.zeros(local, dtype=torch.int32, device=device),
            torch.empty(local, rows, dtype=torch.int32, device=device),
            torch.zeros(local, num_ranks, dtype=torch.int64, device=device),
            torch.zeros(num_ranks, dtype=torch.int64),
        )


@dataclass(frozen=True)
class Waits:
    """What a receiving half adds to, by rank.

    Attributes:
        waited: `[R]` int64, nanoseconds spent waiting for each rank.
        num_bytes: `[R]` int64, of rows that were read from it; where they are on a CPU.
    """

    waited: Tensor
    num_bytes: Tensor

    @staticmethod
    def of_dispatch(call: LowLatencyCall, packed: Packed, topk_idx: Tensor) -> "Waits":
        """Return those of a dispatch, with the bytes that it has *sent* to each rank."""
        width = 2 * call.hidden
        if call.recipe is not None:
            width = call.hidden + 4 * call.recipe.num_scales(call.hidden)
        num_ranks = len(packed.waited)
        used = topk_idx[topk_idx >= 0].to(torch.int64) // (call.num_experts // num_ranks)
        return Waits(packed.waited, width * torch.bincount(used, minlength=num_ranks))

    @staticmethod
    def zeros(num_ranks: int) -> "Waits":
        """Return what nothing was added to."""
        return Waits(*torch.zeros(2, num_ranks, dtype=torch.int64))


class LowLatencyBackend(Protocol):
    """How packed rows travel. Calls come one at a time; each has a sending and a receiving half.

    Sending halves come in the same order on all ranks, and at most two calls may lack their
    receiving half. A sending half does not wait for the others' sending halves of the same call.

    Attributes:
        device_type: of the tensors it takes and gives, as torch names it.
    """

    num_ranks: int
    rank: int
    device_type: str

    def send_dispatch(self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor) -> int:
        """Read `x [T, H]` and `topk_idx [T, K]`, both dense; return the call's number.

        Values of `topk_idx` that cannot be raise a ValueError, on every rank; here, or where a
        kernel finds them from `receive_dispatch`.
        """

    def receive_dispatch(self, number: int, call: LowLatencyCall, packed: Packed) -> None:
        """Wait for the rows of that call and put them in place."""

    def send_combine(
        self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor, handle: LowLatencyHandle
    ) -> int:
        """Offer `x [E/R, R*C, H]`, dense, maybe a taken buffer; return the call's number."""

    def receive_combine(
        self,
        number: int,
        call: LowLatencyCall,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        waits: "Waits",
    ) -> None:
        """Sum the weighted rows of each token into `out [T, H]`."""

    def clean(self, call: LowLatencyCall) -> None:
        """Meet all ranks that are not masked. Collective."""

    def combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """Return bfloat16 `[E/R, R*C, H]`, the same until one is taken. Local."""

    def take_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """Return that buffer for a combine to come. Local."""

    def fail(self, operation: str, error: str) -> None:
        """Take part in a call only to say why this rank cannot."""

    def mask(self, rank: int, is_masked: bool) -> None:
        """Neither wait for that rank nor read from it, or do so again. Local."""

    def masks(self) -> list[int]:
        """Return 1 for every rank that is masked, or has masked this one. Local."""

    def limit_threads(self, num_threads: int) -> None:
        """Move rows on at most as many threads, from the next call on. Local."""

    def interrupt(self) -> None:
        """Make a waiting call give up, if it can. Local."""

    def close(self) -> None:
        """Free what it holds. Local."""


@runtime_checkable
class ReplayedBackend(Protocol):
    """A `LowLatencyBackend` whose calls CUDA graphs can make again."""

    def is_capturing(self) -> bool:
        """Return whether calls go into a graph now: no host waits for them. Local."""

    def check_replays(self) -> None:
        """Wait for replays and calls before; raise, once, what the first that failed failed in.

        Local. A call outside of a graph raises it, too, once all ranks have made that call.
        """


def check_low_latency_agreement(name: str, reports: dict[int, PeerReport], num_ranks: int) -> None:
    """Raise the same ValueError on every rank if one of them failed or they do not agree.

    Args:
        name: the operation, for the message.
        reports: of every rank that is not masked.
        num_ranks: R.
    """
    failed = [f"rank {rank}: {r.error}" for rank, r in sorted(reports.items()) if r.error]
    if failed:
        raise ValueError(f"{name}: no rank went on because of " + "; ".join(failed))
    for index, field in enumerate(LowLatencyCall._fields):
        values = {rank: report.call[index] for rank, report in sorted(reports.items())}
        if len(set(values.values())) > 1:
            groups = (
                f"{_readable(field, value)} on rank "
                + ", ".join(str(rank) for rank, other in values.items() if other == value)
                for value in dict.fromkeys(values.values())
            )
            raise ValueError(
                f"{name}: expected {field} to be the same on all {num_ranks} ranks, got "
                + " and ".join(groups)
            )


def _readable(field: str, value: int) -> str:
    if field == "operation":
        return LOW_LATENCY_OPERATIONS[value]
    if field == "use_logfmt":
        return str(bool(value))
    if field == "fp8":
        return str(Fp8Recipe.of_code(value)) if value else "none"
    return str(value)


def too_many_pending(name: str) -> ValueError:
    """Return the error of a third call while two lack their receiving half."""
    return ValueError(
        f"{name}: expected at most two calls whose hook has not run, got a third; call the hook "
        "of the oldest first"
    )


def other_routing(name: str, ranks: Sequence[int]) -> ValueError:
    """Return the error of a combine whose topk_idx is not that of the dispatch."""
    return ValueError(
        f"{name}: expected topk_idx to be that of the dispatch, got another number of tokens for "
        f"experts of rank {', '.join(map(str, ranks))}; combine with the dispatch's topk_idx"
    )
