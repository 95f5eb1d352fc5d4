"""Drawn routings through what random programs of a Buffer do not reach.

The second API, whose counts and rows must be those of the first; low-latency calls, by loops over
their definition; and the CUDA kernels on the emulator.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ep_megatron import Buffer, fp8
from ep_megatron.elastic import ElasticBuffer
from ep_megatron.fp8 import FP8
from tests.packed_cases import PackedCase, as_logfmt, check_packed, expected_combined
from tests.profiles import examples
from tests.programs import DrawnCase, numbers, routings
from tests.ranks import run_on_ranks
from tests.test_dispatch import BACKENDS, bits, buffer_of
from tests.test_low_latency import FLAGS, RECIPES, experts_rows
from tests.test_low_latency import buffer_of as packed_buffer_of

NAMES = ("num_recv_tokens_per_expert", "num_valid_tokens_per_expert", "num_recv_tokens_per_rank")


# -- the second API -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elastic:
    """A dispatch of ElasticBuffer, sent again with its handle, and a combine."""

    case: DrawnCase
    dtype: torch.dtype
    is_fp8: bool
    do_expand: bool
    do_cpu_sync: bool
    has_weights: bool
    in_columns: bool
    is_queued: bool

    def rows(self, rank: int) -> Any:
        hidden = 512 if self.is_fp8 else 48
        x = numbers((self.case.num_tokens[rank], hidden), self.dtype, rank)
        return fp8.quantize(x, FP8) if self.is_fp8 else x

    def weights(self, rank: int) -> Tensor | None:
        shape = (self.case.num_tokens[rank], self.case.num_topk)
        return numbers(shape, torch.float32, 100 + rank) if self.has_weights else None


@st.composite
def elastics(draw: st.DrawFn) -> Elastic:
    case = draw(routings(draw(st.sampled_from((1, 2, 3)))))
    case = replace(case, alignment=draw(st.sampled_from((1, 4, 6))))
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float32)))
    return Elastic(case, dtype, *(draw(st.booleans()) for _ in range(6)))


def flat(x: Any) -> list[Tensor]:
    return list(x) if isinstance(x, tuple) else [x]


def same(found: list[str], what: str, mine: Tensor | None, theirs: Tensor | None) -> None:
    """Note `what` where bits differ; rows behind those that came mean nothing."""
    if mine is None or theirs is None:
        if mine is not theirs:
            found.append(what)
        return
    mine = mine[: len(theirs)]
    is_alike = mine.shape == theirs.shape and mine.dtype == theirs.dtype
    if not is_alike or not torch.equal(bits(mine), bits(theirs)):
        found.append(what)


def check_elastic(rank: int, drawn: Elastic, backend: str) -> list[str]:
    """Return what differs from the first API."""
    case, found = drawn.case, list[str]()
    v1 = buffer_of(backend)
    assert dist.group.WORLD is not None
    most = max(*case.num_tokens, 1)
    v2 = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=most, config=v1.config)
    x, idx, weights = drawn.rows(rank), case.topk_idx(rank), drawn.weights(rank)
    options: dict[str, Any] = {
        "topk_idx": idx,
        "topk_weights": weights,
        "num_experts": case.num_experts,
    }
    options["expert_alignment"] = case.alignment
    wanted = v1.dispatch(x, expand=drawn.do_expand, **options)
    stats = torch.ones(case.experts_per_rank, dtype=torch.int32)
    how: dict[str, Any] = {"async_with_compute_stream": drawn.is_queued}
    columns: dict[str, Any] = {"use_tma_aligned_col_major_sf": drawn.in_columns}
    got = v2.dispatch(
        x,
        **options,
        do_expand=drawn.do_expand,
        do_cpu_sync=drawn.do_cpu_sync,
        cumulative_local_expert_recv_stats=stats,
        **columns,
        **how,
    )
    handle, inner = got[3], wanted[4]
    again = v2.dispatch(x, topk_weights=weights, handle=handle, **columns, **how)
    y = torch.full((len(flat(got[0])[0]), 24), torch.nan, dtype=drawn.dtype)
    y[: inner.num_recv_rows] = numbers((inner.num_recv_rows, 24), drawn.dtype, 200 + rank)
    total = v2.combine(y, handle, **how)
    for event in (got[4], again[4], total[2]):
        if drawn.is_queued:
            event.current_stream_wait()
    for number, other in (("first", got), ("second", again)):
        pairs = zip(flat(other[0]), flat(wanted[0]), strict=True)
        for part, (mine, theirs) in zip(("rows", "scales"), pairs, strict=False):
            same(found, f"{part} of the {number}", mine, theirs)
        same(found, f"weights of the {number}", other[2], wanted[2])
    same(found, "recv_topk_idx", got[1], wanted[1])
    same(found, "sums", total[0], v1.combine(y[: inner.num_recv_rows], inner)[0])
    for name in NAMES:
        mine, theirs = getattr(handle.inner, name), getattr(inner, name)
        if list(mine) != list(theirs):
            found.append(name)
    if not torch.equal(stats - 1, handle.num_unaligned_recv_tokens_per_expert):
        found.append("statistics")
    v2.destroy()
    return [f"{backend}, rank {rank}: {what}" for what in found]


@examples(25)
@given(drawn=elastics(), backend=st.sampled_from(BACKENDS))
def test_the_second_api_brings_what_the_first_does(drawn: Elastic, backend: str) -> None:
    results = run_on_ranks(drawn.case.num_ranks, check_elastic, drawn, backend)
    assert not [line for lines in results for line in lines]


# -- low latency ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnPackedCase(PackedCase):
    """A routing given slot by slot."""

    slots: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def topk_idx(self, rank: int, step: int = 0) -> Tensor:
        return torch.tensor(self.slots[rank], dtype=self.idx_dtype).view(-1, self.num_topk)


@st.composite
def packed(draw: st.DrawFn) -> DrawnPackedCase:
    case = draw(routings(draw(st.sampled_from((1, 2, 3)))))
    named = [e for tokens in case.slots for token in tokens for e in token]
    return DrawnPackedCase(
        tuple(len(tokens) for tokens in case.slots),
        case.num_topk,
        case.experts_per_rank,
        capacity=max(1, len(named)),
        hidden=draw(st.sampled_from((128, 512, 640))),
        idx_dtype=case.idx_dtype,
        slots=case.slots,
        scale=draw(st.sampled_from((1.0, 0.25))),  # of which LogFMT leaves some blocks alone
    )


def check_drawn(rank: int, case: DrawnPackedCase, kind: str, mode: str, way: str) -> None:
    """Dispatch and combine on both backends."""
    how: dict[str, Any] = {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}
    flags = {"use_fp8": False} if kind == "ue8m0" and case.hidden % 512 else FLAGS[kind]
    recipe = RECIPES["bf16" if flags == {"use_fp8": False} else kind]
    for backend in ("process_group", "shared_memory"):
        buffer: Buffer = packed_buffer_of(backend)
        idx, weights = case.topk_idx(rank), case.weights(rank)
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            case.x(rank), idx, case.capacity, case.num_experts, **flags, **how
        )
        finish(event, hook, mode)
        check_packed(case, rank, recv, count, handle, recipe)
        if not isinstance(recv, Tensor):
            continue
        rows = experts_rows(case, rank, recv)
        if way == "zero_copy":
            buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
            rows = torch.full_like(rows, torch.nan)
        out, event, hook = buffer.low_latency_combine(
            rows,
            idx,
            weights,
            handle,
            zero_copy=way == "zero_copy",
            use_logfmt=way == "logfmt",
            **how,
        )
        finish(event, hook, mode)
        as_sent = as_logfmt if way == "logfmt" else Tensor.float
        assert torch.equal(bits(out), bits(expected_combined(case, rank, as_sent=as_sent)))


def finish(event: Any, hook: Any, mode: str) -> None:
    if mode == "async":
        event.current_stream_wait()
    if mode == "hook":
        hook()


@examples(50)
@given(
    case=packed(),
    kind=st.sampled_from(("bf16", "bf16", "fp8", "round", "ue8m0")),
    mode=st.sampled_from(("sync", "async", "hook")),
    way=st.sampled_from(("copy", "zero_copy", "logfmt")),
)
def test_low_latency_calls_are_their_definition(
    case: DrawnPackedCase, kind: str, mode: str, way: str
) -> None:
    run_on_ranks(case.num_ranks, check_drawn, case, kind, mode, way)


# -- CUDA kernels ---------------------------------------------------------------------------------


@st.composite
def small(draw: st.DrawFn) -> DrawnCase:
    case = draw(routings(draw(st.sampled_from((1, 2, 3)))))
    tokens = tuple(len(tokens) for tokens in case.slots)
    alignment = draw(st.sampled_from((1, 3, 8)))
    return replace(case, num_tokens=tokens, tile=1, hidden=16, alignment=alignment)


@examples(10)
@given(case=small(), expand=st.booleans(), dtype=st.sampled_from((torch.bfloat16, torch.float32)))
def test_the_emulated_kernels_give_the_references_bits(
    case: DrawnCase, expand: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")
    from tests.cuda.emulated import Ranks
    from tests.test_cuda_backend import check_case

    ranks = Ranks(case.num_ranks)
    ranks.run(check_case, case, dtype, expand)
    assert ranks.machine.report() == []
