"""What torchtitan's wrappers of DeepEP call: the wrappers themselves, and their calls as ours.

Version 0.2 is written for DeepEP's first API, 0.3 for its second. Both register their operations
for CUDA alone; here the very same functions are registered for CPUs too. They are loaded by file,
as their packages need much else.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ep_megatron import Buffer
from ep_megatron.elastic import ElasticBuffer
from ep_megatron.streams import EventHandle, EventOverlap
from tests.ranks import fresh_processes, run_on_ranks
from tests.routing import Case
from tests.sources import folders_of

CASE = Case("torchtitan", (9, 9), num_topk=3, hidden=64, style="holes")
FILE = "distributed/deepep/deepep.py"
WRAPPERS = [path for folder in folders_of("torchtitan") for path in folder.glob(FILE)]
NO_SOURCES = pytest.mark.skip(reason="no sources of torchtitan; make build/sources")
Layer = Callable[[Tensor, Tensor], Tensor]


def experts(rows: Tensor, counts: Tensor, first: int) -> Tensor:
    """Multiply each row by a number of its expert, and take the sine."""
    numbers = torch.arange(first + 1, first + 1 + len(counts)).repeat_interleave(counts.long())
    return (rows * numbers[:, None].to(rows.dtype)).sin()


def inputs(rank: int) -> tuple[Tensor, Tensor]:
    return CASE.x(rank, torch.float32).requires_grad_(), CASE.weights(rank).requires_grad_()


def run(layer: Layer, rank: int) -> tuple[Tensor, ...]:
    x, scores = inputs(rank)
    out = layer(x, scores)
    (out * CASE.x(rank, torch.float32)).sum().backward()
    assert x.grad is not None
    assert scores.grad is not None
    return out.detach(), x.grad, scores.grad


def dense(rank: int, scores_first: bool = False) -> Layer:
    """The layer without any dispatch."""
    idx = CASE.topk_idx(rank)

    def layer(x: Tensor, scores: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot in range(CASE.num_topk):
            number, score = idx[:, slot, None], scores[:, slot, None]
            rows = x * score if scores_first else x
            rows = (rows * (number + 1)).sin()
            out = out + torch.where(number >= 0, rows if scores_first else rows * score, 0)
        return out

    return layer


def assert_near(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# -- their calls, written as ours -----------------------------------------------------------------


def by_expert(idx: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return which received row each of the experts' rows is, and its score."""
    token, slot = (idx >= 0).nonzero(as_tuple=True)
    order = torch.argsort(idx[token, slot], stable=True)
    return token[order], scores[token, slot][order]


def summed(rows: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    return rows.new_zeros(num_tokens, rows.shape[1]).index_add(0, token, rows)


def check_first_api(rank: int) -> None:
    """Sizes by configs, a layout call, queued calls behind a captured event, cached dispatch."""
    group = dist.group.WORLD
    assert group is not None
    sizes = [
        (config.get_nvl_buffer_size_hint(256, 2), config.get_rdma_buffer_size_hint(256, 2))
        for config in (Buffer.get_dispatch_config(2), Buffer.get_combine_config(2))
    ]
    nvl, rdma = (max(hints) for hints in zip(*sizes, strict=True))
    buffer = Buffer(group, nvl, rdma)
    assert buffer.group == group
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (nvl, rdma)
    asked: dict[str, Any] = {"async_finish": True, "allocate_on_comm_stream": True}

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, handle: Any) -> Tensor:
            ctx.handle = handle
            before = EventOverlap(EventHandle())
            out, _, event = buffer.combine(x=rows, handle=handle, previous_event=before, **asked)
            event.current_stream_wait()
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            nothing: dict[str, Any] = {"topk_idx": None, "topk_weights": None}
            nothing |= dict.fromkeys(("num_tokens_per_rank", "num_tokens_per_rdma_rank"))
            nothing |= dict.fromkeys(("is_token_in_rank", "num_tokens_per_expert"))
            rows, *_, event = buffer.dispatch(
                x=grad,
                handle=ctx.handle,
                previous_event=EventOverlap(EventHandle()),
                **nothing,
                **asked,
            )
            event.current_stream_wait()
            return rows, None

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scores: Tensor) -> tuple[Any, ...]:
            idx = CASE.topk_idx(rank)
            per_rank, per_node, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(
                topk_idx=idx, num_experts=CASE.num_experts
            )
            rows, recv_idx, recv_scores, counts, handle, event = buffer.dispatch(
                x=x,
                topk_idx=idx,
                topk_weights=scores,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=is_in_rank,
                num_tokens_per_expert=per_expert,
                previous_event=EventOverlap(EventHandle()),
                **asked,
            )
            event.current_stream_wait()
            ctx.handle = handle
            ctx.mark_non_differentiable(recv_idx)
            return rows, recv_idx, recv_scores, counts, handle

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _i: Any, grad_scores: Tensor, *_: Any) -> Any:
            out, weights, event = buffer.combine(
                x=grad,
                handle=ctx.handle,
                topk_weights=grad_scores,
                previous_event=EventOverlap(EventHandle()),
                **asked,
            )
            event.current_stream_wait()
            return out, weights

    def layer(x: Tensor, scores: Tensor) -> Tensor:
        rows, idx, scores, counts, handle = Dispatch.apply(x, scores)
        token, of_rows = by_expert(idx, scores)
        done = experts(rows[token], torch.tensor(counts), rank * CASE.experts_per_rank)
        out = Combine.apply(summed(done * of_rows[:, None], token, len(rows)), handle)
        assert isinstance(out, Tensor)
        return out

    assert_near(run(layer, rank), run(dense(rank), rank))


