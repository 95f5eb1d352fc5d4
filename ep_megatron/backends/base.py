"""The contract of a backend, and how ranks find out that they disagree."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import DispatchHandle

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


@dataclass(frozen=True)
class Routing:
    """What the rows are sent by: `topk_idx [T, K]` in `[-1, num_experts)`, and the row order."""

    topk_idx: Tensor
    num_experts: int
    expand: bool = False
    expert_alignment: int = 1


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

    @staticmethod
    def of(operation: str, rows: Rows, routing: Routing | DispatchHandle) -> "Call":
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


def _readable(name: str, value: int) -> str:
    if name == "operation":
        return OPERATIONS[value]
    if name.endswith("dtype"):
        return str(DTYPES[value]).removeprefix("torch.")
    if name == "expand":
        return str(bool(value))
    if name == "fp8":
        return str(Fp8Recipe.of_code(value)) if value else "none"
    return str(value)


class Backend(Protocol):
    """How rows travel between the ranks of one group.

    All methods but `close` are collective. Arguments have been checked on this rank (`arguments`);
    a rank whose check failed calls `fail` in place of the operation, so that the others hear of it.
    """

    name: str
    rank: int
    num_ranks: int

    def dispatch(self, rows: Rows, routing: Routing) -> tuple[Rows, DispatchHandle]:
        """Plan the routing and send every row to where its experts are."""

    def dispatch_again(self, rows: Rows, handle: DispatchHandle) -> Rows:
        """Send other rows along the routing of an earlier dispatch."""

    def combine(
        self, rows: Rows, handle: DispatchHandle, biases: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Bring rows (and weights) back to their tokens and sum them.

        The sum is in float32 (float64 for float64 rows): the biases, then rank after rank in
        ascending order, each rank's rows summed in slot order first; rounded once.
        """

    def fail(self, operation: str, error: str) -> None:
        """Tell the other ranks, who are in the same call, why this one cannot take part."""

    def close(self) -> None:
        """Free what the backend holds. Local; received tensors stay valid."""
