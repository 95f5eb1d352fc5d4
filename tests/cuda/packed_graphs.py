"""Low-latency calls captured into graphs of emulated GPUs, and replayed with other tokens.

See tests/cuda/graphs.py, which makes them with many interleavings.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_megatron import Buffer, fp8
from ep_megatron.backends.packed import LowLatencyHandle
from ep_megatron.fp8 import Fp8Recipe
from tests.cuda.buffers import Buffers, NodeBuffers
from tests.cuda.emulated import EmulatedDevice
from tests.packed_cases import PackedCase, check_packed, expected_combined, expert_output
from tests.test_low_latency import FLAGS, RECIPES

HOWS = ("plain", "hooks", "zero_copy", "odd")
SIZES = {2: (6, 3), 3: (5, 0, 8), 4: (4, 6, 0, 3), 8: (3, 4, 5, 2, 0, 4, 5, 1)}  # tokens by rank
LAYOUTS = ("AB", "ABA", "AABB")


@dataclass(frozen=True)
class CastCase(PackedCase):
    """A case whose tokens are what experts see of them."""

    recipe: Fp8Recipe | None = None

    def x(self, rank: int, step: int = 0) -> Tensor:
        x = super().x(rank, step)
        return x if self.recipe is None else fp8.dequantize(*fp8.quantize(x, self.recipe), x.dtype)


@dataclass
class Step:
    """A dispatch, the experts and a combine of one rank, on memory that stays where it is."""

    case: PackedCase
    rank: int
    kind: str
    x: Tensor
    topk_idx: Tensor
    weights: Tensor

    @staticmethod
    def of(case: PackedCase, rank: int, kind: str) -> "Step":
        return Step(case, rank, kind, case.x(rank), case.topk_idx(rank), case.weights(rank))

    def load(self, number: int) -> None:
        """Put other tokens and another routing where those before were."""
        self.x.copy_(self.case.x(self.rank, number))
        self.topk_idx.copy_(self.case.topk_idx(self.rank, number))
        self.weights.copy_(self.case.weights(self.rank, number))

    def dispatch(self, buffer: Buffer, with_hook: bool) -> tuple[Any, ...]:
        case = self.case
        return buffer.low_latency_dispatch(
            self.x,
            self.topk_idx,
            case.capacity,
            case.num_experts,
            return_recv_hook=with_hook,
            **FLAGS[self.kind],
        )

    def experts(self, device: EmulatedDevice, recv: Any, into: Tensor) -> None:
        first = self.rank * self.case.experts_per_rank

        def compute() -> None:
            x = recv if isinstance(recv, Tensor) else dequantized(recv)
            for expert, rows in enumerate(x):
                into[expert] = expert_output(rows, first + expert)

        device.do(compute)

    def combine(self, buffer: Buffer, rows: Tensor, handle: LowLatencyHandle, **how: Any) -> Any:
        return buffer.low_latency_combine(rows, self.topk_idx, self.weights, handle, **how)

    def check(self, given: list[Any], number: int, masked: tuple[int, ...] = ()) -> None:
        """Compare with the definition what calls have given; see `calls`."""
        recipe = RECIPES[self.kind]
        (recv, count, handle), *sums = given
        check_packed(self.case, self.rank, recv, count, handle, recipe, number, masked)
        case = self.case
        cast = CastCase(case.num_tokens, case.num_topk, hidden=case.hidden, recipe=recipe)
        for out in sums:
            assert torch.equal(out, expected_combined(cast, self.rank, number, masked))


def dequantized(recv: tuple[Tensor, Tensor]) -> Tensor:
    data, scales = recv
    rows = [
        fp8.dequantize(data[e], scales[e].contiguous(), torch.bfloat16) for e in range(len(data))
    ]
    return torch.stack(rows)


def calls(step: Step, buffer: Buffer, device: EmulatedDevice, how: str) -> list[Any]:
    """Make calls; return what the first dispatch has brought, and the sums.

    `hooks` has two calls under way at once, and runs the hook of the later first; `odd` makes three
    calls, so that each place is another's in the next replay.
    """
    case = step.case
    rows = torch.zeros(
        case.experts_per_rank, case.num_ranks * case.capacity, case.hidden, dtype=torch.bfloat16
    )
    if how == "hooks":
        first, second = (step.dispatch(buffer, True) for _ in range(2))
        second[-1]()
        first[-1]()
        step.experts(device, first[0], rows)
        sums = [
            step.combine(buffer, rows, dispatch[2], return_recv_hook=True)
            for dispatch in (first, second)
        ]
        for _, _, hook in reversed(sums):
            hook()
        return [first[:3], *(out for out, *_ in sums)]
    recv, count, handle, *_ = step.dispatch(buffer, False)
    if how == "zero_copy":
        rows = buffer.get_next_low_latency_combine_buffer(handle)
    step.experts(device, recv, rows)
    out, *_ = step.combine(buffer, rows, handle, zero_copy=how == "zero_copy")
    if how == "odd":
        step.dispatch(buffer, False)
    return [(recv, count, handle), out]


def replayed(
    rank: int, buffer: Buffer, devices: list[EmulatedDevice], case: PackedCase, kind: str, how: str
) -> None:
    """Capture calls, replay them with other tokens, and make such calls in between."""
    device, step = devices[rank], Step.of(case, rank, kind)
    num_launches = len(device.launches)
    with device.capture() as graph:
        given = calls(step, buffer, device, how)
    assert len(device.launches) > num_launches
    for number in range(4):
        step.load(number)
        graph.replay()
        step.check(given, number)
        if number == 1:
            step.check(calls(step, buffer, device, how), number)
    buffer.low_latency_check()


def run(buffers: Buffers | NodeBuffers, kind: str, how: str) -> None:
    """Raise where a bit is wrong or anything is reported."""
    num_ranks = buffers.num_ranks
    case = PackedCase(SIZES[num_ranks], hidden=512 if kind == "ue8m0" else 128)
    buffers.call(replayed, buffers.devices, case, kind, how)
    assert buffers.machine.report() == []


def masked(rank: int, buffer: Buffer, device: EmulatedDevice, meet: Callable[[], object]) -> None:
    """Masks change between replays: rank 1 and the others go on without each other."""
    case = PackedCase(SIZES[3])
    step = Step.of(case, rank, "bf16")
    with device.capture() as graph:
        given = calls(step, buffer, device, "plain")
    graph.replay()
    step.check(given, 0)
    meet()
    others = (0, 2) if rank == 1 else (1,)
    for other in others:
        buffer.low_latency_update_mask_buffer(other, True)
    meet()
    for number in range(1, 4):
        step.load(number)
        graph.replay()
        step.check(given, number, others)
    meet()
    buffer.low_latency_clean_mask_buffer()
    meet()
    step.load(4)
    graph.replay()
    step.check(given, 4)
    buffer.low_latency_check()


def run_masked(buffers: Buffers | NodeBuffers) -> None:
    """Raise where a bit is wrong or anything is reported."""
    meet = threading.Barrier(buffers.num_ranks).wait
    buffers.call(lambda rank, buffer: masked(rank, buffer, buffers.devices[rank], meet))
    assert buffers.machine.report() == []


def captured(rank: int, buffer: Buffer, device: EmulatedDevice) -> Any:
    """Return a step, its graph and what that gives."""
    one = Step.of(PackedCase(SIZES[3]), rank, "bf16")
    with device.capture() as graph:
        given = calls(one, buffer, device, "plain")
    return one, graph, given


def give_bad_indices(rank: int, buffer: Buffer, devices: list[EmulatedDevice]) -> None:
    """Replays that all ranks refuse bring nothing, are told of once, and harm no later one."""
    one, graph, given = captured(rank, buffer, devices[rank])
    (_, count, handle), out = given

    def replay_twice(number: int) -> None:
        one.load(number)
        if rank == 2:
            one.topk_idx[2, 1] = 99
        graph.replay()
        for nothing in (count, handle.packed_recv_layout_range, out):
            assert not nothing.any()
        one.load(number + 1)
        graph.replay()
        one.check(given, number + 1)

    says = r"dispatch of a CUDA graph.*got 99 for token 2"
    replay_twice(0)
    with pytest.raises(ValueError, match=says):
        buffer.low_latency_check()
    buffer.low_latency_check()
    replay_twice(2)
    with pytest.raises(ValueError, match=says):  # who does not look hears of it in the next call
        one.dispatch(buffer, False)
    one.check(calls(one, buffer, devices[rank], "plain"), 3)


def make(mode: str, layout: str, seed: int) -> None:
    """One interleaving of calls, of another kind for every seed; `layout`: each rank's node."""
    kinds = [("bf16", "plain"), ("fp8", "hooks"), ("bf16", "zero_copy"), ("ue8m0", "odd")]
    buffers: Buffers | NodeBuffers
    if len(set(layout)) > 1:
        buffers = NodeBuffers(layout, seed, mode, enable_shrink=True)
    else:
        buffers = Buffers(len(layout), seed, mode, enable_shrink=True)
    run(buffers, *kinds[seed % len(kinds)])
    if buffers.num_ranks == 3:
        run_masked(buffers)
