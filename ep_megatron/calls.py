"""In which order, and on which thread, the calls of one Buffer run.

A synchronous call runs on the caller's thread, behind all asynchronous ones; those run one after
the other on the communication stream. So all ranks make them in the order in which they were asked
for, and what one call needs of the ranks never interleaves with another.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ep_megatron import recompute
from ep_megatron.backends.base import Backend, Received, Routing, Rows, SyncFreeBackend
from ep_megatron.backends.casting import copy_rows
from ep_megatron.backends.packed import LowLatencyBackend
from ep_megatron.handle import AnyHandle, CapacityHandle, DeviceHandle, DispatchHandle, exact
from ep_megatron.settings import Settings
from ep_megatron.streams import CPUStream, EventHandle, EventOverlap, after_all, handle_of

_Sizes = TypeVar("_Sizes")
_Announce = Callable[[tuple[Rows, DispatchHandle]], None]
Event = EventHandle | EventOverlap | None


class Calls:
    """Runs calls of a backend in order. Not thread-safe in which call comes first.

    Args:
        backend: gets one call at a time.
        low_latency: likewise, in the same order.

    Attributes:
        after: called after each call that ended without an error, on its thread.
    """

    def __init__(self, backend: Backend, low_latency: LowLatencyBackend | None = None) -> None:
        self._backend, self._low_latency = backend, low_latency

        def interrupt() -> None:
            backend.interrupt()
            if low_latency is not None:
                low_latency.interrupt()

        self.stream = CPUStream("ep_megatron communication", interrupt)
        self._one_at_a_time = threading.Lock()
        self._num_threads: int | None = None  # that the backend knows of
        self.after: Callable[[], None] = _nothing

    def run(
        self,
        operation: str,
        call: Callable[[], object],
        *,
        inputs: Sequence[Tensor | None] = (),
        previous_event: Event = None,
        async_finish: bool = False,
        at_end: Callable[[], None] | None = None,
        at_start: Callable[[], object] | None = None,
        fail: Callable[[str, str], None] | None = None,
    ) -> EventOverlap:
        """Run `call`, or queue it and return its event at once.

        Args:
            operation: for messages.
            call: makes one call of the backend.
            inputs: what the call reads; must keep its memory until the call has run.
            previous_event: waited for first. If it brings an error, the other ranks, who are in
                this call, hear of it.
            async_finish: whether to queue.
            at_end: called last, whether or not there was an error.
            at_start: called behind `previous_event`; an error is treated alike.
            fail: how the other ranks hear of an error, if not by the backend's `fail`.
        """
        is_queued = async_finish and _device_of(inputs).type == "cpu"
        wait_for = handle_of(previous_event)
        first: list[Callable[[], object]] = []
        if wait_for is not None:
            first.append(wait_for.current_stream_wait)
        if at_start is not None:
            first.append(at_start)
        if is_queued:
            first.append(_memory_check(operation, inputs))

        def run() -> None:
            try:
                with self._one_at_a_time:
                    try:
                        for step in first:
                            step()
                    except Exception as error:
                        self._tell(operation, error, fail or self._backend.fail)
                        raise
                    if Settings.num_sms != self._num_threads:
                        self._num_threads = Settings.num_sms
                        self._backend.limit_threads(self._num_threads)
                        if self._low_latency is not None:
                            self._low_latency.limit_threads(self._num_threads)
                    call()
                self.after()
            finally:
                if at_end is not None:
                    at_end()

        if is_queued:
            return EventOverlap(self.stream.submit(_as_here(run), operation))
        # On a GPU the caller's stream orders everything; the host has nothing to do behind it.
        self.stream.synchronize()
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            with torch.no_grad():
                run()
        else:
            run()
        return EventOverlap(EventHandle() if async_finish else None)

    def run_local(
        self,
        operation: str,
        call: Callable[[], object],
        like: Tensor,
        previous_event: Event,
        async_finish: bool,
    ) -> EventOverlap:
        """Run `call`, which no other rank takes part in, or queue it where `like` is on a CPU."""
        wait_for = handle_of(previous_event)

        def run() -> None:
            if wait_for is not None:
                wait_for.current_stream_wait()
            call()

        if async_finish and like.device.type == "cpu":
            return EventOverlap(self.stream.submit(run, operation))
        run()
        return EventOverlap(EventHandle() if async_finish else None)

    def begin(
        self,
        operation: str,
        call: Callable[[Callable[[_Sizes], None] | None], _Sizes],
        *,
        inputs: Sequence[Tensor | None],
        previous_event: Event,
        async_finish: bool,
    ) -> tuple[_Sizes, EventOverlap]:
        """Run a call whose result has sizes that only the other ranks know; see `run`.

        Returns once the result is allocated, which is before it is filled if `async_finish`.

        `call` gets a function to call with what it will return as soon as that is allocated, or
        None where nobody waits for that moment; it returns the same.
        """
        result: list[_Sizes] = []
        if not async_finish:
            event = self.run(
                operation,
                lambda: result.append(call(None)),
                inputs=inputs,
                previous_event=previous_event,
            )
            return result[0], event
        is_known = threading.Event()

        def announce(sizes: _Sizes) -> None:
            result.append(sizes)
            is_known.set()

        def run() -> None:
            sizes = call(announce)
            if not result:
                result.append(sizes)

        event = self.run(
            operation,
            run,
            inputs=inputs,
            previous_event=previous_event,
            async_finish=True,
            at_end=is_known.set,
        )
        self.stream.block_on(is_known)
        if not result:
            event.current_stream_wait()  # raises what kept it from a result
        return result[0], event

    def dispatch(
        self, rows: Rows, routing: Routing, previous_event: Event, async_finish: bool
    ) -> tuple[Rows, DispatchHandle, EventOverlap]:
        """Run a fresh dispatch; returns once its counts are known."""

        def call(announce: _Announce | None) -> tuple[Rows, DispatchHandle]:
            tell = None if announce is None else lambda *planned: announce(planned)
            return self._backend.dispatch(rows, routing, tell)

        (received, handle), event = self.begin(
            "dispatch",
            call,
            inputs=(*rows.tensors(), routing.topk_idx),
            previous_event=previous_event,
            async_finish=async_finish,
        )
        return received, handle, event

    def dispatch_within(
        self, rows: Rows, routing: Routing, previous_event: Event, async_finish: bool
    ) -> tuple[Rows, CapacityHandle, EventOverlap]:
        """Run a fresh dispatch into `num_worst_tokens` rows, whose counts nobody waits for."""
        backend = self._backend
        if isinstance(backend, SyncFreeBackend):
            (received, on_device), event = self.begin(
                "dispatch",
                lambda _announce: backend.dispatch_within(rows, routing),
                inputs=(*rows.tensors(), routing.topk_idx),
                previous_event=previous_event,
                async_finish=async_finish,
            )
            return received, on_device, event
        capacity, topk_idx = routing.num_worst_tokens, routing.topk_idx
        ranks = self._backend.rank, self._backend.num_ranks
        handle = CapacityHandle(topk_idx, routing.num_experts, ranks, capacity, routing.expand)
        received = _new_received(rows, handle)
        if not routing.expand:
            idx = topk_idx.new_full((capacity, handle.num_topk), -1)
            received = replace(received, topk_idx=idx)

        def call() -> None:
            arrived, exact_handle = self._backend.dispatch(rows, routing)
            handle.settle(exact_handle)
            copy_rows(received, arrived)

        event = self.run(
            "dispatch",
            call,
            inputs=(*rows.tensors(), topk_idx),
            previous_event=previous_event,
            async_finish=async_finish,
        )
        return received, handle, event

    def dispatch_again(
        self, rows: Rows, handle: AnyHandle, previous_event: Event, async_finish: bool
    ) -> tuple[Rows, EventOverlap]:
        """Run a cached dispatch; its outputs are filled later if `async_finish`."""
        backend = self._backend
        if isinstance(handle, DeviceHandle) and isinstance(backend, SyncFreeBackend):
            return self.begin(
                "cached dispatch",
                lambda _announce: backend.dispatch_again_within(rows, handle),
                inputs=rows.tensors(),
                previous_event=previous_event,
                async_finish=async_finish,
            )
        received: Received | None = None
        if isinstance(handle, CapacityHandle):
            arrived = [_new_received(rows, handle)]
        else:
            if async_finish:
                received = self._backend.new_received(rows, handle)
            arrived = [] if received is None else [received.rows]

        def call() -> None:
            new = self._backend.dispatch_again(rows, exact(handle), received)
            if isinstance(handle, CapacityHandle):
                copy_rows(arrived[0], new)
            else:
                arrived.append(new)

        event = self.run(
            "cached dispatch",
            call,
            inputs=rows.tensors(),
            previous_event=previous_event,
            async_finish=async_finish,
            at_start=lambda: exact(handle),
        )
        return arrived[0], event

    def combine(
        self,
        rows: Rows,
        handle: AnyHandle,
        biases: Sequence[Tensor],
        previous_event: Event,
        async_finish: bool,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Run a combine; its outputs are filled later if `async_finish`."""
        backend = self._backend
        combined = backend.new_combined(rows, handle)

        def call() -> None:
            if isinstance(handle, DeviceHandle) and isinstance(backend, SyncFreeBackend):
                backend.combine_within(rows, handle, biases, combined)
                return
            exact_handle = exact(handle)
            num_rows, weights = exact_handle.num_recv_rows, rows.topk_weights
            there = rows
            if num_rows != rows.x.shape[0]:
                weights = None if weights is None else weights[:num_rows]
                there = replace(rows, x=rows.x[:num_rows], topk_weights=weights)
            backend.combine(there, exact_handle, biases, combined)

        event = self.run(
            "combine",
            call,
            inputs=(*rows.tensors(), *biases),
            previous_event=previous_event,
            async_finish=async_finish,
            at_start=None if isinstance(handle, DeviceHandle) else lambda: exact(handle),
        )
        return *combined, event

    def keep(
        self,
        routing: Routing,
        received: Rows,
        handle: AnyHandle,
        event: EventOverlap,
        async_finish: bool,
    ) -> EventOverlap:
        """Keep a fresh dispatch for recomputation; return the event behind which it is kept."""
        idx = received.topk_idx
        if idx is not None:
            # A copy, as received rows may be views of the same memory.
            theirs, idx = idx, torch.empty_like(idx)
            copied = self.run_local(
                "dispatch", functools.partial(idx.copy_, theirs), idx, None, async_finish
            )
            event = EventOverlap(after_all(event, copied))
        recompute.keep(recompute.KeptDispatch(weakref.ref(self), routing.copy(), idx, handle))
        return event

    def fail(self, operation: str, error: str, async_finish: bool) -> None:
        """Tell the other ranks, in turn, that this one cannot take part in this call."""
        self.run(operation, lambda: self._backend.fail(operation, error), async_finish=async_finish)

    @staticmethod
    def _tell(operation: str, error: Exception, fail: Callable[[str, str], None]) -> None:
        """Report `error` to the other ranks; if that fails too, the first error is the cause."""
        try:
            fail(operation, str(error).removeprefix(f"{operation}: "))
        except RuntimeError as second:
            raise error from second


