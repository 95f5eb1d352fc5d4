"""A layer captured into a graph of an emulated GPU, and replayed with other routings.

`python -m tests.cuda.graphs` does so with many interleavings, in race and in weak mode, and with
low-latency calls (tests/cuda/packed_graphs.py). The graph is that of tests/cuda/emulated.py: the
same launches and copies again, with the memory of then.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ep_megatron import Buffer, fp8
from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.backends.cuda_nodes import CudaNodesBackend
from ep_megatron.fp8 import FP8, Fp8Recipe
from ep_megatron.handle import DeviceHandle
from tests.cuda import packed_graphs
from tests.cuda.emulated import EmulatedDevice, Ranks
from tests.cuda.layers import new_buffer, run_with_buffers
from tests.cuda.seeds import has_failed
from tests.cuda.within import same
from tests.routing import Case

STYLES = ("random", "nothing", "first_rank", "holes", "repeated")
CASE = Case("graph", (9, 4, 0), num_topk=3, alignment=4)
SIZES = ((9, 6), (5, 0, 7), (4, 5, 6, 3), (3, 4, 5, 2, 3, 4, 5, 1))  # tokens by rank


@dataclass
class Layer:
    """A layer of one rank on memory that stays where it is, and what it gives.

    Its experts are sines; the second dispatch goes along the handle, as a backward pass does.
    """

    case: Case
    expand: bool
    recipe: Fp8Recipe | None
    capacity: int
    x: Tensor
    topk_idx: Tensor
    weights: Tensor

    @staticmethod
    def of(case: Case, rank: int, expand: bool, recipe: Fp8Recipe | None, capacity: int) -> "Layer":
        dtype = torch.float32 if recipe is None else torch.bfloat16
        inputs = case.x(rank, dtype), case.topk_idx(rank), case.weights(rank)
        return Layer(case, expand, recipe, capacity, *(tensor.clone() for tensor in inputs))

    def route(self, style: str, rank: int, factor: int) -> None:
        """Put other tokens and another routing where those before were."""
        case = replace(self.case, style=style)
        self.topk_idx.copy_(case.topk_idx(rank))
        self.x.copy_(case.x(rank, torch.float64) * factor)

    def call(self, buffer: Buffer, device: EmulatedDevice) -> tuple[list[Tensor], DeviceHandle]:
        """Return sums, their weights, and the rows of the second dispatch."""
        options: dict[str, Any] = {"fp8": self.recipe}
        received, _, row_weights, counts, handle, _ = buffer.dispatch(
            self.x,
            topk_idx=self.topk_idx,
            topk_weights=self.weights,
            num_experts=self.case.num_experts,
            expert_alignment=self.case.alignment,
            num_worst_tokens=self.capacity,
            expand=self.expand,
            **options,
        )
        assert counts == []
        assert isinstance(handle, DeviceHandle)
        assert row_weights is not None
        y = torch.empty(self.capacity, self.case.hidden, dtype=self.x.dtype)
        device.do(lambda: y.copy_(experts(received, y.dtype)))
        summed, summed_weights, _ = buffer.combine(y, handle, topk_weights=row_weights)
        again, _, again_weights, *_ = buffer.dispatch(
            self.x, handle, topk_weights=self.weights, **options
        )
        assert summed_weights is not None
        assert again_weights is not None
        parts = again if isinstance(again, tuple) else (again,)
        return [summed, summed_weights, again_weights, *parts], handle

    def check(self, given: list[Tensor], handle: DeviceHandle, reference: Backend) -> None:
        """Compare with what the reference gives of the memory as it is."""
        handle.check()
        routing = Routing(self.topk_idx, self.case.num_experts, self.expand, self.case.alignment)
        sent = Rows(self.x, topk_weights=self.weights, fp8=self.recipe)
        rows, known = reference.dispatch(sent, routing)
        received = rows.x if rows.scales is None else (rows.x, rows.scales)
        y = Rows(experts(received, self.x.dtype), topk_weights=rows.topk_weights)
        again = reference.dispatch_again(sent, known)
        parts = [again.topk_weights, again.x, *([] if again.scales is None else [again.scales])]
        num_rows = known.num_recv_rows
        mine = [*given[:2], *(part[:num_rows] for part in given[2:])]
        for one, two in zip(mine, [*reference.combine(y, known), *parts], strict=True):
            same(one, two)


def experts(received: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    rows = fp8.dequantize(*received, dtype) if isinstance(received, tuple) else received
    return rows.double().sin().to(dtype)


def eager(backend: Backend, reference: Backend, case: Case) -> tuple[Rows, Rows]:
    """Make calls for which the host waits; return what came, where it lies, and a copy."""
    rank = backend.rank
    routing = Routing(case.topk_idx(rank), case.num_experts, True, case.alignment)
    rows, handle = backend.dispatch(Rows(case.x(rank, torch.float32)), routing)
    other, known = reference.dispatch(Rows(case.x(rank, torch.float32)), routing)
    same(backend.combine(rows, handle)[0], reference.combine(other, known)[0])
    return rows, other


def replayed(
    backend: CudaBackend | CudaNodesBackend,
    reference: Backend,
    devices: list[EmulatedDevice],
    case: Case,
    expand: bool,
    recipe: Fp8Recipe | None,
) -> None:
    """Capture a layer, replay it with other routings, and make other calls in between."""
    rank, device = backend.rank, devices[backend.rank]
    buffer = new_buffer(backend)
    if isinstance(backend, CudaNodesBackend):  # sums are those of calls that the host waits for
        reference = backend
    capacity = 2 + sum(case.num_tokens) * (case.num_topk if expand else 1)
    capacity += (case.alignment - 1) * case.experts_per_rank * expand
    layer = Layer.of(case, rank, expand, recipe, capacity)
    layer.check(*layer.call(buffer, device), reference)  # there is room from here on
    num_launches = len(device.launches)
    with device.capture() as graph:
        given, handle = layer.call(buffer, device)
    assert len(device.launches) > num_launches
    kept = []
    for at, style in enumerate(STYLES):
        layer.route(style, rank, at + 1)
        graph.replay()
        layer.check(given, handle, reference)
        if at % 2 == 0:
            kept.append(eager(backend, reference, case))
        if at == 1:
            layer.check(*layer.call(buffer, device), reference)
    for mine, other in kept:  # nothing was written to what these calls have lent
        same(mine.x, other.x)


def run(ranks: Ranks, function: Callable[..., Any], *args: Any) -> list[Any]:
    results = run_with_buffers(ranks, function, ranks.devices, *args)
    assert ranks.machine.report() == []
    return results


def main() -> None:
    """Replay layers and low-latency calls with many interleavings."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="interleavings of each layer")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4, 8])
    args = parser.parse_args()
    any_failed = False
    for mode, num_tokens, expand in itertools.product(("race", "weak"), SIZES, (False, True)):
        if len(num_tokens) not in args.ranks:
            continue
        what = f"{mode} EP {len(num_tokens)} {'by expert' if expand else 'by rank'}"
        what += f", {len(STYLES)} replays each"
        make = partial(_make, mode, num_tokens, expand)
        any_failed |= has_failed(what, args.seeds, make)
    layouts = *("A" * num_ranks for num_ranks in packed_graphs.SIZES), *packed_graphs.LAYOUTS
    for mode, layout in itertools.product(("race", "weak"), layouts):
        if len(layout) in args.ranks:
            what = f"{mode} low-latency, ranks on nodes {layout}"
            any_failed |= has_failed(what, args.seeds, partial(packed_graphs.make, mode, layout))
    sys.exit(any_failed)


def _make(mode: str, num_tokens: tuple[int, ...], expand: bool, seed: int) -> None:
    recipe = FP8 if seed % 4 == 3 else None
    hidden = CASE.hidden if recipe is None else 128
    case = replace(CASE, num_tokens=num_tokens, hidden=hidden)
    run(Ranks(len(num_tokens), seed, mode), replayed, case, expand, recipe)


if __name__ == "__main__":
    main()
