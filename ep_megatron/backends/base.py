"""The contract of a backend, and how ranks find out that they disagree."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import AnyHandle, DeviceHandle, DispatchHandle
from ep_megatron.statistics import BufferStatistics

DTYPES = (
    None,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int32,
    torch.int64,
)
OPERATIONS = ("dispatch", "cached dispatch", "combine")
MAX_EXPERTS = 16384  # on all ranks; messages have room for as many counts


@dataclass(frozen=True)
class Rows:
    """What travels: a row per token, with what belongs to it.

    Attributes:
        x: `[N, H]`, any dtype whose row is a multiple of 16 bytes.
        scales: `[N, S]` of a 4-byte dtype, for rows quantised by the caller.
        topk_weights: `[N, K]` float32 or float64 (received expert-major rows: `[N]`).
        topk_idx: only on received rows: `[N, K]` local expert of each slot, or -1.
        fp8: only on sent rows: how `x` is cast to e4m3 on its way, scales included.
        widen_to: only on sent rows: dtype to which e4m3 rows are widened where they arrive.
    """

    x: Tensor
    scales: Tensor | None = None
    topk_weights: Tensor | None = None
    topk_idx: Tensor | None = None
    fp8: Fp8Recipe | None = None
    widen_to: torch.dtype | None = None

    def contiguous(self) -> "Rows":
        """Return the same with dense tensors. Reads them where they are not."""
        if all(tensor is None or tensor.is_contiguous() for tensor in self.tensors()):
            return self
        x, scales, topk_weights, topk_idx = (_contiguous(tensor) for tensor in self.tensors())
        assert x is not None
        return replace(self, x=x, scales=scales, topk_weights=topk_weights, topk_idx=topk_idx)

    @property
    def is_cast(self) -> bool:
        """Whether rows do not arrive as they are sent."""
        return self.fp8 is not None or self.widen_to is not None

    def new_arrived(self, num_rows: int) -> tuple[Tensor, Tensor | None]:
        """Return uninitialised rows, and scales, of what these arrive as."""
        hidden = self.x.shape[1]
        if self.widen_to is not None:
            return self.x.new_empty(num_rows, hidden, dtype=self.widen_to), None
        if self.fp8 is not None:
            x = self.x.new_empty(num_rows, hidden, dtype=torch.float8_e4m3fn)
            return x, self.fp8.new_scales(num_rows, hidden, x.device)
        x, scales = self.x.new_empty(num_rows, hidden), self.scales
        return x, None if scales is None else scales.new_empty(num_rows, scales.shape[1])

    def new_weights(self, *shape: int) -> Tensor | None:
        """Return uninitialised weights, where these rows have some."""
        return None if self.topk_weights is None else self.topk_weights.new_empty(*shape)

    def new_received(self, handle: DispatchHandle) -> "Rows":
        """Return uninitialised tensors for what arrives here of such rows along `handle`."""
        columns = () if handle.expand else (handle.num_topk,)
        num_rows = handle.num_recv_rows
        return Rows(*self.new_arrived(num_rows), self.new_weights(num_rows, *columns))

    def new_combined(self, handle: AnyHandle) -> tuple[Tensor, Tensor | None]:
        """Return uninitialised tensors for the tokens, and weights, such rows are summed to."""
        tokens = self.x.new_empty(handle.num_tokens, self.x.shape[1])
        return tokens, self.new_weights(handle.num_tokens, handle.num_topk)

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the tensors in the order of the attributes."""
        return self.x, self.scales, self.topk_weights, self.topk_idx


@dataclass(frozen=True)
class Routing:
    """What the rows are sent by: `topk_idx [T, K]` in `[-1, num_experts)`, and the row order.

    `num_worst_tokens` only takes part in the agreement of ranks.
    """

    topk_idx: Tensor
    num_experts: int
    expand: bool = False
    expert_alignment: int = 1
    num_worst_tokens: int = 0

    def contiguous(self) -> "Routing":
        """Return the same with a dense `topk_idx`. Reads it where it is not."""
        topk_idx = self.topk_idx.contiguous()
        return self if topk_idx is self.topk_idx else replace(self, topk_idx=topk_idx)

    def copy(self) -> "Routing":
        """Return the same in memory of its own."""
        return replace(self, topk_idx=self.topk_idx.clone())


@dataclass(frozen=True)
class Received:
    """Tensors for rows that will arrive, and what the backend that made them needs besides."""

    rows: Rows
    place: Any = None


Announce = Callable[[Rows, DispatchHandle], None]


class Call(NamedTuple):
    """What all ranks must agree on before a row moves; compared field by field."""

    operation: int
    dtype: int
    hidden: int
    scales: int = 0
    weights_dtype: int = 0
    idx_dtype: int = 0
    num_topk: int = 0
    num_experts: int = 0
    expand: int = 0
    expert_alignment: int = 0
    plan_id: int = 0
    fp8: int = 0
    num_worst_tokens: int = 0

    @staticmethod
    def of(operation: str, rows: Rows, routing: Routing | DispatchHandle | DeviceHandle) -> "Call":
        """Describe this rank's call."""
        fresh = routing if isinstance(routing, Routing) else None
        cached = None if isinstance(routing, Routing) else routing
        return Call(
            operation=OPERATIONS.index(operation),
            dtype=DTYPES.index(rows.x.dtype),
            hidden=rows.x.shape[1],
            scales=0 if rows.scales is None else rows.scales.shape[1],
            weights_dtype=0 if rows.topk_weights is None else DTYPES.index(rows.topk_weights.dtype),
            idx_dtype=DTYPES.index(fresh.topk_idx.dtype) if fresh else 0,
            num_topk=fresh.topk_idx.shape[1] if fresh else cached.num_topk if cached else 0,
            num_experts=routing.num_experts,
            expand=int(routing.expand),
            expert_alignment=routing.expert_alignment,
            plan_id=cached.plan_id if cached else 0,
            fp8=0 if rows.fp8 is None else rows.fp8.code,
            num_worst_tokens=fresh.num_worst_tokens if fresh else 0,
        )


