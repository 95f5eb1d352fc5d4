"""A whole dispatch, experts, combine in a graph of an emulated GPU: replayed with other routings.

What a real graph does beside that, tests/gpu/test_gpu_graphs.py tries.
"""

from dataclasses import replace

import pytest
import torch

from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.fp8 import FP8
from tests.routing import Case

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from ep_megatron.backends.cuda import CudaBackend
from tests.cuda.emulated import EmulatedDevice, Ranks
from tests.cuda.graphs import CASE, SIZES, Layer, eager, replayed, run
from tests.cuda.layers import new_buffer
from tests.cuda.within import same

TOO_MANY = "num_worst_tokens = {} rows on a rank"


@pytest.mark.parametrize(
    ("num_tokens", "expand"),
    [(num_tokens, bool(at % 2)) for at, num_tokens in enumerate(SIZES)],
    ids=["2_ranks_by_rank", "3_ranks_by_expert", "4_ranks_by_rank", "8_ranks_by_expert"],
)
def test_a_layer_is_replayed_with_other_routings(num_tokens: tuple[int, ...], expand: bool) -> None:
    ranks = Ranks(len(num_tokens))
    run(ranks, replayed, replace(CASE, num_tokens=num_tokens), expand, None)


@pytest.mark.parametrize("mode", ["race", "weak"])
@pytest.mark.parametrize("seed", range(2))
def test_no_interleaving_of_replays_races(mode: str, seed: int) -> None:
    run(Ranks(3, seed, mode), replayed, CASE, bool(seed), None)


def test_rows_are_cast_in_a_graph() -> None:
    run(Ranks(2), replayed, replace(CASE, num_tokens=(6, 5), hidden=256), True, FP8)


def overflowing(
    backend: CudaBackend, reference: Backend, devices: list[EmulatedDevice], case: Case
) -> None:
    """A replay whose rows do not fit moves nothing and says so; the one after it is as any."""
    rank, device, buffer = backend.rank, devices[backend.rank], new_buffer(backend)
    capacity = sum(case.num_tokens) - 1
    layer = Layer.of(replace(case, style="local"), rank, False, None, capacity)
    layer.call(buffer, device)
    with device.capture() as graph:
        (summed, *_), handle = layer.call(buffer, device)
    for _ in range(2):
        layer.route("first_rank", rank, 1)
        graph.replay()
        assert handle.has_overflowed
        assert not summed.any()
        with pytest.raises(ValueError, match=TOO_MANY.format(capacity)):
            handle.check()
        layer.route("local", rank, 2)
        graph.replay()
        assert not handle.has_overflowed
        assert summed.any() == bool(len(summed))
        handle.check()
    layer.route("first_rank", rank, 1)
    graph.replay()  # and who does not look hears of it in the next call
    with pytest.raises(ValueError, match=TOO_MANY.format(capacity)):
        layer.call(buffer, device)
    eager(backend, reference, case)


@pytest.mark.parametrize("mode", ["race", "weak"])
def test_too_many_rows_in_a_replay(mode: str) -> None:
    run(Ranks(3, 0, mode), overflowing, CASE)


def refused(
    backend: CudaBackend, reference: Backend, devices: list[EmulatedDevice], case: Case
) -> None:
    """What a graph may not hold raises while it is captured, and changes nothing."""
    rank, device, buffer = backend.rank, devices[backend.rank], new_buffer(backend)
    rows, handle = backend.dispatch(
        Rows(case.x(rank, torch.float32)), Routing(case.topk_idx(rank), case.num_experts)
    )
    layer = Layer.of(case, rank, False, None, 20)
    larger = replace(layer, capacity=21, x=torch.zeros(len(layer.x), 4096))
    waiting = {
        "dispatch": lambda: eager(backend, reference, case),
        "cached dispatch": lambda: backend.dispatch_again(
            Rows(case.x(rank, torch.float32)), handle
        ),
        "combine": lambda: backend.combine(rows, handle),
        "dispatch: expected": lambda: larger.call(buffer, device),  # needs room
    }
    for operation, call in waiting.items():
        with (
            device.capture(),
            pytest.raises(RuntimeError, match=f"{operation}.* while a CUDA graph is captured"),
        ):
            call()
    layer.check(*layer.call(buffer, device), reference)
    eager(backend, reference, case)


def test_what_waits_on_the_host_is_refused_in_a_capture() -> None:
    run(Ranks(3), refused, CASE)


def kept_block(
    backend: CudaBackend, reference: Backend, devices: list[EmulatedDevice], case: Case
) -> None:
    """A larger call after a capture leaves the graph its memory."""
    rank, device, buffer = backend.rank, devices[backend.rank], new_buffer(backend)
    layer = Layer.of(case, rank, True, None, 80)
    layer.call(buffer, device)
    with device.capture() as graph:
        given, handle = layer.call(buffer, device)
    wide = replace(case, hidden=2048)
    larger = Layer.of(wide, rank, True, None, 80)
    larger.check(*larger.call(buffer, device), reference)
    lent = [eager(backend, reference, wide) for _ in range(2)]
    layer.route("holes", rank, 3)
    graph.replay()
    layer.check(given, handle, reference)
    for mine, other in lent:
        same(mine.x, other.x)


def test_a_graph_keeps_its_memory() -> None:
    run(Ranks(3), kept_block, CASE)