def check_second_api(rank: int) -> None:
    """Sizes by the hint, counts from the handle, and expert-major rows without waiting for them."""
    group, most = dist.group.WORLD, 9
    assert group is not None
    num_bytes = ElasticBuffer.get_buffer_size_hint(
        group, most, CASE.hidden, num_topk=CASE.num_topk, use_fp8_dispatch=False
    )
    buffer = ElasticBuffer(
        group,
        num_bytes=num_bytes,
        num_max_tokens_per_rank=most,
        hidden=CASE.hidden,
        num_topk=CASE.num_topk,
        use_fp8_dispatch=False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        explicitly_destroy=True,
    )
    assert buffer.num_bytes >= num_bytes
    num_sms = buffer.get_theoretical_num_sms(CASE.num_experts, CASE.num_topk)
    (x, scores), idx = inputs(rank), CASE.topk_idx(rank)
    results = []
    for do_expand in (False, True):
        rows, recv_idx, weights, handle, _ = buffer.dispatch(
            x.detach(),
            topk_idx=idx,
            topk_weights=scores.detach(),
            num_experts=CASE.num_experts,
            num_max_tokens_per_rank=most,
            num_sms=num_sms,
            do_expand=do_expand,
            do_cpu_sync=not do_expand,
        )
        assert weights is not None
        first = rank * CASE.experts_per_rank
        if do_expand:
            ends = handle.psum_num_recv_tokens_per_expert
            counts = torch.diff(ends, prepend=ends.new_zeros(1))
            num_rows = int(counts.sum())
            y = torch.full_like(rows, torch.nan)
            y[:num_rows] = experts(rows[:num_rows], counts, first) * weights[:num_rows, None]
        else:
            assert recv_idx is not None
            counts = torch.tensor(handle.num_recv_tokens_per_expert_list)
            token, of_rows = by_expert(recv_idx, weights)
            y = summed(experts(rows[token], counts, first) * of_rows[:, None], token, len(rows))
        out, _, event = buffer.combine(
            y, handle=handle, topk_weights=None, async_with_compute_stream=True
        )
        event.current_stream_wait()
        results.append(out)
        again = buffer.dispatch(out, handle=handle, num_sms=handle.num_sms, do_cpu_sync=False)
        assert len(again[0]) == len(rows)
    expected = dense(rank)(x, scores).detach()
    assert_near(tuple(results), (expected, expected))


def test_the_calls_of_the_first_api() -> None:
    run_on_ranks(2, check_first_api)


def test_the_calls_of_the_second_api() -> None:
    run_on_ranks(2, check_second_api)


# -- the wrappers themselves ----------------------------------------------------------------------


def load(path: Path) -> Any:
    """Return the wrapper, its operations registered for CPUs as they are for CUDA."""
    from ep_megatron import deep_ep

    deep_ep.enable()
    spec = importlib.util.spec_from_file_location("torchtitan_deepep", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module._lib.impl("dispatch", module._dispatch_op_impl, "CPU")
    module._lib.impl("combine", module._combine_op_impl, "CPU")
    return module


def wrapped(wrapper: Any, rank: int, is_second: bool) -> Layer:
    group = dist.group.WORLD
    sizes: dict[str, Any] = {"num_tokens_per_rank": 9} if is_second else {"group": group}
    if is_second:
        wrapper.get_buffer(group, hidden=64, num_max_tokens_per_rank=9, num_topk=3)

    def layer(x: Tensor, scores: Tensor) -> Tensor:
        local = CASE.experts_per_rank
        idx = CASE.topk_idx(rank)
        rows, counts, state = wrapper.dispatch_tokens(
            x, idx, torch.where(idx >= 0, scores, 0), local, CASE.num_experts, **sizes
        )
        done = experts(rows, counts, rank * local)
        out = wrapper.combine_tokens(done, state)
        wrapper.sync_combine()
        assert isinstance(out, Tensor)
        return out

    return layer


def _serve(rank: int, path: Path, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), 2, rank)
    wrapper = load(path)
    is_second = not hasattr(wrapper, "EventHandle")
    layer = wrapped(wrapper, rank, is_second)
    mine = run(layer, rank)
    assert_near(mine, run(dense(rank, scores_first=not is_second), rank))
    kept = [torch.ops.deepep.dispatch.default, torch.ops.deepep.combine.default]

    def selective(x: Tensor, scores: Tensor) -> Tensor:
        out = checkpoint(
            layer,
            x,
            scores,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(kept),
        )
        assert isinstance(out, Tensor)
        return out

    for one, other in zip(run(selective, rank), mine, strict=True):
        assert torch.equal(one, other)
    pipe.send(type(wrapper._buffer).__module__)
    pipe.recv()


@pytest.mark.parametrize(
    "path",
    WRAPPERS or [pytest.param(None, marks=NO_SOURCES)],
    ids=lambda path: path.parts[-5] if path else "",
)
def test_the_wrapper_itself(path: Path) -> None:
    context, store = fresh_processes(), tempfile.mkdtemp(prefix="ep_torchtitan_") + "/store"
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_serve, args=(rank, path, store, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        for ours, _ in pipes:
            assert ours.poll(300), "no answer"
            assert ours.recv() in ("ep_megatron.buffer", "ep_megatron.elastic")
    finally:
        for process in processes:
            process.kill()
            process.join()