NUM_CALL_FIELDS = len(Call._fields)
_DESCRIPTIONS = {
    "operation": "the operation",
    "dtype": "the dtype of x",
    "scales": "the number of scales per token",
    "weights_dtype": "the dtype of topk_weights",
    "idx_dtype": "the dtype of topk_idx",
    "plan_id": "the handle (number of the dispatch that made it)",
    "fp8": "the FP8 recipe",
}


class NoRoomError(RuntimeError):
    """Memory for rows does not suffice on some rank: raised on all, and the next call goes on.

    What a rank alone runs out of is another error, and ends the group.
    """


@dataclass(frozen=True)
class PeerReport:
    """One rank's word on a call: what it does, or why it cannot."""

    call: Sequence[int]
    error: str = field(default="")


def check_agreement(operation: str, reports: Sequence[PeerReport]) -> None:
    """Raise the same ValueError on every rank if one of them failed or they do not agree.

    Args:
        operation: this rank's operation, for the message.
        reports: one per rank, in rank order.
    """
    failed = [f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.error]
    if failed:
        raise ValueError(f"{operation}: no rank went on because of " + "; ".join(failed))
    for index, name in enumerate(Call._fields):
        values = [_readable(name, report.call[index]) for report in reports]
        if len(set(values)) > 1:
            groups = (
                f"{value} on rank {', '.join(str(r) for r, v in enumerate(values) if v == value)}"
                for value in dict.fromkeys(values)
            )
            what = _DESCRIPTIONS.get(name, name)
            raise ValueError(
                f"{operation}: expected {what} to be the same on all ranks, got "
                + " and ".join(groups)
            )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _readable(name: str, value: int) -> str:
    # A peer's number may name nothing.
    if name == "operation":
        return OPERATIONS[value] if 0 <= value < len(OPERATIONS) else f"operation {value}"
    if name.endswith("dtype"):
        is_known = 0 <= value < len(DTYPES)
        return str(DTYPES[value]).removeprefix("torch.") if is_known else f"dtype {value}"
    if name == "expand" and value in (0, 1):
        return str(bool(value))
    if name == "fp8":
        try:
            return str(Fp8Recipe.of_code(value)) if value else "none"
        except (ValueError, IndexError, struct.error):
            return f"recipe {value}"
    return str(value)


class Backend(Protocol):
    """How rows travel between the ranks of one group.

    `dispatch`, `dispatch_again`, `combine` and `fail` are collective, and come one at a time, from
    any thread. Arguments have been checked on this rank (`arguments`); a rank whose check failed
    calls `fail` in place of the operation, so that the others hear of it. Inputs are read, and made
    dense, only inside the call.
    """

    name: str
    rank: int
    num_ranks: int

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """Plan the routing and send every row to where its experts are.

        `announce` gets what will be returned once its sizes are known, before the rows are there.
        """

    def new_received(self, rows: Rows, handle: DispatchHandle) -> Received:
        """Return tensors for what `dispatch_again` will receive. Local, reads nothing."""

    def dispatch_again(
        self, rows: Rows, handle: DispatchHandle, received: Received | None = None
    ) -> Rows:
        """Send other rows along the routing of an earlier dispatch, into `received` if given."""

    def new_combined(self, rows: Rows, handle: AnyHandle) -> tuple[Tensor, Tensor | None]:
        """Return tensors for what `combine` will return. Local, reads nothing."""

    def combine(
        self,
        rows: Rows,
        handle: DispatchHandle,
        biases: Sequence[Tensor] = (),
        combined: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Bring rows (and weights) back to their tokens and sum them, into `combined` if given.

        The sum is in float32 (float64 for float64 rows): the biases, then rank after rank in
        ascending order, each rank's rows summed in slot order first; rounded once.
        """

    def fail(self, operation: str, error: str) -> None:
        """Tell the other ranks, who are in the same call, why this one cannot take part."""

    def interrupt(self) -> None:
        """Make the call that waits in another thread give up, if it can. Local."""

    def limit_threads(self, num_threads: int) -> None:
        """Use at most as many threads to move rows, within the configured number. Local."""

    def close(self) -> None:
        """Free what the backend holds. Local; received tensors stay valid."""


@runtime_checkable
class SyncFreeBackend(Protocol):
    """A backend whose host waits for no other rank where rows are bounded by a capacity.

    All are collective. What ranks disagree in, bad indices and too many rows are found on the
    device, on all ranks alike; nothing moves then, and `DeviceHandle.check` or a later call raises.
    """

    def dispatch_within(self, rows: Rows, routing: Routing) -> tuple[Rows, DeviceHandle]:
        """Dispatch into `routing.num_worst_tokens` rows. Those behind what came have weights of 0
        and indices of -1.
        """

    def dispatch_again_within(self, rows: Rows, handle: DeviceHandle) -> Rows:
        """Send other rows along the routing of such a dispatch."""

    def combine_within(
        self,
        rows: Rows,
        handle: DeviceHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor, Tensor | None],
    ) -> None:
        """Combine as `Backend.combine` does, of the rows that are there, into `combined`."""


@runtime_checkable
class CountingBackend(Protocol):
    """A backend that counts what its calls waited for and moved."""

    def statistics(self) -> BufferStatistics:
        """Return the counts so far. Local, from any thread."""
