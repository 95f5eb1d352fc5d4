"""ElasticBuffer: the verbs of DeepEP's second version, over the same backends as `Buffer`.

What differs in meaning from DeepEP is better defined: rows always come in (source rank, token)
order and sums in the order of `Buffer.combine`, padding rows are always zero, and the weights of
experts elsewhere are 0 where DeepEP leaves what they were.

Source: argument names, defaults and meanings follow DeepEP's `ElasticBuffer` (MIT).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import fp8
from ep_megatron.buffer import Buffer
from ep_megatron.config import BufferConfig
from ep_megatron.elastic_handle import EPHandle
from ep_megatron.sizes import elastic_size_hint
from ep_megatron.streams import CPUStream, EventHandle, EventOverlap, after_all

# Of DeepEP's, and not here: what belongs to its experiments and its links.
_ABSENT = (
    *("engram_write", "engram_fetch", "get_engram_storage_size_hint"),
    *("pp_set_config", "pp_send", "pp_recv", "get_pp_buffer_size_hint"),
    *("create_agrs_session", "destroy_agrs_session", "agrs_new_session", "agrs_set_config"),
    *("agrs_get_inplace_tensor", "all_gather", "get_agrs_buffer_size_hint"),
    *("get_physical_domain_size", "num_rdma_ranks", "num_nvlink_ranks", "nccl_comm_handle"),
    "runtime",
)


class ElasticBuffer:
    """Dispatch and combine with DeepEP's second API.

    Collective constructor. Errors, order of calls, memory and events are as with `Buffer`.

    Args:
        group: the expert-parallel ranks; any size from 1 up.
        num_bytes: made ready at the start; memory grows when needed.
        num_cpu_bytes: accepted.
        num_max_tokens_per_rank: the most tokens of a rank; needed without CPU sync only.
        hidden: accepted.
        num_topk: accepted.
        use_fp8_dispatch: accepted.
        deterministic: accepted; everything is.
        allow_hybrid_mode: accepted; the backend is chosen by `config.backend`.
        allow_multiple_reduction: accepted.
        prefer_overlap_with_compute: accepted.
        sl_idx: accepted.
        num_allocated_qps: accepted.
        num_gpu_timeout_secs: accepted.
        explicitly_destroy: accepted.
        num_cpu_timeout_secs: seconds that a rank waits for the others.
        backend: short for `config=BufferConfig(backend=...)`.
        config: resources and limits; its timeout holds where it is given.
    """

    def __init__(  # noqa: PLR0913
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
        *,
        backend: str | None = None,
        config: BufferConfig | None = None,
    ) -> None:
        config = config or BufferConfig(timeout=num_cpu_timeout_secs)
        self._buffer = Buffer(group, num_bytes or 0, backend=backend, config=config)
        self.group = group
        self.num_bytes = num_bytes or self.get_buffer_size_hint(
            group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
        )
        self.rank_idx, self.num_ranks = self._buffer.rank, self._buffer.group_size
        # One domain: rows come by rank, whatever lies between.
        self.num_scaleout_ranks, self.scaleout_rank_idx = 1, 0
        self.num_scaleup_ranks, self.scaleup_rank_idx = self.num_ranks, self.rank_idx
        self.num_allocated_qps = num_allocated_qps
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.deterministic, self.explicitly_destroy = True, explicitly_destroy

    def __getattr__(self, name: str) -> Any:
        """Say of DeepEP's other members that they are not here; local."""
        reason = "a verb of dispatch and combine, got one of DeepEP's experiments or links"
        told = f"ElasticBuffer.{name}: expected {reason}, which is not here"
        raise AttributeError(told if name in _ABSENT else f"ElasticBuffer has no attribute {name}")

    def destroy(self) -> None:
        """See `Buffer.destroy`; local, unlike DeepEP's."""
        self._buffer.destroy()

    @staticmethod
    def capture() -> EventHandle:
        """Return an event for the work that the current stream holds now."""
        return EventHandle()

    def get_comm_stream(self) -> CPUStream:
        """See `Buffer.get_comm_stream`."""
        return self._buffer.get_comm_stream()

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Return the bytes of DeepEP's buffer for ranks that reach each other's memory. Local."""
        num_ranks = dist.get_world_size(group)
        return elastic_size_hint(
            num_ranks, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
        )

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Return 1 and the number of ranks: there is one domain. Local."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Return the number of queue pairs that was given; there are none to choose. Local."""
        return self.num_allocated_qps

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Wait for all ranks, behind the calls that are queued. Collective; the host waits."""
        nothing = torch.empty(0, 16, dtype=torch.uint8)
        idx = torch.empty(0, 1, dtype=torch.int64)
        self._buffer.dispatch(nothing, topk_idx=idx, num_experts=self.num_ranks)

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, *_: Any, **__: Any) -> int:
        """Return the class-wide number; on a CPU no model of SMs and links says more."""
        return Buffer.num_sms

    def dispatch(  # noqa: PLR0913
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks that hold its experts; see `Buffer.dispatch`. Collective.

        Args:
            x: `[T, H]`, or `(x, sf)`.
            topk_idx: `[T, K]`, without `handle`.
            topk_weights: `[T, K]`; may go with a handle.
            cumulative_local_expert_recv_stats: `[L]` int32, the rows per local expert are added to.
            num_experts: on all ranks; needed without `handle`.
            num_max_tokens_per_rank: in place of the constructor's.
            expert_alignment: 1 where None.
            num_sms: kept in the handle; see `Buffer.set_num_sms`.
            num_qps: accepted.
            previous_event: waited for first.
            previous_event_before_epilogue: likewise.
            async_with_compute_stream: whether to queue the call and return an event.
            allocate_on_comm_stream: accepted, as everything is allocated where it is used.
            handle: of an earlier dispatch: the same way again, `topk_idx` must be None, and what
                else the handle holds None or the same.
            do_handle_copy: whether the handle keeps a copy of `topk_idx`, or itself.
            do_cpu_sync: whether the call waits for the counts; None for yes. Without, tensors have
                room for the worst case, and counts are tensors of `handle.inner`.
            do_expand: rows arrive expert-major.
            do_zero_padding: accepted; padding is always zero.
            use_tma_aligned_col_major_sf: received scales have strides `(1, M rounded up to 4)`.

        Returns:
            recv_x (or a pair), recv_topk_idx (None with `do_expand`), recv_topk_weights, handle
            (the same with `handle`), event.
        """
        event = after_all(previous_event, previous_event_before_epilogue)
        is_queued = async_with_compute_stream
        most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        given = num_experts, expert_alignment, num_max_tokens_per_rank, do_cpu_sync
        if handle is not None:
            self._checked(lambda: _check_cached(handle, *given), is_queued)
            recv_x, _, weights, _, _, done = self._buffer.dispatch(
                x,
                handle.inner,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                previous_event=event,
                async_finish=is_queued,
            )
            if use_tma_aligned_col_major_sf:
                recv_x, done = self._in_columns(recv_x, done)
            return recv_x, handle.recv_topk_idx, weights, handle, done
        alignment, worst = expert_alignment or 1, 0
        if do_cpu_sync is False and topk_idx is not None and num_experts is not None:
            self._checked(lambda: _check_most(most), is_queued)
            worst = most * self.num_ranks
            if do_expand:
                padding = (alignment - 1) * (num_experts // self.num_ranks)
                worst = worst * topk_idx.shape[-1] + padding
                worst = -(-worst // alignment) * alignment
        recv_x, recv_idx, weights, counts, inner, done = self._buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_worst_tokens=worst,
            expand=do_expand,
            previous_event=event,
            async_finish=is_queued,
        )
        assert topk_idx is not None  # checked by Buffer
        assert num_experts is not None
        new_handle = EPHandle(
            do_expand=do_expand,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=most,
            num_sms=num_sms or Buffer.num_sms,
            topk_idx=topk_idx.clone() if do_handle_copy else topk_idx,
            num_recv_tokens_per_expert_list=counts or [],
            recv_topk_idx=recv_idx,
            inner=inner,
        )
        stats = cumulative_local_expert_recv_stats
        if stats is not None:
            done = self._behind(done, lambda: _add_counts(stats, new_handle), stats.device)
        if use_tma_aligned_col_major_sf:
            recv_x, done = self._in_columns(recv_x, done)
        return recv_x, recv_idx, weights, new_handle, done

    def combine(  # noqa: PLR0913
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, ...] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them; see `Buffer.combine`. Collective.

        Args:
            x: as many rows as dispatch returned, in their order.
            handle: of that dispatch.
            topk_weights: `[M, K]`, with an expert-major handle `[N]`.
            bias: one or two `[T, H]` tensors the sum starts from.
            num_sms: accepted; see `Buffer.set_num_sms`.
            num_qps: accepted.
            previous_event: waited for first.
            previous_event_before_epilogue: likewise.
            async_with_compute_stream: whether to queue the call and return an event.
            allocate_on_comm_stream: accepted, as everything is allocated where it is used.

        Returns:
            combined_x `[T, H]`, combined_topk_weights `[T, K]` or None, event.
        """
        return self._buffer.combine(
            x,
            handle.inner,
            topk_weights=topk_weights,
            bias=bias,
            previous_event=after_all(previous_event, previous_event_before_epilogue),
            async_finish=async_with_compute_stream,
        )

    def _checked(self, check: Callable[[], None], is_queued: bool) -> None:
        """Raise what `check` raises, on every rank."""
        self._buffer._checked("dispatch", check, is_queued)

    def _behind(
        self, event: EventOverlap, call: Callable[[], object], device: torch.device
    ) -> EventOverlap:
        """Run `call` behind a dispatch, which was queued if it has an event; return the event."""
        if event.event is None or device.type != "cpu":
            call()
            return event
        return EventOverlap(after_all(event, self.get_comm_stream().submit(call, "dispatch")))

    def _in_columns(self, recv_x: Any, event: EventOverlap) -> tuple[Any, EventOverlap]:
        """Return received rows with scales column-major, and the event behind which they are."""
        if not isinstance(recv_x, tuple):
            return recv_x, event
        x, scales = recv_x
        columns = fp8.new_columns(len(scales), scales.shape[1], scales.dtype, x.device)
        return (x, columns), self._behind(event, lambda: columns.copy_(scales), x.device)


def _add_counts(stats: Tensor, handle: EPHandle) -> None:
    stats.add_(handle.num_unaligned_recv_tokens_per_expert)


def _check_cached(
    handle: EPHandle,
    num_experts: int | None,
    expert_alignment: int | None,
    num_max_tokens_per_rank: int | None,
    do_cpu_sync: bool | None,
) -> None:
    """Raise if a cached dispatch is asked for what is not its handle's."""
    if do_cpu_sync:
        raise ValueError("dispatch: expected do_cpu_sync not to be True with a handle")
    given = {
        "num_experts": (num_experts, handle.num_experts),
        "expert_alignment": (expert_alignment, handle.expert_alignment),
        "num_max_tokens_per_rank": (num_max_tokens_per_rank, handle.num_max_tokens_per_rank),
    }
    for name, (asked, own) in given.items():
        if asked is not None and asked != own:
            raise ValueError(
                f"dispatch: expected {name} to be None or that of the handle, {own}, got {asked}"
            )


def _check_most(most: int) -> None:
    if most < 1:
        raise ValueError(
            "dispatch: expected num_max_tokens_per_rank with do_cpu_sync=False, got "
            f"{most}; give it here or to the constructor"
        )
