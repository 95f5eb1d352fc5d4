"""Debugging: hashes of rows travel after them, and a row that came changed is named.

What is said of a row goes along the same routing as the rows, as rows of its own, so it arrives in
the same order: who sent a row, and which token it is, travels with it. T tokens here, K top-k, M
received, N received rows.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ep_megatron.backends.base import (
    Announce,
    Backend,
    CountingBackend,
    Received,
    Routing,
    Rows,
)
from ep_megatron.backends.casting import as_asked, cast_rows
from ep_megatron.backends.checked_sums import SumOrder, check_sums
from ep_megatron.backends.row_hashes import first_wrong, hash_or_zeros, hash_rows, is_same
from ep_megatron.config import BufferConfig
from ep_megatron.handle import AnyHandle, DispatchHandle
from ep_megatron.statistics import BufferStatistics

CHECK_VARIABLE = "EP_MEGATRON_CHECK_ROWS"
_TOKEN_BITS = 40


def is_asked_for(config: BufferConfig) -> bool:
    """Return whether rows are to be checked."""
    if config.check_rows is not None:
        return config.check_rows
    return os.environ.get(CHECK_VARIABLE) == "1"


class CheckedBackend:
    """See `Backend`: another backend, whose calls are checked. Collective wherever it is.

    Args:
        inner: the backend.
        order: in which it adds rows.
    """

    def __init__(self, inner: Backend, order: SumOrder) -> None:
        self._inner, self._order = inner, order
        self.name, self.rank, self.num_ranks = inner.name, inner.rank, inner.num_ranks

    def dispatch(
        self, rows: Rows, routing: Routing, announce: Announce | None = None
    ) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        received, handle = self._inner.dispatch(rows, routing, announce)
        self._check("dispatch", rows, handle, received)
        return received, handle

    def new_received(self, rows: Rows, handle: DispatchHandle) -> Received:
        """See `Backend.new_received`."""
        return self._inner.new_received(rows, handle)

    def dispatch_again(
        self, rows: Rows, handle: DispatchHandle, received: Received | None = None
    ) -> Rows:
        """See `Backend.dispatch_again`."""
        arrived = self._inner.dispatch_again(rows, handle, received)
        self._check("cached dispatch", rows, handle, arrived)
        return arrived

    def new_combined(self, rows: Rows, handle: AnyHandle) -> tuple[Tensor, Tensor | None]:
        """See `Backend.new_combined`."""
        return self._inner.new_combined(rows, handle)

    def combine(
        self,
        rows: Rows,
        handle: DispatchHandle,
        biases: Sequence[Tensor] = (),
        combined: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        total, weights = self._inner.combine(rows, handle, biases, combined)
        check_sums(self._inner, self._order, rows.x, handle, (total, biases))
        return total, weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        self._inner.fail(operation, error)

    def interrupt(self) -> None:
        """See `Backend.interrupt`."""
        self._inner.interrupt()

    def limit_threads(self, num_threads: int) -> None:
        """See `Backend.limit_threads`."""
        self._inner.limit_threads(num_threads)

    def close(self) -> None:
        """See `Backend.close`."""
        self._inner.close()

    def statistics(self) -> BufferStatistics:
        """See `CountingBackend`; the calls that check are counted too."""
        if not isinstance(self._inner, CountingBackend):
            raise NotImplementedError(f"statistics: {self.name} does not count")
        return self._inner.statistics()

    def _check(self, operation: str, sent: Rows, handle: DispatchHandle, arrived: Rows) -> None:
        """Raise a RuntimeError that names the first row that is not what its source sent."""
        name, wrong = self._compare(sent, handle, arrived)
        found = first_wrong(wrong)
        if found is None:
            return
        row, what, num_wrong = found
        number = int(name[row]) - 1
        whole = f"as rank {number >> _TOKEN_BITS} sent it (token {number & (1 << _TOKEN_BITS) - 1})"
        raise RuntimeError(
            f"{operation}: expected row {row} on rank {self.rank} to be "
            f"{whole if number >= 0 else 'zeros, as padding is'}, got other {what}; "
            f"{num_wrong} of {len(name)} rows came changed"
        )

    def _compare(
        self, sent: Rows, handle: DispatchHandle, arrived: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the names `[N]` of the rows that came, 0 for padding, and what is wrong of them.

        Collective. Padding is zeros in everything, as are the words on it.
        """
        num_tokens, num_topk = len(sent.x), handle.num_topk
        whole = as_asked(cast_rows(sent), sent)
        tokens = torch.arange(num_tokens, device=sent.x.device)
        columns = [
            (self.rank << _TOKEN_BITS) + tokens[:, None] + 1,
            hash_rows(whole.x)[:, None],
            hash_or_zeros(whole.scales, whole.x)[:, None],
        ]
        weights, slots = sent.topk_weights, None
        if weights is not None:
            columns.append(weights.detach().double().contiguous().view(torch.int64))
            slots = torch.arange(num_topk, dtype=torch.float64, device=weights.device)
            slots = slots.expand(num_tokens, -1)
        if handle.topk_idx is not None:  # rows by rank
            columns.append(handle.topk_idx.long())
        widths = [column.shape[1] for column in columns]
        words = torch.cat(columns, 1)
        words = pad(words, (0, words.shape[1] % 2))  # rows are of multiples of 16 bytes
        came = self._inner.dispatch_again(Rows(words, topk_weights=slots).contiguous(), handle)
        parts = [part.contiguous() for part in came.x[:, : sum(widths)].split(widths, 1)]
        wrong = {
            "bytes": hash_rows(arrived.x) != parts[1][:, 0],
            "scales": hash_or_zeros(arrived.scales, arrived.x) != parts[2][:, 0],
        }
        is_local = None
        if handle.topk_idx is not None:
            local_idx = parts[-1] - handle.rank * handle.num_local_experts
            is_local = (local_idx >= 0) & (local_idx < handle.num_local_experts)
            if arrived.topk_idx is not None:
                expected = local_idx.masked_fill(~is_local, -1)
                wrong["expert ids"] = (arrived.topk_idx != expected).any(1)
        if weights is not None:
            assert arrived.topk_weights is not None
            expected, got = parts[3].view(torch.float64), arrived.topk_weights.double()
            if is_local is None:
                assert came.topk_weights is not None
                slot = came.topk_weights.long().clamp(0, num_topk - 1)
                wrong["weights"] = ~is_same(got, expected.gather(1, slot[:, None])[:, 0])
            else:
                wrong["weights"] = ~is_same(got, expected.masked_fill(~is_local, 0)).all(1)
        return parts[0][:, 0], wrong
