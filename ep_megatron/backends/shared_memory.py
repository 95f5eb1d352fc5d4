"""Dispatch and combine between CPU ranks of one host, by compiled code over shared memory.

Rows go straight to their final address: nothing is packed, and received rows are handed out as
views of the arena while it has room. The protocol is in docs/design.md, its flags in
csrc/cpu/control.h.
"""

import functools
import math
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ep_megatron import _cpu, casts, fp8
from ep_megatron.arguments import SUM_DTYPES
from ep_megatron.backends.base import (
    OPERATIONS,
    Call,
    PeerReport,
    Routing,
    Rows,
    check_agreement,
)
from ep_megatron.backends.meeting import Gathering
from ep_megatron.config import MIB, BufferConfig
from ep_megatron.fp8 import Fp8Recipe
from ep_megatron.handle import DispatchHandle

# Smaller results are as warm in torch's allocator: glibc keeps what it has once faulted in.
_MIN_ARENA_BYTES = MIB
_MAX_THREADS = 4  # by default; memory bandwidth is shared by all ranks


class SharedMemoryBackend:
    """See `Backend`. Collective constructor.

    Args:
        meeting: of the CPU ranks of one host; used by the constructor alone.
        config: limits; see `BufferConfig`.

    Raises:
        ValueError: if the ranks cannot share memory.
        RuntimeError: on every rank, if one cannot make its segment.
    """

    name = "shared_memory"

    def __init__(self, meeting: Gathering, config: BufferConfig) -> None:
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
        call = Call.of("dispatch", rows, routing)
        result, received = self._dispatch(
            "dispatch", rows, call, num_tokens, routing.topk_idx, routes
        )
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

    def dispatch_again(self, rows: Rows, handle: DispatchHandle, *, with_idx: bool = False) -> Rows:
        """See `Backend.dispatch_again`; `with_idx`: expert ids arrive, as by a first dispatch."""
        call = Call.of("cached dispatch", rows, handle)
        return self._dispatch(
            "cached dispatch",
            rows,
            call,
            handle.num_tokens,
            handle.topk_idx,
            handle.routes,
            handle,
            with_idx=with_idx,
        )[1]

    def combine(
        self, rows: Rows, handle: DispatchHandle, biases: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.combine`."""
        x, weights = rows.x, rows.topk_weights
        out = self.new_rows(handle.num_tokens, x)
        out_weights = None
        if weights is not None:
            out_weights = weights.new_empty(handle.num_tokens, handle.num_topk)
        self._num_calls += 1
        is_agreed = self._exchange.combine(
            Call.of("combine", rows, handle),
            (handle.num_tokens, handle.num_topk, handle.expand, x.shape[0]),
            SUM_DTYPES.index(x.dtype),
            x.shape[1],
            0 if weights is None else weights.element_size(),
            (
                handle.routes.data_ptr(),
                x.data_ptr(),
                _address(weights),
                _address(biases[0]) if len(biases) > 0 else 0,
                _address(biases[1]) if len(biases) > 1 else 0,
            ),
            out.data_ptr(),
            _address(out_weights),
        )
        if not is_agreed:
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
    def is_broken(self) -> bool:
        """Whether a call broke down: no other will go on."""
        return self._exchange.is_broken

    @property
    def num_bytes_committed(self) -> int:
        """Bytes of shared memory this rank has allocated."""
        return self._exchange.committed

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes of it that tensors view, or that peers may still read."""
        return self._exchange.num_bytes_in_use

    def new_rows(self, num_rows: int, like: Tensor) -> Tensor:
        """Return uninitialised `[num_rows, H]`, in the arena where that is worth it."""
        num_bytes = num_rows * like.shape[1] * like.element_size()
        block = self._exchange.allocate(num_bytes) if num_bytes >= _MIN_ARENA_BYTES else None
        if block is None:
            return like.new_empty(num_rows, like.shape[1])
        return _view(block, 0, like, num_rows, like.shape[1])

    def _dispatch(
        self,
        operation: str,
        rows: Rows,
        call: Call,
        num_tokens: int,
        topk_idx: Tensor | None,
        routes: Tensor,
        handle: DispatchHandle | None = None,
        *,
        with_idx: bool = True,
    ) -> tuple[_cpu.Dispatched, Rows]:
        x, scales, weights = rows.x, rows.scales, rows.topk_weights
        expand, num_topk = bool(call.expand), call.num_topk
        # Expert ids travel by rank; expert-major rows say by their place whose they are.
        with_idx = with_idx and not expand and topk_idx is not None
        x_bytes = x.shape[1] * x.element_size()
        scale_bytes = 0 if scales is None else scales.shape[1] * scales.element_size()
        cast = None
        if rows.fp8 is not None:
            x_bytes, scale_bytes = x.shape[1], 4 * rows.fp8.num_scales(x.shape[1])
            by_column = rows.fp8.layout == "column_major"
            name = casts.dtype_name(x.dtype)
            cast = (name, x.shape[1], casts.format_of(rows.fp8), by_column)
        self._num_calls += 1
        result = self._exchange.dispatch(
            call,
            _address(topk_idx),
            0 if topk_idx is None else topk_idx.element_size(),
            (num_tokens, num_topk, call.num_experts, expand, call.expert_alignment),
            (x.data_ptr(), _address(scales), _address(weights)),
            (
                x_bytes,
                scale_bytes,
                0 if weights is None else weights.element_size(),
                topk_idx.element_size() if with_idx and topk_idx is not None else 0,
            ),
            routes.data_ptr(),
            None if handle is None else handle.num_rows_per_rank,
            None if handle is None else handle.num_valid_tokens_per_expert,
            cast,
        )
        if not result.is_agreed:
            self._raise_disagreement(operation)
        return result, self._received(result, rows, call, topk_idx if with_idx else None)

    def _received(
        self, result: _cpu.Dispatched, sent: Rows, call: Call, topk_idx: Tensor | None
    ) -> Rows:
        """Look at what arrived; as copies where views hold too much already, or widened."""
        num_rows, hidden = result.num_rows_per_rank[self.rank], call.hidden
        is_widened = sent.widen_to is not None

        def view_of(must_copy: bool, offset: int, like: Tensor, *shape: int) -> Tensor:
            part = _view(result.block, offset, like, *shape)
            return part.clone() if must_copy else part

        # Once widened, the FP8 rows are of no more use: what came with them must not hold them.
        view = functools.partial(view_of, result.must_copy or is_widened)
        weights, columns = sent.topk_weights, () if call.expand else (call.num_topk,)
        if weights is not None:
            weights = view(result.weights_at, weights, num_rows, *columns)
        if topk_idx is not None:
            topk_idx = view(result.idx_at, topk_idx, num_rows, call.num_topk)
        view = functools.partial(view_of, result.must_copy and not is_widened)
        if sent.fp8 is None:
            x, scales = view(0, sent.x, num_rows, hidden), sent.scales
            if scales is not None:
                scales = view(result.scales_at, scales, num_rows, scales.shape[1])
        else:
            x = view(0, torch.empty(0, dtype=torch.float8_e4m3fn), num_rows, hidden)
            scales = _view_scales(view, result.scales_at, sent.fp8, num_rows, hidden)
        if sent.widen_to is not None:
            assert scales is not None  # checked with the arguments
            x, scales = self._widen(x, scales, sent.widen_to), None
        return Rows(x, scales, weights, topk_idx)

    def _widen(self, x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        out = self.new_rows(len(x), torch.empty(0, x.shape[1], dtype=dtype))
        self._exchange.widen(
            casts.dtype_name(dtype),
            casts.format_like("dispatch", x, scales),
            out.data_ptr(),
            x.data_ptr(),
            scales.data_ptr(),
            casts.scale_strides(scales),
            *x.shape,
        )
        return out

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


def _view(block: _cpu.Block, offset: int, like: Tensor, *shape: int) -> Tensor:
    """Look at a part of a block as a tensor, which keeps the block alive."""
    count = math.prod(shape)
    if count == 0:
        return like.new_empty(shape)
    return torch.frombuffer(block, dtype=like.dtype, count=count, offset=offset).view(shape)


def _view_scales(
    view: Callable[..., Tensor], offset: int, recipe: Fp8Recipe, num_rows: int, hidden: int
) -> Tensor:
    like = torch.empty(0, dtype=recipe.scale_dtype)
    num_scales = recipe.num_scales(hidden)
    if recipe.layout == "row_major":
        return view(offset, like, num_rows, num_scales)
    return view(offset, like, num_scales, fp8.column_rows(num_rows)).T[:num_rows]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _together(meeting: Gathering, action: Callable[[], None]) -> None:
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