def _nothing() -> None:
    """Stand for what nobody asked for."""


def _device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))


def _memory_check(operation: str, inputs: Sequence[Tensor | None]) -> Callable[[], None]:
    """Return a check that the inputs, which it keeps alive, still have their memory."""
    held = [tensor.untyped_storage() for tensor in inputs if tensor is not None]
    sizes = [storage.nbytes() for storage in held]

    def check() -> None:
        if any(s.nbytes() < size for s, size in zip(held, sizes, strict=True)):
            raise ValueError(
                f"{operation}: expected the inputs to keep their memory until the event is "
                "complete, got a storage that was resized; wait before freeing it"
            )

    return check


def _as_here(function: Callable[[], None]) -> Callable[[], None]:
    """Return `function` for another thread: in this thread's inference mode, without gradients."""
    mode = torch.is_inference_mode_enabled()

    def run() -> None:
        with torch.inference_mode(mode), torch.no_grad():
            function()

    return run


def _new_received(rows: Rows, handle: CapacityHandle) -> Rows:
    capacity, weights = handle.num_worst_tokens, rows.topk_weights
    if weights is not None:
        columns = () if handle.expand else (handle.num_topk,)
        weights = weights.new_zeros(capacity, *columns)
    return Rows(*rows.new_arrived(capacity), weights)
