"""Debugging: low-latency rows that came changed are named.

Beside the backend that moves rows there is a second one, over which the same rows' hashes go in the
same calls: a call has its sending and its receiving half, and there may be two of them under way.
The experts' rows come back one by one over it, each with its hash, and their sum is compared with
what the combine has brought. E experts, R ranks, C the most tokens a rank may send, L local
experts, T tokens here, K top-k, H hidden.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ep_megatron import casts
from ep_megatron.backends.packed import (
    BLOCK,
    DISPATCH,
    LowLatencyBackend,
    LowLatencyCall,
    LowLatencyHandle,
    Packed,
    Waits,
)
from ep_megatron.backends.row_hashes import first_wrong, hash_or_zeros, hash_rows, is_same
from ep_megatron.layout import index_within

_Result = TypeVar("_Result")
_WORDS = BLOCK // 4  # int64 in the narrowest row there is


class CheckedPacked:
    """See `LowLatencyBackend`: another one, whose rows are checked.

    A rank that is masked between two calls is not compared.

    Args:
        inner: moves the rows.
        beside: of the same ranks, with the same settings; moves what is said of them.
    """

    def __init__(self, inner: LowLatencyBackend, beside: LowLatencyBackend) -> None:
        self._inner, self._beside = inner, beside
        self.num_ranks, self.rank = inner.num_ranks, inner.rank
        self.device_type = inner.device_type
        self._number_beside: dict[int, int] = {}  # of calls that lack their receiving half

    def send_dispatch(self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor) -> int:
        """See `LowLatencyBackend.send_dispatch`."""
        number = self._or_fail(call, lambda: self._inner.send_dispatch(call, x, topk_idx))
        data, scales = x, None
        if call.recipe is not None:
            data, scales = casts.quantize(x, call.recipe)
        words = torch.stack([hash_rows(data), hash_or_zeros(scales, data)], 1)
        marks = _words_call(call)
        self._number_beside[number] = self._beside.send_dispatch(marks, _as_row(words), topk_idx)
        return number

    def receive_dispatch(self, number: int, call: LowLatencyCall, packed: Packed) -> None:
        """See `LowLatencyBackend.receive_dispatch`."""
        marks = _words_call(call)
        words = Packed.empty(marks, self.num_ranks, packed.x.device)
        self._both(
            lambda: self._inner.receive_dispatch(number, call, packed),
            lambda: self._beside.receive_dispatch(self._number_beside.pop(number), marks, words),
        )
        for expert, ranges in enumerate(packed.layout_range.tolist()):
            for source, at in enumerate(ranges):
                rows = _rows_at(at)
                told = _rows_at(int(words.layout_range[expert, source]))
                if rows.stop - rows.start == told.stop - told.start:
                    self._compare(packed, words.x[expert, told], (expert, source, rows))

    def send_combine(
        self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor, handle: LowLatencyHandle
    ) -> int:
        """See `LowLatencyBackend.send_combine`."""
        rows, to = self._rows_home(x, handle)
        number = self._or_fail(call, lambda: self._inner.send_combine(call, x, topk_idx, handle))
        home = self._home_call(call)
        self._number_beside[number] = self._beside.send_dispatch(home, rows, to)
        return number

    def receive_combine(
        self,
        number: int,
        call: LowLatencyCall,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        waits: Waits,
    ) -> None:
        """See `LowLatencyBackend.receive_combine`."""
        home = self._home_call(call)
        came = Packed.empty(home, self.num_ranks, out.device)
        self._both(
            lambda: self._inner.receive_combine(number, call, topk_idx, topk_weights, out, waits),
            lambda: self._beside.receive_dispatch(self._number_beside.pop(number), home, came),
        )
        rows = came.x[0, : int(came.count[0])]
        x, words = rows[:, : call.hidden], _as_words(rows[:, call.hidden :])
        tokens, experts = words[:, 1], words[:, 2]
        found = first_wrong({"bytes": hash_rows(x) != words[:, 0]})
        if found is not None:
            token, expert = int(tokens[found[0]]), int(experts[found[0]])
            raise RuntimeError(
                f"{call.name}: expected the row of expert {expert} for token {token} on rank "
                f"{self.rank} to come as rank {expert * self.num_ranks // call.num_experts} sent "
                f"it, got other bytes; {found[2]} of {len(x)} rows came changed"
            )
        self._check_sums(call, (x, tokens, experts), topk_idx, topk_weights, out)

    def clean(self, call: LowLatencyCall) -> None:
        """See `LowLatencyBackend.clean`."""
        self._inner.clean(call)

    def combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.combine_buffer`."""
        return self._inner.combine_buffer(handle)

    def take_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.take_combine_buffer`."""
        return self._inner.take_combine_buffer(handle)

    def fail(self, operation: str, error: str) -> None:
        """See `LowLatencyBackend.fail`."""
        self._inner.fail(operation, error)
        self._beside.fail(operation, error)

    def mask(self, rank: int, is_masked: bool) -> None:
        """See `LowLatencyBackend.mask`."""
        self._inner.mask(rank, is_masked)
        self._beside.mask(rank, is_masked)

    def masks(self) -> list[int]:
        """See `LowLatencyBackend.masks`."""
        return self._inner.masks()

    def limit_threads(self, num_threads: int) -> None:
        """See `LowLatencyBackend.limit_threads`."""
        self._inner.limit_threads(num_threads)

    def interrupt(self) -> None:
        """See `LowLatencyBackend.interrupt`."""
        self._inner.interrupt()
        self._beside.interrupt()

    def close(self) -> None:
        """See `LowLatencyBackend.close`."""
        self._inner.close()
        self._beside.close()

    def _or_fail(self, call: LowLatencyCall, send: Callable[[], _Result]) -> _Result:
        """Return `send()`; where it fails, the others hear of it in the call beside too."""
        try:
            return send()
        except ValueError as error:
            with suppress(ValueError):
                self._beside.fail(call.name, str(error).removeprefix(f"{call.name}: "))
            raise

    def _both(self, receive: Callable[[], None], receive_beside: Callable[[], None]) -> None:
        """Receive both; a disagreement of the ranks is one of both calls."""
        try:
            receive()
        except ValueError:
            with suppress(ValueError):
                receive_beside()
            raise
        receive_beside()

    def _compare(self, packed: Packed, told: Tensor, where: tuple[int, int, slice]) -> None:
        """Raise unless the rows of one expert and source have the hashes `told [n, BLOCK]`."""
        expert, source, rows = where
        words, x = _as_words(told), packed.x[expert, rows]
        scales = None if packed.scales is None else packed.scales[expert, rows]
        wrong = {
            "bytes": hash_rows(x) != words[:, 0],
            "scales": hash_or_zeros(scales, x) != words[:, 1],
        }
        found = first_wrong(wrong)
        if found is None:
            return
        row, what, num_wrong = found
        raise RuntimeError(
            f"low_latency_dispatch: expected row {rows.start + row} of local expert {expert} on "
            f"rank {self.rank} to be as rank {source} sent it (token "
            f"{int(packed.src_info[expert, rows.start + row])}), got other {what}; {num_wrong} of "
            f"{len(x)} rows of that rank came changed"
        )

    def _home_call(self, call: LowLatencyCall) -> LowLatencyCall:
        """Return the call in which experts' rows go home: to one expert per rank, its source.

        Wider than the rows by the words on them; as many as a rank may get of all.
        """
        most = call.num_experts * call.num_max_dispatch_tokens_per_rank
        return LowLatencyCall(DISPATCH, most, call.hidden + BLOCK, self.num_ranks)

    def _rows_home(self, x: Tensor, handle: LowLatencyHandle) -> tuple[Tensor, Tensor]:
        """Return rows `[n, H + BLOCK]` with hash, token and expert, and their sources `[n, 1]`."""
        rows, words, to = [x.new_empty(0, x.shape[2])], [], []
        first = self.rank * len(x)
        for local, ranges in enumerate(handle.packed_recv_layout_range.tolist()):
            for source, at in enumerate(ranges):
                mine = x[local, _rows_at(at)]
                tokens = handle.packed_recv_src_info[local, _rows_at(at)].long()
                expert = torch.full_like(tokens, first + local)
                rows.append(mine)
                words.append(torch.stack([hash_rows(mine), tokens, expert], 1))
                to.append(torch.full_like(tokens, source))
        wide = torch.cat([torch.cat(rows), _as_row(torch.cat(words))], 1)
        return wide, torch.cat(to)[:, None]

    def _check_sums(
        self,
        call: LowLatencyCall,
        came: tuple[Tensor, Tensor, Tensor],
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
    ) -> None:
        """Raise unless `out [T, H]` is the weighted sum of rows, by token and expert, that came."""
        x, tokens, experts = came
        if call.use_logfmt:  # as they are sent there, and are added
            x = casts.decode_logfmt(casts.encode_logfmt(x.contiguous()))
        num_tokens, num_topk = topk_idx.shape
        # A token's rows of one expert, of which there may be several, come in the order of slots.
        names = _numbered(tokens * call.num_experts + experts)
        place = {name: row for row, name in enumerate(names)}
        masks, local = self.masks(), call.num_experts // self.num_ranks
        total, is_whole = torch.zeros(out.shape), torch.ones(num_tokens, dtype=torch.bool)
        flat = (torch.arange(num_tokens)[:, None] * call.num_experts + topk_idx).flatten()
        wanted = _numbered(flat.masked_fill(topk_idx.flatten() < 0, -1))
        at = torch.tensor([place.get(name, -1) for name in wanted], dtype=torch.int64)
        at = at.view(num_tokens, num_topk)
        ranks = topk_idx.clamp(min=0).long() // local
        is_there = (topk_idx >= 0) & (torch.tensor(masks)[ranks] == 0)
        for slot in range(num_topk):
            used = is_there[:, slot]
            is_whole &= ~used | (at[:, slot] >= 0)
            used = used & (at[:, slot] >= 0)
            total[used] += x[at[used, slot]].float() * topk_weights[used, slot, None]
        wrong = is_whole & ~is_same(out, total.to(out.dtype)).all(1)
        if wrong.any():
            token = int(wrong.nonzero()[0, 0])
            raise RuntimeError(
                f"{call.name}: expected token {token} on rank {self.rank} to be the sum of its "
                f"rows, got other bytes; {int(wrong.sum())} of {num_tokens} sums are wrong"
            )


def _numbered(names: Tensor) -> list[tuple[int, int]]:
    """Return (name, how many of the same came before) of each."""
    unique, inverse = names.unique(return_inverse=True)
    return list(zip(names.tolist(), index_within(inverse, len(unique)).tolist(), strict=True))


def _words_call(call: LowLatencyCall) -> LowLatencyCall:
    return call._replace(hidden=BLOCK, fp8=0)


def _rows_at(at: int) -> slice:
    """Return the rows of one expert and source from a word of `packed_recv_layout_range`."""
    return slice(at >> 32, (at >> 32) + (at & 0xFFFFFFFF))


def _as_row(words: Tensor) -> Tensor:
    """Return int64 `[n, w]` as bfloat16 `[n, BLOCK]`, whose bits nobody looks at on the way."""
    return pad(words, (0, _WORDS - words.shape[1])).view(torch.bfloat16)


def _as_words(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.int64)
