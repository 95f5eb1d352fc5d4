"""Dispatch and combine between CPU ranks of one host, by compiled code over shared memory.

Rows go straight to their final address: nothing is packed, and received rows are handed out as
views of the arena while it has room. The protocol is in docs/design.md, its flags in
csrc/cpu/control.h.
"""

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import _cpu
from ep_megatron.backends.base import (
    OPERATIONS,
    Call,
    PeerReport,
    Routing,
    Rows,
    check_agreement,
)
from ep_megatron.backends.meeting import Meeting
from ep_megatron.config import MIB, BufferConfig
from ep_megatron.handle import DispatchHandle

_SUM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Smaller results are as warm in torch's allocator: glibc keeps what it has once faulted in.
_MIN_ARENA_BYTES = MIB
_MAX_THREADS = 4  # by default; memory bandwidth is shared by all ranks


class SharedMemoryBackend:
    """See `Backend`. Collective constructor.

    Args:
        group: CPU ranks of one host.
        config: limits; see `BufferConfig`.

    Raises:
        ValueError: if the ranks cannot share memory.
        RuntimeError: on every rank, if one cannot make its segment.
    """

    name = "shared_memory"

    def __init__(self, group: dist.ProcessGroup, config: BufferConfig) -> None:
        meeting = Meeting(group, config.timeout)
        self.rank, self.num_ranks = meeting.rank, meeting.num_ranks
        self._num_calls = 0
        prefix = f"ep_megatron.{os.geteuid()}."
        # Unguessable, and gone as soon as all ranks have it mapped.
        name = f"{prefix}{os.getpid()}.{secrets.token_hex(16)}"
        num_cores = _num_cores()
        max_bytes = config.max_bytes or _default_max_bytes(config.shm_dir, self.num_ranks)

        def create() -> None:
            _cpu.remove_stale_segments(config.shm_dir, prefix)
            self._exchange = _cpu.Exchange(
                folder=config.shm_dir,
                name=name,
                rank=self.rank,
                num_ranks=self.num_ranks,
                max_bytes=max_bytes,
                max_view_bytes=(
                    max_bytes // 2 if config.max_view_bytes is None else config.max_view_bytes
                ),
                streaming_bytes=(
                    _default_streaming_bytes()
                    if config.streaming_bytes is None
                    else config.streaming_bytes
                ),
                num_threads=(
                    config.num_threads or max(1, min(_MAX_THREADS, num_cores // self.num_ranks))
                ),
                timeout=config.timeout,
                has_core_per_rank=num_cores >= self.num_ranks,
            )
            self._exchange.reserve(min(config.initial_bytes, max_bytes))

        _together(meeting, create)
        try:
            names = meeting.gather_text("Buffer", name)
            _together(meeting, lambda: self._exchange.attach(names))
        except BaseException:
            self._exchange.close()
            raise
        self._exchange.unlink()

    def dispatch(self, rows: Rows, routing: Routing) -> tuple[Rows, DispatchHandle]:
        """See `Backend.dispatch`."""
        num_tokens, num_topk = routing.topk_idx.shape
        routes = torch.empty(3, num_tokens, num_topk, dtype=torch.int32)
        sizes = {
            "topk_idx": routing.topk_idx.data_ptr(),
            "is_int64": routing.topk_idx.dtype == torch.int64,
            "num_tokens": num_tokens,
            "num_topk": num_topk,
            "num_experts": routing.num_experts,
            "num_ranks": self.num_ranks,
            "expand": routing.expand,
            "alignment": routing.expert_alignment,
        }
        call = Call.of("dispatch", rows, routing)
        idx_bytes = routing.topk_idx.element_size()
        result, received = self._dispatch("dispatch", rows, sizes, call, routes, idx_bytes)
        alignment = routing.expert_alignment
        valid = tuple(result.valid_per_expert)
        handle = DispatchHandle(
            plan_id=self._num_calls,
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=routing.num_experts,
            expand=routing.expand,
            expert_alignment=alignment,
            routes=routes,
            num_rows_per_rank=tuple(result.num_rows_per_rank),
            num_tokens_per_rank=tuple(result.num_tokens_per_rank),
            num_recv_tokens_per_rank=tuple(result.num_recv_tokens_per_rank),
            num_recv_tokens_per_expert=(
                valid if alignment == 1 else tuple(-(-n // alignment) * alignment for n in valid)
            ),
            num_valid_tokens_per_expert=valid,
            topk_idx=None if routing.expand else routing.topk_idx.clone(),
        )
        return received, handle

    def dispatch_again(self, rows: Rows, handle: DispatchHandle) -> Rows:
        """See `Backend.dispatch_again`."""
        sizes = {
            "topk_idx": _address(handle.topk_idx),
            "is_int64": handle.topk_idx is not None and handle.topk_idx.dtype == torch.int64,
            "num_tokens": handle.num_tokens,
            "num_topk": handle.num_topk,
            "num_experts": handle.num_experts,
            "num_ranks": self.num_ranks,
            "expand": handle.expand,
            "alignment": handle.expert_alignment,
            "num_rows_per_rank": list(handle.num_rows_per_rank),
            "valid_per_expert": list(handle.num_valid_tokens_per_expert),
        }
        call = Call.of("cached dispatch", rows, handle)
        return self._dispatch("cached dispatch", rows, sizes, call, handle.routes, 0)[1]

    def combine(
        self, rows: Rows, handle: DispatchHandle, biases: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        x, weights = rows.x, rows.topk_weights
        out = self._new_rows(handle.num_tokens, x)
        out_weights = None
        if weights is not None:
            out_weights = weights.new_empty(handle.num_tokens, handle.num_topk)
        sizes = {
            "num_tokens": handle.num_tokens,
            "num_topk": handle.num_topk,
            "expand": handle.expand,
            "num_rows": len(x),
            "dtype": _SUM_DTYPES.index(x.dtype),
            "hidden": x.shape[1],
            "weight_bytes": 0 if weights is None else weights.element_size(),
        }
        addresses = {
            "routes": handle.routes.data_ptr(),
            "x": x.data_ptr(),
            "weights": _address(weights),
            "bias_0": _address(biases[0]) if len(biases) > 0 else 0,
            "bias_1": _address(biases[1]) if len(biases) > 1 else 0,
            "out": out.data_ptr(),
            "out_weights": _address(out_weights),
        }
        self._num_calls += 1
        call = Call.of("combine", rows, handle)
        if not self._exchange.combine(list(call), sizes, addresses):
            self._raise_disagreement("combine")
        return out, out_weights

    def fail(self, operation: str, error: str) -> None:
        """See `Backend.fail`."""
        self._num_calls += 1
        self._exchange.report_failure(OPERATIONS.index(operation), error)

    def close(self) -> None:
        """See `Backend.close`."""
        self._exchange.close()

    @property
    def num_bytes_committed(self) -> int:
        """Bytes of shared memory this rank has allocated."""
        return self._exchange.committed

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of it that tensors view, or that peers may still read."""
        return self._exchange.num_bytes_in_use

    def _new_rows(self, num_rows: int, like: Tensor) -> Tensor:
        """Return uninitialised `[num_rows, H]`, in the arena where that is worth it."""
        num_bytes = num_rows * like.shape[1] * like.element_size()
        block = self._exchange.allocate(num_bytes) if num_bytes >= _MIN_ARENA_BYTES else None
        if block is None:
            return like.new_empty(num_rows, like.shape[1])
        count = num_rows * like.shape[1]
        return torch.frombuffer(block, dtype=like.dtype, count=count).view(num_rows, -1)

    def _dispatch(
        self,
        operation: str,
        rows: Rows,
        sizes: Mapping[str, object],
        call: Call,
        routes: Tensor,
        idx_bytes: int,
    ) -> tuple[_cpu.Dispatched, Rows]:
        x, scales, weights = rows.x, rows.scales, rows.topk_weights
        expand = bool(sizes["expand"])
        num_topk = call.num_topk
        parts = {
            "x": x.data_ptr(),
            "scales": _address(scales),
            "weights": _address(weights),
            "x_bytes": x.shape[1] * x.element_size(),
            "scales_bytes": 0 if scales is None else scales.shape[1] * scales.element_size(),
            "weights_bytes": 0 if weights is None else weights.element_size(),
            "idx_bytes": idx_bytes,
        }
        self._num_calls += 1
        result = self._exchange.dispatch(list(call), sizes, parts, routes.data_ptr())
        if not result.is_agreed:
            self._raise_disagreement(operation)
        num_rows = result.num_rows_per_rank[self.rank]

        def view(offset: int, like: Tensor, *shape: int) -> Tensor:
            """Look at a part of the block; the tensor keeps the block alive."""
            count = math.prod(shape)
            if count == 0:
                return like.new_empty(shape)
            part = torch.frombuffer(result.block, dtype=like.dtype, count=count, offset=offset)
            part = part.view(shape)
            return part.clone() if result.must_copy else part

        columns = () if expand else (num_topk,)
        received = Rows(
            view(0, x, num_rows, x.shape[1]),
            None if scales is None else view(result.scales_at, scales, num_rows, scales.shape[1]),
            None if weights is None else view(result.weights_at, weights, num_rows, *columns),
            view(result.idx_at, _like_idx(idx_bytes), num_rows, num_topk)
            if idx_bytes and not expand
            else None,
        )
        return result, received

    def _raise_disagreement(self, operation: str) -> None:
        reports = self._exchange.reports()
        lacking = [
            f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.is_out_of_memory
        ]
        if lacking:
            raise RuntimeError(
                f"{operation}: expected room for all rows, got {'; '.join(lacking)}; "
                "raise max_bytes or free shared memory"
            )
        check_agreement(operation, [PeerReport(r.call, r.error) for r in reports])
        raise AssertionError(f"{operation}: the ranks disagree in nothing that is named")


def _like_idx(num_bytes: int) -> Tensor:
    return torch.empty(0, dtype=torch.int64 if num_bytes == 8 else torch.int32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _together(meeting: Meeting, action: Callable[[], None]) -> None:
    """Run `action` on all ranks; raise on all if it fails on one."""
    error, reason = None, ""
    try:
        action()
    except (RuntimeError, OSError) as exception:
        error, reason = exception, str(exception)[:200]
    reasons = meeting.gather_text("Buffer", reason)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text]
    if failed:
        raise RuntimeError(
            f"Buffer: expected every rank to share its memory, got {'; '.join(failed)}; "
            "backend='process_group' works without shared memory"
        ) from error


def _num_cores() -> int:
    """Return how many cores this process may use: its affinity, and its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        share, period = quota.read_text().split()
        if share != "max":
            cores = min(cores, max(1, int(share) // int(period)))
    return cores


def _default_max_bytes(folder: str, num_ranks: int) -> int:
    status = os.statvfs(folder)
    return max(MIB, int(0.8 * status.f_bavail * status.f_frsize / num_ranks) // MIB * MIB)


def _default_streaming_bytes() -> int:
    """Return a quarter of the last-level cache: more than that is not read again from it."""
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    return max(sizes, default=16 * MIB) // 4
