"""Low-latency calls over torch.distributed's gloo, in plain torch: the reference.

A sending half posts a header and one message of rows to every rank; the receiving half waits for
the headers, checks that the ranks agree, and then takes the rows. CPU tensors only.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import casts
from ep_megatron.arguments import check_topk_range
from ep_megatron.backends.base import PeerReport
from ep_megatron.backends.meeting import MAX_ERROR_BYTES, Meeting, check_process, check_working
from ep_megatron.backends.packed import (
    NUM_FIELDS,
    LowLatencyCall,
    LowLatencyHandle,
    Packed,
    Waits,
    check_low_latency_agreement,
    other_routing,
    too_many_pending,
)
from ep_megatron.backends.packed_message import as_bytes, as_ints, combine_message, combine_rows
from ep_megatron.layout import index_within
from ep_megatron.packed_arguments import check_counts

_HEADER_BYTES = 8 * (NUM_FIELDS + 1) + MAX_ERROR_BYTES
_NUM_TAGS = 1 << 20
_SECONDS_TO_LEAVE = 5.0


@dataclass
class _Pending:
    """A call whose receiving half has not run: headers on their way, own message to oneself."""

    headers: dict[int, tuple[Tensor, Any]]
    own: tuple[Tensor, Tensor]


@dataclass
class _Sent:
    """What was posted in a call; gloo reads the tensors until the works are done."""

    works: list[tuple[int, Tensor, Any]] = field(default_factory=list)


class PackedGroup:
    """See `LowLatencyBackend`. Collective constructor.

    Args:
        group: the ranks.
        timeout: seconds to wait for the others in one call.
        enable_shrink: whether a rank that has ended is masked instead of an error. A rank that is
            only late is an error all the same: gloo closes all connections with the deadline.
    """

    device_type = "cpu"

    def __init__(self, group: dist.ProcessGroup, timeout: float, enable_shrink: bool) -> None:
        self._broken = "it was never made"
        self._timeout, self._enable_shrink = timeout, enable_shrink
        self._meeting = Meeting(group, timeout, is_private=True)
        self._gloo, self.rank = self._meeting.gloo, self._meeting.rank
        self.num_ranks = self._meeting.num_ranks
        self._num_calls, self._broken, self._process = 0, "", os.getpid()
        self._last_calls = ["has made no low-latency call yet"] * self.num_ranks
        self._masked = [0] * self.num_ranks
        self._pending: dict[int, _Pending] = {}
        self._sent: dict[int, _Sent] = {}
        self._next_buffer: Tensor | None = None

    def send_dispatch(self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor) -> int:
        """See `LowLatencyBackend.send_dispatch`."""
        self._or_fail(call.name, lambda: check_counts(call.name, topk_idx, call))
        local = call.num_experts // self.num_ranks
        rows, recipe = x, call.recipe
        if recipe is not None:
            data, scales = casts.quantize(x, recipe)
            rows = torch.cat([as_bytes(data), as_bytes(scales.contiguous())], 1)
        flat = topk_idx.reshape(-1).to(torch.int64)
        slots = torch.argsort(torch.where(flat < 0, call.num_experts, flat), stable=True)
        slots = slots[: int((flat >= 0).sum())]
        tokens = slots // max(topk_idx.shape[1], 1)
        counts = torch.bincount(flat[slots], minlength=call.num_experts)
        ends = counts.cumsum(0).tolist()
        messages = []
        for rank in range(self.num_ranks):
            begin = ends[rank * local - 1] if rank else 0
            mine = tokens[begin : ends[(rank + 1) * local - 1]]
            own_counts = counts[rank * local : (rank + 1) * local]
            messages.append(
                [own_counts.to(torch.int32), mine.to(torch.int32), as_bytes(rows[mine])]
            )
        return self._send(call, messages)

    def receive_dispatch(self, number: int, call: LowLatencyCall, packed: Packed) -> None:
        """See `LowLatencyBackend.receive_dispatch`."""
        messages = self._receive(number, call, packed.waited)
        local = call.num_experts // self.num_ranks
        capacity = self.num_ranks * call.num_max_dispatch_tokens_per_rank
        width = call.hidden * packed.x.element_size()
        num_scales = 0 if packed.scales is None else packed.scales.shape[2]
        used = [0] * local
        for source, message in sorted(messages.items()):
            counts = as_ints(message[: 4 * local]).tolist()
            num_rows = sum(counts)
            tokens = as_ints(message[4 * local : 4 * (local + num_rows)])
            rows = message[4 * (local + num_rows) :].view(num_rows, width + 4 * num_scales)
            at = 0
            for expert, count in enumerate(counts):
                begin, end = used[expert], used[expert] + count
                assert end <= capacity
                mine = slice(at, at + count)
                packed.src_info[expert, begin:end] = tokens[mine]
                packed.layout_range[expert, source] = begin << 32 | count
                data = rows[mine, :width].contiguous()
                as_bytes(packed.x[expert, begin:end]).copy_(data)
                if packed.scales is not None:
                    words = rows[mine, width:].contiguous().view(packed.scales.dtype)
                    packed.scales[expert, begin:end] = words
                used[expert], at = end, at + count
        packed.count.copy_(torch.tensor(used, dtype=torch.int32))

    def send_combine(
        self, call: LowLatencyCall, x: Tensor, topk_idx: Tensor, handle: LowLatencyHandle
    ) -> int:
        """See `LowLatencyBackend.send_combine`."""
        self._or_fail(call.name, lambda: check_topk_range(call.name, topk_idx, call.num_experts))
        layout = handle.packed_recv_layout_range
        counts, begins = layout & 0xFFFFFFFF, layout >> 32
        messages = []
        for rank in range(self.num_ranks):
            places = zip(begins[:, rank].tolist(), counts[:, rank].tolist(), strict=True)
            parts = [x[expert, b : b + n] for expert, (b, n) in enumerate(places)]
            messages.append(combine_message(call, counts[:, rank], torch.cat(parts)))
        return self._send(call, messages)

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
        messages = self._receive(number, call, waits.waited)
        local = call.num_experts // self.num_ranks
        flat = topk_idx.reshape(-1).to(torch.int64)
        expected = torch.bincount(flat[flat >= 0], minlength=call.num_experts).view(-1, local)
        rows, starts, other = [], torch.zeros(call.num_experts, dtype=torch.int64), []
        num_rows, is_there = 0, torch.zeros(self.num_ranks, dtype=torch.bool)
        for rank, message in sorted(messages.items()):
            counts, those = combine_rows(call, local, message)
            if not torch.equal(counts, expected[rank]):
                other.append(rank)
                continue
            starts[rank * local : (rank + 1) * local] = num_rows + counts.cumsum(0) - counts
            rows.append(those)
            num_rows, is_there[rank] = num_rows + len(those), True
            waits.num_bytes[rank] += len(message) - 4 * local
        if other:
            raise other_routing(call.name, other)
        x = torch.cat(rows) if rows else torch.empty(0, call.hidden)
        within = index_within(flat, call.num_experts)
        place = (starts[flat.clamp(min=0)] + within).view(topk_idx.shape)
        is_used = (topk_idx >= 0) & is_there[topk_idx.clamp(min=0).to(torch.int64) // local]
        total = torch.zeros(out.shape)
        for slot in range(topk_idx.shape[1]):
            used = is_used[:, slot]
            addends = x[place[used, slot]].float() * topk_weights[used, slot, None]
            total[used] += addends
        out.copy_(torch.where(total.isnan(), torch.nan, total))

    def clean(self, call: LowLatencyCall) -> None:
        """See `LowLatencyBackend.clean`."""
        number = self._send(call, [[] for _ in range(self.num_ranks)])
        self._receive(number, call, torch.zeros(self.num_ranks, dtype=torch.int64))

    def combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.combine_buffer`. Ordinary memory: nothing is saved by it here."""
        rows = self.num_ranks * handle.num_max_dispatch_tokens_per_rank
        shape = (handle.num_experts // self.num_ranks, rows, handle.hidden)
        if self._next_buffer is None or self._next_buffer.shape != shape:
            self._next_buffer = torch.empty(shape, dtype=torch.bfloat16)
        return self._next_buffer

    def take_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """See `LowLatencyBackend.take_combine_buffer`."""
        buffer, self._next_buffer = self.combine_buffer(handle), None
        return buffer

    def fail(self, operation: str, error: str) -> None:
        """See `LowLatencyBackend.fail`."""
        number = self._send(None, [[] for _ in range(self.num_ranks)], operation, error)
        call = LowLatencyCall(0, 0, 0, 0)
        try:
            self._receive(number, call, torch.zeros(self.num_ranks, dtype=torch.int64))
        except ValueError:
            return  # the others' copy of the error this rank is about to raise

    def mask(self, rank: int, is_masked: bool) -> None:
        """See `LowLatencyBackend.mask`."""
        self._masked[rank] = int(is_masked)

    def masks(self) -> list[int]:
        """See `LowLatencyBackend.masks`. Masks of other ranks are not known here."""
        return list(self._masked)

    def limit_threads(self, num_threads: int) -> None:
        """See `LowLatencyBackend.limit_threads`. The threads are torch's."""

    def interrupt(self) -> None:
        """See `LowLatencyBackend.interrupt`."""
        self._broken = self._broken or "a call was interrupted"
        self._meeting.interrupt()

    def close(self) -> None:
        """See `LowLatencyBackend.close`. The connections end with the object."""
        self._let_go()
        self._broken = self._broken or "it was destroyed"

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._let_go()

    def _let_go(self) -> None:
        """Give what was sent last a moment to leave: others may still be about to receive it."""
        if self._broken or os.getpid() != self._process:
            return
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        for sent in self._sent.values():
            for _, _, work in sent.works:
                with contextlib.suppress(RuntimeError):
                    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        self._sent.clear()

    def _or_fail(self, name: str, check: Callable[[], None]) -> None:
        """Run `check()`; if it fails, let the other ranks hear of it before raising."""
        try:
            check()
        except ValueError as error:
            self.fail(name, str(error).removeprefix(f"{name}: "))
            raise

    def _send(
        self,
        call: LowLatencyCall | None,
        messages: list[list[Tensor]],
        name: str = "",
        error: str = "",
    ) -> int:
        """Post this call's header and `messages` by destination; return its number."""
        name = name or (call.name if call is not None else "")
        check_working(name, self._broken)
        check_process(name, self._process)
        number = self._num_calls + 1
        if number - 2 in self._pending:
            raise too_many_pending(name)
        deadline = time.monotonic() + self._timeout
        self._wait_each(name, self._sent.pop(number - 2, _Sent()).works, deadline)
        self._num_calls = number
        sent = self._sent[number] = _Sent()
        headers: dict[int, tuple[Tensor, Any]] = {}
        text = error.encode()[:MAX_ERROR_BYTES].ljust(MAX_ERROR_BYTES, b"\0")
        tag = 2 * (number % _NUM_TAGS)
        own, lost = (torch.empty(0), torch.empty(0)), {}
        for step in range(self.num_ranks):
            peer = (self.rank + step) % self.num_ranks
            body = torch.cat([as_bytes(part).flatten() for part in messages[peer]] or [_NOTHING])
            fields = [*(call or (0,) * NUM_FIELDS), body.numel()]
            numbers = torch.tensor(fields, dtype=torch.int64).view(torch.uint8)
            header = torch.cat([numbers, torch.frombuffer(bytearray(text), dtype=torch.uint8)])
            if peer == self.rank:
                own = (header, body)
                continue
            if self._masked[peer]:
                continue
            try:
                incoming = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
                headers[peer] = (incoming, self._gloo.recv([incoming], peer, tag))
                sent.works.append((peer, header, self._gloo.send([header], peer, tag)))
                if body.numel():
                    sent.works.append((peer, body, self._gloo.send([body], peer, tag + 1)))
            except RuntimeError as broken:  # the connection is gone already
                lost[peer] = str(broken)
        self._lose(name, lost)
        self._pending[number] = _Pending(headers, own)
        return number

    def _receive(self, number: int, call: LowLatencyCall, waited: Tensor) -> dict[int, Tensor]:
        """Return every rank's message to this one, by rank; raise where they do not agree."""
        pending = self._pending.pop(number)
        deadline = time.monotonic() + self._timeout
        tag = 2 * (number % _NUM_TAGS) + 1
        headers = [(peer, header, work) for peer, (header, work) in pending.headers.items()]
        answers = {self.rank: pending.own[0]}
        answers |= self._wait_each(call.name, headers, deadline, waited)
        split = 8 * (NUM_FIELDS + 1)
        messages, works, reports = {self.rank: pending.own[1]}, [], {}
        lost: dict[int, str] = {}
        for peer, header in answers.items():
            numbers = header[:split].clone().view(torch.int64).tolist()
            text = bytes(header[split:].tolist()).rstrip(b"\0").decode(errors="replace")
            reports[peer] = PeerReport(numbers[:-1], text)
            if peer == self.rank:
                continue
            self._last_calls[peer] = f"last low-latency call {number}, {call.name}"
            messages[peer] = torch.empty(numbers[-1], dtype=torch.uint8)
            try:
                if numbers[-1]:
                    works.append(
                        (peer, messages[peer], self._gloo.recv([messages[peer]], peer, tag))
                    )
            except RuntimeError as broken:
                lost[peer] = str(broken)
        self._lose(call.name, lost)
        # Rows are taken even if the ranks do not agree: nothing is left behind for the next call.
        self._wait_each(call.name, works, deadline)
        for peer in [p for p in messages if self._masked[p]]:
            messages.pop(peer)
            reports.pop(peer)
        check_low_latency_agreement(call.name, reports, self.num_ranks)
        return messages

    def _wait_each(
        self,
        name: str,
        works: Sequence[tuple[int, Tensor, Any]],
        deadline: float,
        waited: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Return the tensors of works that were done, by rank; mask or name the other ranks."""
        done: dict[int, Tensor] = {}
        gone: dict[int, str] = {}
        late: dict[int, str] = {}

        def wait() -> None:
            for peer, tensor, work in works:
                start = time.monotonic_ns()
                if self._masked[peer] or peer in gone or peer in late:
                    continue
                try:
                    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                    done[peer] = tensor
                except RuntimeError as error:
                    (late if time.monotonic() >= deadline else gone)[peer] = str(error)
                if waited is not None:
                    waited[peer] += time.monotonic_ns() - start

        if works:
            self._meeting.wait(wait, self.interrupt)
        self._lose(name, late | gone, is_late=bool(late))
        return done

    def _lose(self, name: str, reasons: dict[int, str], *, is_late: bool = False) -> None:
        """Mask ranks that have ended, where that is allowed; raise otherwise."""
        reasons = {peer: why for peer, why in reasons.items() if not self._masked[peer]}
        if not reasons:
            return
        if self._enable_shrink and not is_late:
            for peer in reasons:
                self._masked[peer] = 1
            return
        self._broken = f"rank {', '.join(map(str, reasons))} did not come"
        lines = "; ".join(
            f"rank {r}: {self._last_calls[r]}; {why.splitlines()[0][:200]}"
            for r, why in reasons.items()
        )
        raise RuntimeError(
            f"{name}: rank {self.rank} expected all {self.num_ranks} ranks within "
            f"{self._timeout:g} s in low-latency call {self._num_calls}, got no answer from rank "
            f"{', '.join(map(str, reasons))} ({lines}); make a new Buffer once all ranks are back"
        )


_NOTHING = torch.empty(0, dtype=torch.uint8)
