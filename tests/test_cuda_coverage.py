"""Every basic block of the kernels' PTX runs in some emulated call, or is named with a reason.

The calls are compared with the reference bit for bit; what they leave out is counted.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ep_megatron import fp8
from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.backends.device import Launch
from ep_megatron.config import BufferConfig
from ep_megatron.fp8 import MXFP8, Fp8Recipe
from tests.routing import Case
from tests.test_dispatch import bits

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from ep_megatron import _cuda
from ep_megatron.backends.cuda_nodes import CudaNodesBackend
from tests.cuda.buffers import Buffers, NodeBuffers
from tests.cuda.calls import FLOATS, RECIPES, Drawn, check, check_drawn
from tests.cuda.emulated import EmulatedDevice, Ranks
from tests.cuda.nic import Nodes
from tests.cuda.packed_graphs import give_bad_indices
from tests.cuda.packed_workloads import keep, late_rows, read_late
from tests.cuda.within import (
    LATE,
    check_drawn_within,
    check_failures,
    check_reduced_within,
    check_within,
)
from tests.cuda.workloads import check_lost_within, lose_within
from tests.emulator.coverage import Coverage
from tests.emulator.machine import Fault, Machine
from tests.test_cuda_backend import (
    REPEATED,
    check_errors,
    check_late,
    check_mixed,
    check_reduced,
    no_report,
    routing_of,
)
from tests.test_cuda_low_latency import (
    TIMEOUT,
    bad_handles,
    be_named,
    come_late,
    many_tokens,
    mask_by_hand,
)
from tests.test_cuda_nodes import CASES as NODE_CASES
from tests.test_cuda_nodes import check as check_nodes
from tests.test_cuda_nodes import check_late as check_late_nodes
from tests.test_cuda_nodes import check_lost, lossy
from tests.test_cuda_sync_free import check_late as check_late_within
from tests.test_low_latency import CASES as PACKED_CASES
from tests.test_low_latency import RECIPES as PACKED_RECIPES
from tests.test_low_latency import check_bad_input_of, check_cases

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
LEAST = 0.98  # of all blocks; and none is missed for a reason that is not below
# A block that no test reaches: what its source lines hold, and why nothing gets there.
_LONG = "the long division of 64-bit numbers, for 2^32 bytes, tokens or rows and more"
_FEW = "a strided loop goes round again; the bound is below the number of threads"
UNREACHABLE = {
    "(args.num_tokens + num_warps - 1) / num_warps": _LONG,
    "(valid + args.alignment - 1) / args.alignment": _LONG,
    "(count.total + args.alignment - 1) / args.alignment": _LONG,
    "i < kLoads; ++i)": _LONG,
    "i < num_routes; i += ": _LONG,
    "left = addends.rows; left != 0;": "no rows, where rows alone are summed: they are two or more",
    "const int64_t num_warps = static_cast<int64_t>(gridDim.x)": _LONG,  # by them
    "i < static_cast<int>(sizeof(PostHead) / 4)": _FEW,
    "reinterpret_cast<const uint32_t*>(&args.head)[i]": _FEW,
    "rank < kMaxRanks; rank += kNotifyThreads": _FEW,
    "post.per_rank[rank] = 0": _FEW,
    "i < num_ranks * words_per_head": "four rounds, with 70 ranks and more",
    ".head)[i % words_per_head]": "four rounds, with 70 ranks and more",
    "i < num_ranks * num_ranks; i += kNotifyThreads": "four rounds, with 56 ranks and more",
    "posts[i / num_ranks].per_rank[i % num_ranks]": "four rounds, with 56 ranks and more",
    "i < num_ranks * args.num_nodes; i += kNotifyThreads": "four rounds; there are three",
    "posts[i / args.num_nodes].per_node[i % args.num_nodes]": "four rounds; there are three",
    "i < kExpertNumbers + 2 * args.experts_per_rank": "four rounds; there are three at the most",
    "args.numbers[i] = 0": "four rounds; there are three at the most",
    "i < static_cast<int>(sizeof(CrossPlan) / 4)": _FEW,
    "reinterpret_cast<int32_t*>(args.piles)[i] = 0": _FEW,
    "i < num_nodes; i += ": _LONG,
    "if (pile == nullptr) return {0, num_tokens}": "a pile to cast: rows cross as they were cast",
    "for (int other = 0; other < lanes_per_token; ++other)": "three lanes more: a power of two",
}
LOW_LATENCY = "ep_packed_"
OTHERS = ("host_waits", LOW_LATENCY)  # the rest belongs to the first test


def drawn_calls() -> Iterator[Machine]:
    for num_ranks, num_calls in ((2, 108), (8, 36)):
        ranks = Ranks(num_ranks)
        ranks.run(check_drawn, range(num_calls))
        no_report(ranks)
        yield ranks.machine


def large_calls() -> Iterator[Machine]:
    """Enough tokens for many blocks of the scan, and enough experts for all threads of notify."""
    tokens = Case("tokens", (1100, 40), num_topk=8, experts_per_rank=12, hidden=72, alignment=4)
    experts = Case("experts", (40, 3), num_topk=8, experts_per_rank=512, hidden=8)
    config = BufferConfig(timeout=1e9, num_sms=11)
    ranks = Ranks(2, config=config)
    for case in (tokens, experts):
        for expand in (False, True):
            dtype = torch.bfloat16
            drawn = Drawn(case, dtype, dtype, expand, torch.float64, None, False, False, 0)
            ranks.run(check, drawn)
    no_report(ranks)
    yield ranks.machine


def long_rows() -> Iterator[Machine]:
    """Padding rows with many scales; and much to stage for one block."""
    ranks = Ranks(2)
    for hidden in (5632, 7168):  # loops that the compiler unrolled by four end at three and two
        case = Case("scales", (3, 2), hidden=hidden, alignment=8)
        for by_caller, dtype in ((True, FLOATS[0]), *((False, dtype) for dtype in FLOATS[:3])):
            ranks.run(check, Drawn(case, dtype, dtype, True, FLOATS[3], MXFP8, by_caller, False, 0))
    yield ranks.machine
    ranks = Ranks(8)
    case = Case("sums", (9, *[0] * 7), num_topk=17, hidden=8)
    for dtype in FLOATS:
        for weights in FLOATS[2:]:
            ranks.run(check, Drawn(case, dtype, dtype, False, weights, None, False, True, 0))
    yield ranks.machine
    ranks = Ranks(1, config=BufferConfig(timeout=1e9, num_sms=1))
    case = Case("rows", (90,), num_topk=1, hidden=2056)
    ranks.run(check, Drawn(case, FLOATS[0], FLOATS[0], False, FLOATS[2], None, False, False, 0))
    yield ranks.machine


def reduced_calls() -> Iterator[Machine]:
    holes = Case("reduced", (9, 40), num_topk=8, alignment=4, hidden=1032, style="holes")
    config = BufferConfig(timeout=1e9, num_sms=2, reduce_before_combine=True)
    for case in (holes, REPEATED):
        ranks, mixed = Ranks(2, config=config), Ranks(2)
        for dtype in FLOATS:
            ranks.run(check_reduced, case, dtype)
            ranks.run(check_reduced_within, case, dtype)
            mixed.run(check_mixed, case, dtype)
        for each in (ranks, mixed):
            no_report(each)
            yield each.machine


def calls_within() -> Iterator[Machine]:
    """Calls in which no host waits."""
    for num_ranks, num_calls in ((2, 48), (8, 36)):
        ranks = Ranks(num_ranks)
        ranks.run(check_drawn_within, range(num_calls))
        no_report(ranks)
        yield ranks.machine
    ranks = Ranks(3)
    for case in (LATE, replace(LATE, num_tokens=(200, 90, 3), num_topk=8)):
        ranks.run(check_failures, case)
    no_report(ranks)
    yield ranks.machine
    ranks = Ranks(3, config=BufferConfig(timeout=3.0, num_sms=2))
    with pytest.raises(Fault, match="trap"):
        ranks.run(check_late_within)
    yield ranks.machine


def several_nodes() -> Iterator[Machine]:
    """Sums of rows whose places the host knows; ranks and rows that do not come."""
    for layout, idx_dtype in (("AB", torch.int32), ("ABCD", torch.int64)):
        nodes = Nodes(layout)
        case = replace(NODE_CASES[len(layout)], idx_dtype=idx_dtype)
        for dtype in FLOATS:
            nodes.run(check_nodes, case, layout, dtype, False)
        nodes.run(check_double_weights, case)
        for at, dtype in enumerate(FLOATS):
            nodes.run(check_within, case, dtype, bool(at % 2))
        yield nodes.machine
    nodes = Nodes("AABB")
    nodes.run(check_failures, replace(LATE, num_tokens=(5, 6, 7, 2)))
    yield nodes.machine
    nodes = Nodes("AB")
    nodes.run(many_bad_indices)
    yield nodes.machine
    nodes = Nodes("AB", timeout=0.05)
    lose_within(nodes, 0)
    nodes.run(check_lost_within, NODE_CASES[2])
    yield nodes.machine
    nodes = Nodes("AABB", timeout=0.05)
    nodes.run(check_late_nodes, NODE_CASES[4])
    yield nodes.machine
    nodes = Nodes("AB", timeout=0.02)
    lossy(nodes, 0)
    nodes.run(check_lost, NODE_CASES[2])
    yield nodes.machine


def many_bad_indices(backend: Backend, _reference: Backend) -> None:
    """Many tokens without a way."""
    assert isinstance(backend, CudaNodesBackend)
    idx = torch.full((4000, 1), 2)
    routing = Routing(idx, 2, num_worst_tokens=8)
    _, handle = backend.dispatch_within(Rows(torch.zeros(len(idx), 4)), routing)
    with pytest.raises(ValueError, match="topk_idx"):
        handle.check()


def check_double_weights(backend: Backend, _reference: Backend, case: Case) -> None:
    """Weights that every rank returns as they came; and none."""
    for expand in (False, True):
        weights = case.weights(backend.rank, torch.float64)
        routing = Routing(case.topk_idx(backend.rank), case.num_experts, expand, case.alignment)
        x = case.x(backend.rank, torch.float32)
        backend.dispatch(Rows(x), routing)
        sent = Rows(x, topk_weights=weights)
        received, handle = backend.dispatch(sent, routing)
        back = backend.combine(received, handle)[1]
        assert back is not None
        assert torch.equal(back, weights.where(routing.topk_idx >= 0, 0))


def calls_that_fail() -> Iterator[Machine]:
    for idx_dtype in (torch.int32, torch.int64):
        ranks = Ranks(3)
        ranks.run(check_errors, Case("errors", (5, 6, 7), idx_dtype=idx_dtype))
        yield ranks.machine
    ranks = Ranks(3, config=BufferConfig(timeout=3.0, num_sms=2))
    ranks.run(check_late, Case("late", (5, 6, 7)))
    yield ranks.machine
    yield rows_that_do_not_arrive()


class Forgetful(EmulatedDevice):
    """A device that dies after its rank has met the others: its rows never come."""

    def launch(self, launch: Launch) -> None:
        """See `Device.launch`."""
        if launch.kernel != "ep_arrive_kernel":
            super().launch(launch)


def check_no_arrival(backend: Backend, _reference: Backend, case: Case) -> None:
    x = case.x(backend.rank, torch.bfloat16)
    # Rank 1 has its own rows; whether the machine stops while it looks at them is open.
    expected: AbstractContextManager[object] = suppress(Fault)
    if backend.rank == 0:
        expected = pytest.raises(Fault, match="trap")
    with expected:
        backend.dispatch(Rows(x), routing_of(case, backend.rank))


def rows_that_do_not_arrive() -> Machine:
    ranks = Ranks(2, config=BufferConfig(timeout=3.0, num_sms=2))
    ranks.devices[1].__class__ = Forgetful
    ranks.run(check_no_arrival, Case("no arrival", (5, 6)))
    return ranks.machine


def cast(machine: Machine, x: torch.Tensor, recipe: Fp8Recipe) -> None:
    """The cast on its own: data and scales of `fp8.quantize`, without a destination."""
    num_rows, hidden = x.shape
    data, scales = fp8.quantize(x, recipe)
    device = EmulatedDevice(machine, 0)
    data_out = device.output(data.dtype, data.shape)
    scales_out = device.output(scales.dtype, scales.shape)
    args = _cuda.CastArgs(
        x=device.input(x).address,
        data=data_out.address,
        scales=scales_out.address,
        num_tokens=num_rows,
        hidden=hidden,
        recipe=_cuda.CastRecipe(recipe.block, recipe.scales, recipe.min_amax),
    )
    name = str(x.dtype).removeprefix("torch.")
    device.launch(_cuda.plan_cast(args, getattr(_cuda.DType, name), 2))
    assert torch.equal(bits(device.tensor(data_out)), bits(data))
    assert torch.equal(bits(device.tensor(scales_out)), bits(scales))


def casts_alone() -> Iterator[Machine]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        machine = Ranks(1).machine
        for recipe in RECIPES:
            if recipe.layout == "row_major":
                x = Case("cast", (37,), hidden=1536).x(0, torch.float64)
                x *= torch.exp2(torch.arange(1536) % 37 - 18)
                x = x.to(dtype)
                x[3, 100], x[4, 200], x[5] = torch.nan, -torch.inf, 0
                cast(machine, x, recipe)
        assert machine.report() == []
        yield machine


def reason(block: str) -> str:
    """Return why a block, `ptx:LINE FILE:LINE in FILE:LINE`, is never reached; or nothing."""
    for file, line in re.findall(r"(\w+\.cuh?):(\d+)", block):
        path = next(SOURCES.parent.glob(f"*/{file}"))
        text = path.read_text().splitlines()[int(line) - 1]
        for fragment, why in UNREACHABLE.items():
            if fragment in text:
                return why
    return ""


def low_latency_calls() -> Iterator[Machine]:
    if find_spec("ep_megatron._nvshmem") is not None:  # some blocks are of several nodes
        nodes = NodeBuffers("AB")
        cases = [case for case in PACKED_CASES.values() if case.num_ranks == 2]
        nodes.call(check_cases, cases, list(PACKED_RECIPES))
        yield nodes.machine
        nodes = NodeBuffers("AB", timeout=TIMEOUT, enable_shrink=True)
        late_rows(nodes)
        yield nodes.machine
        nodes = NodeBuffers("ABA", enable_shrink=True)
        nodes.call(mask_by_hand, threading.Barrier(3).wait)
        yield nodes.machine
    for num_ranks in (2, 3, 8):
        cases = [case for case in PACKED_CASES.values() if case.num_ranks == num_ranks]
        buffers = Buffers(num_ranks)
        buffers.call(check_cases, cases, list(PACKED_RECIPES))
        yield buffers.machine
    buffers = Buffers(2, window_bytes=16 << 20)
    buffers.call(many_tokens)
    buffers.call(bad_handles)
    yield buffers.machine
    buffers = Buffers(2)
    buffers.call(check_bad_input_of)
    yield buffers.machine
    buffers = Buffers(3, enable_shrink=True)
    buffers.call(mask_by_hand, threading.Barrier(3).wait)
    yield buffers.machine
    for shrinks, late in ((False, keep), (True, read_late)):
        buffers = Buffers(2, timeout=TIMEOUT, enable_shrink=shrinks)
        late(buffers)
        yield buffers.machine
    buffers = Buffers(3, timeout=TIMEOUT)
    buffers.call(be_named)
    yield buffers.machine
    buffers = Buffers(3, timeout=TIMEOUT, enable_shrink=True)
    buffers.call(come_late, threading.Event())
    yield buffers.machine
    buffers = Buffers(3)
    buffers.call(give_bad_indices, buffers.devices)
    yield buffers.machine


def check_missed(coverage: Coverage, wanted: Callable[[str], bool]) -> None:
    """Every block of these kernels that has not run must have a reason."""
    blocks = coverage.blocks = {k: b for k, b in coverage.blocks.items() if wanted(k)}
    print(coverage.table())
    found = {
        f"{kernel} {block}": reason(block) for kernel in blocks for block in coverage.missed(kernel)
    }
    for block, why in found.items():
        print(block, "-", why)
    assert all(found.values())
    assert 1 - len(found) / sum(map(len, blocks.values())) >= LEAST


def test_every_block_of_the_kernels_runs_or_has_a_reason() -> None:
    coverage = Coverage()
    for machines in (
        drawn_calls,
        large_calls,
        long_rows,
        reduced_calls,
        calls_within,
        several_nodes,
        calls_that_fail,
        casts_alone,
    ):
        for machine in machines():
            coverage.add(machine)
    check_missed(coverage, lambda kernel: not kernel.startswith(OTHERS))


def test_every_block_of_the_low_latency_kernels_runs_or_has_a_reason() -> None:
    coverage = Coverage()
    for machine in low_latency_calls():
        coverage.add(machine)
    check_missed(coverage, lambda kernel: kernel.startswith(LOW_LATENCY))
    assert len(coverage.blocks) in (10, 12)


def test_every_reason_is_that_of_a_line() -> None:
    texts = [path.read_text() for path in SOURCES.glob("*.cu*")]
    for fragment in UNREACHABLE:
        assert any(fragment in text for text in texts), fragment
