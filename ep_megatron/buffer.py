"""Buffer: dispatch and combine with DeepEP's names, over any backend.

Source: argument names, defaults and meanings follow DeepEP's `Buffer` (MIT), so that code written
for it runs; what goes beyond it is keyword-only.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import backends, layout, recompute
from ep_megatron.arguments import (
    check_topk_idx,
    check_topk_range,
    combine_rows,
    dispatch_rows,
)
from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.backends.packed import LowLatencyBackend
from ep_megatron.calls import Calls
from ep_megatron.communicator import group_of
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import AnyHandle
from ep_megatron.low_latency import LowLatencyVerbs
from ep_megatron.settings import Settings
from ep_megatron.streams import CPUStream, EventHandle, EventOverlap
from ep_megatron.watched import Watched

_Checked = TypeVar("_Checked")
LayoutResult = tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]


class Buffer(LowLatencyVerbs, Watched, Settings):
    """Dispatch and combine for the ranks of one process group.

    Collective constructor. One Buffer serves any number of layers and micro-batches at a time:
    what a dispatch leaves for its combine is in the handle. A call releases the GIL while it waits
    and moves rows, and hears Ctrl-C. With `async_finish` it is queued on the Buffer's communication
    stream, which on a CPU is a worker thread, and its outputs are filled once its event is complete
    (docs/api.md, Asynchronous calls). Calls of one Buffer must come in the same order on all ranks.
    Bad arguments on one rank raise a ValueError on every rank, and the Buffer stays usable; a rank
    that stops raises a RuntimeError that names it on the others, within `config.timeout`.

    Args:
        group: the expert-parallel ranks; any size from 1 up. None with `comm`.
        num_nvl_bytes: bytes made ready at the start; on a CPU the first size of the shared-memory
            arena, which grows when needed (0: `config.initial_bytes`).
        num_rdma_bytes: of the low-latency verbs on a GPU, the same on all ranks and fixed for good:
            see `get_low_latency_rdma_size_hint` (0: `config.initial_bytes`). Not needed on a CPU.
        low_latency_mode: whether to make what the low-latency verbs need.
        num_qps_per_rank: accepted; a setting of RDMA.
        allow_nvlink_for_low_latency_mode: likewise.
        allow_mnnvl: likewise.
        explicitly_destroy: accepted; `destroy` is never needed for a clean exit.
        enable_shrink: low-latency verbs mask a rank that has ended or is late instead of raising.
        comm: a communicator like mpi4py's in place of `group`; see `communicator.group_of`.
        backend: short for `config=BufferConfig(backend=...)`.
        config: resources and limits.

    Raises:
        ValueError: if the backend cannot serve this group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        backend: str | None = None,
        config: BufferConfig | None = None,
    ) -> None:
        self.config = backends.resolve(config, backend=backend, initial_bytes=num_nvl_bytes)
        if group is None:
            if comm is None:
                raise ValueError("Buffer: expected group or comm, got neither")
            group = group_of(comm, self.config.timeout)
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.enable_shrink = enable_shrink
        rows_backend = backends.choose(group, self.config)
        packed = None
        if low_latency_mode:
            packed = backends.choose_low_latency(
                group, self.config, rows_backend, num_rdma_bytes, enable_shrink=enable_shrink
            )
        self._serve(rows_backend, packed)

    def _serve(self, backend: Backend, low_latency: LowLatencyBackend | None) -> None:
        """Begin to take calls for these backends."""
        self._backend, self._low_latency = backend, low_latency
        self._calls = Calls(self._backend, self._low_latency)
        self.rank, self.group_size = self._backend.rank, self._backend.num_ranks
        self._watch()

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    def destroy(self) -> None:
        """Free the Buffer's memory now, behind queued calls.

        Local; tensors received through the Buffer stay valid.
        """
        self._calls.stream.synchronize()
        self._calls.stream.close()
        self._backend.close()
        if self._low_latency is not None:
            self._low_latency.close()

    def get_comm_stream(self) -> CPUStream:
        """Return the stream that asynchronous calls of rows on a CPU run on."""
        return self._calls.stream

    def get_local_buffer_tensor(self, *_: Any, **__: Any) -> Tensor:
        """Raise: no part of this Buffer's memory stays at one place for the caller to write."""
        raise NotImplementedError(
            "get_local_buffer_tensor: expected a buffer at a fixed place, got memory that is "
            "allocated by call; pass rows to dispatch and combine, where received rows are views"
        )

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> LayoutResult:
        """Count where this rank's tokens go.

        Local: no other rank takes part.

        Args:
            topk_idx: `[T, K]` int64 or int32 in `[0, num_experts)`, or -1 where a slot is unused.
            num_experts: experts on all ranks.
            previous_event: waited for first.
            async_finish: whether to queue the counting and return an event.
            allocate_on_comm_stream: accepted, as everything is allocated where it is used.

        Returns:
            num_tokens_per_rank: `[R]` int32; a token with several experts on a rank counts once.
            num_tokens_per_rdma_rank: None; ranks are not grouped by node.
            num_tokens_per_expert: `[E]` int32.
            is_token_in_rank: `[T, R]` bool.
            event: complete when the four are.
        """
        operation = "get_dispatch_layout"
        check_topk_idx(operation, topk_idx, num_experts, self.group_size)
        per_rank = topk_idx.new_empty(self.group_size, dtype=torch.int32)
        per_expert = topk_idx.new_empty(num_experts, dtype=torch.int32)
        is_token_in_rank = topk_idx.new_empty(len(topk_idx), self.group_size, dtype=torch.bool)

        def count() -> None:
            check_topk_range(operation, topk_idx, num_experts)
            counts = layout.count_tokens(topk_idx, num_experts, self.group_size)
            per_rank.copy_(counts.num_tokens_per_rank)
            per_expert.copy_(counts.num_tokens_per_expert)
            is_token_in_rank.copy_(counts.is_token_in_rank)

        event = self._calls.run_local(operation, count, topk_idx, previous_event, async_finish)
        return per_rank, None, per_expert, is_token_in_rank, event

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: AnyHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_experts: int | None = None,
        expand: bool = False,
        fp8: Fp8Recipe | None = None,
        widen_to: torch.dtype | None = None,
    ) -> tuple[
        Tensor | tuple[Tensor, Tensor],
        Tensor | None,
        Tensor | None,
        list[int] | None,
        Any,
        EventOverlap,
    ]:
        """Send every token to the ranks that hold its experts.

        Collective. Not differentiable: see `ep_megatron.autograd.fused_dispatch`. Received tensors
        belong to the caller; on the shared-memory backend they may be views of the arena, whose
        memory returns to it with the last view.

        Args:
            x: `[T, H]` of any dtype with rows of a multiple of 16 bytes, or `(x, x_scales)`: rows
                of a 1-byte dtype with `[T, S]` float32 or int32 scales that travel along. T may
                differ between ranks, and may be 0.
            handle: of an earlier dispatch: `x` goes the same way, and nothing is counted again.
            num_tokens_per_rank: accepted as DeepEP's callers pass it; counted from `topk_idx`.
            num_tokens_per_rdma_rank: likewise.
            is_token_in_rank: likewise.
            num_tokens_per_expert: `[E]`; its length is the number of experts.
            topk_idx: `[T, K]` int64 or int32, -1 where a slot is unused; required without `handle`.
            topk_weights: `[T, K]` float32 or float64; travels with the rows.
            expert_alignment: counts (and with `expand` blocks of rows) are rounded up to it.
            num_worst_tokens: rows of every received tensor, the same on all ranks; nobody waits for
                counts then, the list is empty, and those behind the rows that came have
                `recv_topk_idx` -1 and weights 0. The counts are tensors of the handle, a
                `CapacityHandle`. More rows than these raise a ValueError on every rank; between
                GPUs, where no host waits, from `CapacityHandle.check` or the next call. 0 for as
                many rows as come.
            config: accepted; the protocol has no chunk sizes to tune.
            previous_event: waited for first.
            async_finish: whether to queue the call and return an event.
            allocate_on_comm_stream: accepted, as everything is allocated where it is used.
            num_experts: instead of `num_tokens_per_expert`.
            expand: rows arrive expert-major, one per (token, local expert), each expert's block
                padded with zero rows to `expert_alignment`.
            fp8: rows of `x` (bfloat16, float16 or float32) are cast to e4m3 as they are sent, and
                arrive as `(recv_x, recv_scales)`; see `Fp8Recipe`. A row is read and cast once,
                however many ranks it goes to, its own included.
            widen_to: e4m3 rows, cast here or by the caller, arrive widened to this dtype.

        Returns:
            recv_x: `[M, H]`, one row per token that has an expert here, by source rank, then token;
                with `expand` `[N, H]`, by local expert, then source rank, token and slot. A pair
                with `recv_scales` where `x` was one or `fp8` is given, and not `widen_to`; padding
                rows have scales of zero.
            recv_topk_idx: `[M, K]` local experts, -1 where an expert is elsewhere; None with
                `expand` or `handle`.
            recv_topk_weights: `[M, K]`, 0 where an expert is elsewhere; with `expand` `[N]`.
            num_recv_tokens_per_expert_list: rows per local expert, rounded up; None with `handle`.
            handle: for `combine` and later dispatches; None with `handle`.
            event: complete when the rows are there.

        Raises:
            ValueError: on every rank, if an argument of one is not as above or ranks disagree.
            RuntimeError: if a rank stopped or did not come in time.
        """
        if handle is not None:
            return self._dispatch_again(
                x, topk_idx, topk_weights, handle, previous_event, async_finish, fp8, widen_to
            )
        kept: recompute.KeptDispatch | None = None

        def check() -> tuple[Rows, Routing | AnyHandle]:
            nonlocal kept
            experts = num_experts
            if experts is None and num_tokens_per_expert is not None:
                experts = len(num_tokens_per_expert)
            if topk_idx is None or experts is None:
                missing = "topk_idx" if topk_idx is None else "num_tokens_per_expert"
                raise ValueError(f"dispatch: expected {missing} or a handle, got None")
            routing = Routing(topk_idx, experts, expand, expert_alignment, num_worst_tokens)
            kept = recompute.take(self._calls, routing)
            way = routing if kept is None else kept.handle
            return dispatch_rows("dispatch", x, topk_weights, way, self.group_size, fp8, widen_to)

        rows, routing = self._checked("dispatch", check, async_finish)
        if kept is not None:
            received, event = self._calls.dispatch_again(
                rows, kept.handle, previous_event, async_finish
            )
            idx, counts = kept.received()
            weights = received.topk_weights
            return _with_scales(received), idx, weights, counts, kept.handle, event
        assert isinstance(routing, Routing)
        new_handle: AnyHandle
        if num_worst_tokens:
            received, new_handle, event = self._calls.dispatch_within(
                rows, routing, previous_event, async_finish
            )
            counts = []
        else:
            received, exact_handle, event = self._calls.dispatch(
                rows, routing, previous_event, async_finish
            )
            self._count_experts(exact_handle)
            new_handle, counts = exact_handle, list(exact_handle.num_recv_tokens_per_expert)
        if recompute.is_recording():
            event = self._calls.keep(routing, received, new_handle, event, async_finish)
        return (
            _with_scales(received),
            received.topk_idx,
            received.topk_weights,
            counts,
            new_handle,
            event,
        )

    def combine(
        self,
        x: Tensor,
        handle: AnyHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, ...] | None = None,
        config: Any = None,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them, unweighted.

        Collective. Not differentiable: see `ep_megatron.autograd.fused_combine`. `x` is read before
        the call returns, or before the event is complete.

        Args:
            x: `[M, H]` (`[N, H]` with an expert-major handle), bfloat16, float16, float32 or
                float64, rows in the order in which dispatch delivered them.
            handle: of the dispatch that brought the rows, or of any with the same routing.
            topk_weights: `[M, K]` (`[N]`) float32 or float64, summed over ranks likewise.
            bias: one or two `[T, H]` tensors the sum starts from.
            config: accepted, see `dispatch`.
            previous_event: waited for first.
            async_finish: whether to queue the call and return an event.
            allocate_on_comm_stream: accepted, see `dispatch`.

        Returns:
            combined_x: `[T, H]`, dtype of `x`. Summed in float32 (float64 for float64): the biases,
                then rank after rank in ascending order, each rank's rows in slot order first;
                rounded once. A token without a destination gets its biases, or zeros.
            combined_topk_weights: `[T, K]`, or None without `topk_weights`.
            event: complete when both are.

        Raises:
            ValueError: on every rank, if an argument of one is not as above or ranks disagree.
            RuntimeError: if a rank stopped or did not come in time.
        """
        biases = () if bias is None else (bias,) if isinstance(bias, Tensor) else tuple(bias)
        rows, checked_biases = self._checked(
            "combine",
            lambda: combine_rows("combine", x, topk_weights, biases, handle, self.group_size),
            async_finish,
        )
        return self._calls.combine(rows, handle, checked_biases, previous_event, async_finish)

    def _dispatch_again(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        handle: AnyHandle,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
        fp8: Fp8Recipe | None,
        widen_to: torch.dtype | None,
    ) -> tuple[Any, None, Tensor | None, None, None, EventOverlap]:
        operation = "cached dispatch"

        def check() -> tuple[Rows, Routing | AnyHandle]:
            if topk_idx is not None:
                raise ValueError(
                    "cached dispatch: expected topk_idx to be None, got a tensor; the handle "
                    "holds the routing"
                )
            return dispatch_rows(operation, x, topk_weights, handle, self.group_size, fp8, widen_to)

        rows, _ = self._checked(operation, check, async_finish)
        arrived, event = self._calls.dispatch_again(rows, handle, previous_event, async_finish)
        return _with_scales(arrived), None, arrived.topk_weights, None, None, event

    def _checked(
        self, operation: str, check: Callable[[], _Checked], async_finish: bool
    ) -> _Checked:
        """Return `check()`; if it fails here, let the other ranks hear of it before raising."""
        try:
            return check()
        except ValueError as error:
            text = str(error).removeprefix(f"{operation}: ")
            self._calls.fail(operation, text, async_finish)
            raise


def _with_scales(rows: Rows) -> Tensor | tuple[Tensor, Tensor]:
    return rows.x if rows.scales is None else (rows.x, rows.scales)
