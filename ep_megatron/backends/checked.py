"""Debugging: hashes of rows travel after them, and a row that came changed is named.

The hashes go along the same routing as the rows, as rows of 16 bytes of their own, so they arrive
in the same order: who sent a row, and which token it is, travels with them.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ep_megatron.backends.base import (
    Announce,
    Backend,
    CountingBackend,
    Received,
    Routing,
    Rows,
)
from ep_megatron.config import BufferConfig
from ep_megatron.handle import AnyHandle, DispatchHandle
from ep_megatron.statistics import BufferStatistics

CHECK_VARIABLE = "EP_MEGATRON_CHECK_ROWS"
_TOKEN_BITS = 40
_FACTOR = 0x100000001B3  # odd, so that a change of any word changes the sum


def is_asked_for(config: BufferConfig) -> bool:
    """Return whether rows are to be checked."""
    if config.check_rows is not None:
        return config.check_rows
    return os.environ.get(CHECK_VARIABLE) == "1"


def hash_rows(x: Tensor) -> Tensor:
    """Return int64 `[N]` of rows `[N, H]`: any change of one 4-byte word changes it."""
    data = x.contiguous().view(torch.uint8)
    words = data.view(torch.int32) if data.shape[1] % 4 == 0 else data
    powers = torch.ones(words.shape[1], dtype=torch.int64, device=x.device)
    powers[1:] = _FACTOR
    return (words.to(torch.int64) * powers.cumprod(0)).sum(1)


class CheckedBackend:
    """See `Backend`: another backend, whose dispatches are checked. Collective wherever it is.

    Rows that are cast on their way, and combines, whose results are sums, are not checked.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
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
        return self._inner.combine(rows, handle, biases, combined)

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
        """See `CountingBackend`; the hashes' calls are counted too."""
        if not isinstance(self._inner, CountingBackend):
            raise NotImplementedError(f"statistics: {self.name} does not count")
        return self._inner.statistics()

    def _check(self, operation: str, sent: Rows, handle: DispatchHandle, arrived: Rows) -> None:
        """Raise a RuntimeError that names the first row that is not what its source hashed."""
        if sent.is_cast:
            return
        tokens = torch.arange(len(sent.x), device=sent.x.device)
        names = (self.rank << _TOKEN_BITS) + tokens + 1  # 0 is padding
        marks = torch.stack([hash_rows(sent.x), names], 1)
        plain = replace(sent, x=marks, scales=None, topk_weights=None, topk_idx=None)
        expected = self._inner.dispatch_again(plain, handle).x
        is_row = expected[:, 1] != 0
        wrong = (is_row & (hash_rows(arrived.x) != expected[:, 0])).nonzero()[:, 0]
        if len(wrong) == 0:
            return
        row = int(wrong[0])
        name = int(expected[row, 1]) - 1
        raise RuntimeError(
            f"{operation}: expected row {row} on rank {self.rank} to be as rank "
            f"{name >> _TOKEN_BITS} sent it (token {name & (1 << _TOKEN_BITS) - 1}), got other "
            f"bytes; {len(wrong)} of {int(is_row.sum())} rows came changed"
        )
