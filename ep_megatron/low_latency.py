"""The low-latency verbs of a Buffer: packed rows per local expert, and receive hooks.

Source: names, arguments and layouts follow DeepEP's `Buffer` (MIT). E experts, R ranks, C the most
tokens a rank may send, H hidden, T tokens here, K top-k.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ep_megatron.backends.packed import (
    CLEAN,
    COMBINE,
    DISPATCH,
    LowLatencyBackend,
    LowLatencyCall,
    LowLatencyHandle,
    Packed,
    ReplayedBackend,
    Waits,
)
from ep_megatron.calls import Calls
from ep_megatron.packed_arguments import (
    check_hook,
    check_logfmt,
    check_packed_handle,
    check_packed_rows,
    check_routing,
    check_stats,
    check_tensor,
    recipe_of,
)
from ep_megatron.statistics import CallCounts
from ep_megatron.streams import EventOverlap

Hook = Callable[[], None]
PackedRows = Tensor | tuple[Tensor, Tensor]


class ReceiveHook:
    """Waits for a call's rows and puts them in place; what a call returns as `hook`.

    A second call does nothing, or raises again what the first one raised. A call whose hook never
    runs keeps its place among the two that may be under way, and nothing else.
    """

    def __init__(self, receive: Callable[[], None]) -> None:
        self._receive: Callable[[], None] | None = receive
        self._error: Exception | None = None

    def __call__(self) -> None:
        """Receive. Collective; blocks."""
        receive, self._receive = self._receive, None
        if self._error is not None:
            raise self._error
        if receive is None:
            return
        try:
            receive()
        except Exception as error:
            self._error = error
            raise


class LowLatencyVerbs:
    """Dispatch and combine for small batches: fixed shapes, no exchange of counts beforehand.

    All verbs but the masks and `get_next_low_latency_combine_buffer` are collective and need a
    Buffer made with `low_latency_mode=True`. They come in the same order on all ranks. Bad
    arguments on one rank raise a ValueError on every rank: where it asks for the hook, from the
    hook. At most two calls may be under way, that is, lack their hook.
    """

    _calls: Calls
    _low_latency: LowLatencyBackend | None
    _packed_counts: CallCounts
    group_size: int
    enable_shrink: bool

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[PackedRows, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send every token to each of its experts.

        Args:
            x: `[T, H]` bfloat16, H a multiple of 128 (of 512 with `use_ue8m0`). Read
                before the call returns, or with `async_finish` before the event is complete.
            topk_idx: `[T, K]` int64 or int32, -1 where a slot is unused.
            num_max_dispatch_tokens_per_rank: C, the same on all ranks; T may be 0 to C. No expert
                may be named more than C times by one rank.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: `[E/R]` int32, the received rows are added to it.
            dispatch_wait_recv_cost_stats: `[R]` int64, nanoseconds spent waiting for each rank are
                added to it.
            use_fp8: rows arrive as e4m3 with a scale per 128 columns (see `fp8.quantize`).
            round_scale: scales are powers of two.
            use_ue8m0: their exponents, packed four to an int32; needs `round_scale`.
            async_finish: whether to queue the call and return an event.
            return_recv_hook: send now and return; `hook()` waits and receives. Not together with
                `async_finish`.

        Returns:
            recv_x: `[E/R, R*C, H]`, of which the first `recv_count[e]` rows are written: by source
                rank in ascending order, then token, then slot. With `use_fp8` a pair with the
                scales `[E/R, R*C, H/128]` float32 (int32 `[E/R, R*C, H/512]`), column-major in the
                last two dimensions. All are the caller's.
            recv_count: `[E/R]` int32.
            handle: for `low_latency_combine`.
            event: complete when the rows are there.
            hook: or None.

        Raises:
            ValueError: if an argument of one rank is not as above or ranks disagree.
            RuntimeError: if a rank stopped or did not come in time, unless `enable_shrink`.
        """
        name = "low_latency_dispatch"
        stats = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
        backend = self._backend_of(name)
        device = backend.device_type

        def check() -> LowLatencyCall:
            check_hook(name, async_finish, return_recv_hook)
            check_packed_rows(name, x, device)
            num_tokens, ranks = num_max_dispatch_tokens_per_rank, self.group_size
            check_routing(name, topk_idx, len(x), num_tokens, num_experts, ranks, device)
            check_stats(name, stats, num_experts // ranks, ranks, device)
            self._check_waits(name, stats[1])
            recipe = recipe_of(name, use_fp8, round_scale, use_ue8m0, x.shape[1])
            code = 0 if recipe is None else recipe.code
            return LowLatencyCall(DISPATCH, num_tokens, x.shape[1], num_experts, code)

        call = self._agreeable(name, check)
        packed = Packed.empty(call, self.group_size, x.device)

        def send() -> int:
            return backend.send_dispatch(call, x.detach().contiguous(), topk_idx.contiguous())

        def receive(number: int) -> None:
            backend.receive_dispatch(number, call, packed)
            if device == "cpu":  # to look at what a GPU has would be to wait for it
                self._count_waits(call, Waits.of_dispatch(call, packed, topk_idx))
            if stats[0] is not None:
                stats[0].add_(packed.count)
            if stats[1] is not None:
                stats[1].add_(packed.waited.to(stats[1].device))

        event, hook = self._run(name, send, receive, (x, topk_idx), async_finish, return_recv_hook)
        handle = LowLatencyHandle(packed.src_info, packed.layout_range, *call[1:4])
        recv_x = packed.x if packed.scales is None else (packed.x, packed.scales)
        return recv_x, packed.count, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle | tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Bring the experts' rows back to their tokens and sum them, weighted.

        Args:
            x: `[E/R, R*C, H]` bfloat16, rows as dispatch placed them. Read before the call returns,
                or with `async_finish` before the event is complete.
            topk_idx: `[T, K]`, as it was given to dispatch.
            topk_weights: `[T, K]` float32.
            handle: of that dispatch.
            use_logfmt: rows travel as 10-bit logarithms wherever the 128 columns of a block are
                all below 1 (see `logfmt`). Not together with `zero_copy`; on CPUs.
            zero_copy: the rows are in `get_next_low_latency_combine_buffer(handle)` already; of `x`
                only the shape is looked at. Other ranks read that buffer until the next call but
                one has begun: ask for a new one instead of writing to it again.
            async_finish: see `low_latency_dispatch`.
            return_recv_hook: likewise.
            out: `[T, H]` bfloat16, contiguous, for the result.
            combine_wait_recv_cost_stats: `[R]` int64, see `low_latency_dispatch`.

        Returns:
            combined_x: `[T, H]` bfloat16: the sum over slots in ascending order of weight times
                row, each product and each sum rounded to float32, from 0; rounded once more. Unused
                slots and experts of masked ranks are left out.
            event: complete when it is there.
            hook: or None.

        Raises:
            ValueError, RuntimeError: see `low_latency_dispatch`.
        """
        name = "low_latency_combine"
        backend = self._backend_of(name)
        device = backend.device_type
        stats = None, combine_wait_recv_cost_stats

        def check() -> LowLatencyCall:
            check_hook(name, async_finish, return_recv_hook)
            check_logfmt(name, use_logfmt, zero_copy, device)
            sizes = check_packed_handle(name, handle, self.group_size, device)
            num_tokens, hidden, num_experts = sizes
            local, rows = num_experts // self.group_size, self.group_size * num_tokens
            bf16, shape, ranks = torch.bfloat16, topk_idx.shape, self.group_size
            check_tensor(name, "x", x, (local, rows, hidden), bf16, device=device)
            length = shape[0] if topk_idx.ndim else 0
            check_routing(name, topk_idx, length, num_tokens, num_experts, ranks, device)
            check_tensor(name, "topk_weights", topk_weights, shape, torch.float32, device=device)
            if out is not None:
                check_tensor(name, "out", out, (length, hidden), bf16, dense=True, device=device)
            check_stats(name, stats, local, ranks, device)
            self._check_waits(name, stats[1])
            return LowLatencyCall(COMBINE, *sizes, use_logfmt=int(use_logfmt))

        call = self._agreeable(name, check)
        value = LowLatencyHandle(*handle)
        combined = x.new_empty(len(topk_idx), call.hidden) if out is None else out
        waits = Waits.zeros(self.group_size)

        def send() -> int:
            offered = x.detach().contiguous() if taken is None else taken
            return backend.send_combine(call, offered, topk_idx.contiguous(), value)

        def receive(number: int) -> None:
            idx, weights = topk_idx.contiguous(), topk_weights.detach().contiguous()
            backend.receive_combine(number, call, idx, weights, combined, waits)
            if device == "cpu":
                self._count_waits(call, waits)
            if stats[1] is not None:
                stats[1].add_(waits.waited.to(stats[1].device))

        # Now, and not when a queued call runs: by then it might be the next call's.
        taken = backend.take_combine_buffer(value) if zero_copy else None
        inputs = (topk_idx, topk_weights, *(() if zero_copy else (x,)))
        event, hook = self._run(name, send, receive, inputs, async_finish, return_recv_hook)
        return combined, event, hook

    def get_next_low_latency_combine_buffer(
        self, handle: LowLatencyHandle | tuple[Any, ...]
    ) -> Tensor:
        """Return bfloat16 `[E/R, R*C, H]` to write the rows of the next combine into; local.

        On the shared-memory backend other ranks read them where they are. The same until that
        combine begins.
        """
        name = "get_next_low_latency_combine_buffer"
        backend = self._backend_of(name)
        check_packed_handle(name, handle, self.group_size, backend.device_type)
        return backend.combine_buffer(LowLatencyHandle(*handle))

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Meet all ranks and find out whether they agree on sizes; nothing needs cleaning here."""
        name = "clean_low_latency_buffer"
        backend = self._backend_of(name)
        call = LowLatencyCall(CLEAN, num_max_dispatch_tokens_per_rank, hidden, num_experts)
        self._calls.run(name, lambda: backend.clean(call))

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, or take it back; local, and needs `enable_shrink`.

        A masked rank is neither waited for nor read from: its tokens do not arrive, and combine
        leaves its experts out. A rank that missed calls cannot be taken back: make a new Buffer.
        """
        name = "low_latency_update_mask_buffer"
        backend = self._masking_backend(name)
        if not 0 <= rank_to_mask < self.group_size or (rank_to_mask == backend.rank and mask):
            raise ValueError(
                f"{name}: expected rank_to_mask to be another rank of {self.group_size}, "
                f"got {rank_to_mask} on rank {backend.rank}"
            )
        backend.mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fill `mask_status [R]` int32: 1 for a rank that is masked, or has masked this one."""
        name = "low_latency_query_mask_buffer"
        backend = self._masking_backend(name)
        shape, device = (self.group_size,), backend.device_type
        check_tensor(name, "mask_status", mask_status, shape, torch.int32, device=device)
        mask_status.copy_(torch.tensor(backend.masks(), dtype=torch.int32))

    def low_latency_clean_mask_buffer(self) -> None:
        """Take back all masks of this rank; local."""
        backend = self._masking_backend("low_latency_clean_mask_buffer")
        for rank in range(self.group_size):
            backend.mask(rank, False)

    def low_latency_check(self) -> None:
        """Raise what replays of CUDA graphs that hold low-latency calls failed in; local.

        Waits for what the current stream has before. A replay has no host that waits for it: ranks
        that disagree, a bad `topk_idx`, a rank that does not come, or masks this one while it
        reads, leave counts and sums at zero, and are kept until this is called. Raises, once, for
        the first call that failed since the last look; so does the next call outside of a graph.

        Raises:
            ValueError, RuntimeError: as the call would have, had it not been captured.
        """
        backend = self._backend_of("low_latency_check")
        if isinstance(backend, ReplayedBackend):
            backend.check_replays()

    def _check_waits(self, name: str, waited: Tensor | None) -> None:
        """Raise if nobody can know how long a call waits, and the caller wants to."""
        backend = self._backend_of(name)
        if waited is not None and isinstance(backend, ReplayedBackend) and backend.is_capturing():
            raise ValueError(
                f"{name}: expected the wait statistics to be None while a CUDA graph is captured, "
                "got a tensor; no host knows how long a replay waits"
            )

    def _run(
        self,
        name: str,
        send: Callable[[], int],
        receive: Callable[[int], None],
        inputs: Sequence[Tensor],
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[EventOverlap, Hook | None]:
        backend = self._backend_of(name)
        if not return_recv_hook:
            event = self._calls.run(
                name,
                lambda: receive(send()),
                inputs=inputs,
                async_finish=async_finish,
                fail=backend.fail,
            )
            return event, None
        numbers: list[int] = []
        event = self._calls.run(
            name, lambda: numbers.append(send()), inputs=inputs, fail=backend.fail
        )
        return event, ReceiveHook(lambda: self._receive(name, receive, numbers[0]))

    def _count_waits(self, call: LowLatencyCall, waits: Waits) -> None:
        """Count a call: what it waited for, and bytes sent (dispatch) or read (combine) by rank."""
        seconds = [1e-9 * nanoseconds for nanoseconds in waits.waited.tolist()]
        self._packed_counts.add_waits(call.name, seconds, waits.num_bytes.tolist())

    def _receive(self, name: str, receive: Callable[[int], None], number: int) -> None:
        self._calls.run(name, lambda: receive(number))

    def _agreeable(self, name: str, check: Callable[[], LowLatencyCall]) -> LowLatencyCall:
        """Return `check()`; if it fails here, let the other ranks hear of it before raising."""
        try:
            return check()
        except ValueError as error:
            backend, text = self._backend_of(name), str(error).removeprefix(f"{name}: ")
            self._calls.run(name, lambda: backend.fail(name, text))
            raise

    def _backend_of(self, name: str) -> LowLatencyBackend:
        if self._low_latency is None:
            raise ValueError(
                f"{name}: expected a Buffer made with low_latency_mode=True, got one without"
            )
        return self._low_latency

    def _masking_backend(self, name: str) -> LowLatencyBackend:
        backend = self._backend_of(name)
        if not self.enable_shrink:
            raise ValueError(f"{name}: expected a Buffer with enable_shrink=True, got one without")
        return backend
