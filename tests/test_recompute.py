"""Recomputation sends rows the way of the forward pass: the same bits, nothing counted again."""

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ep_megatron import Buffer, ops, recompute
from tests.megatron_gpt import Case as Training
from tests.megatron_gpt import Layout, model_parallel, train, with_plugin
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import BACKENDS, buffer_of
from tests.test_ops import CASE, assert_no_handles, assert_same, ours, run

Layer = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def counting(buffer: Buffer) -> Iterator[dict[str, int]]:
    """Count what a Buffer asks of its backend, which is where ranks meet."""
    backend: Any = buffer._backend
    names = ("dispatch", "dispatch_again", "combine", "fail")
    counts: dict[str, int] = {}

    def counted(name: str, theirs: Any) -> Any:
        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return theirs(*args, **kwargs)

        return call

    for name in names:
        setattr(backend, name, counted(name, getattr(backend, name)))
    try:
        yield counts
    finally:
        for name in names:
            delattr(backend, name)


def plainly(layer: Layer) -> Layer:
    return lambda x, weights: _tensor(checkpoint(layer, x, weights, use_reentrant=False))


def by_context(layer: Layer, context: Any = recompute.contexts) -> Layer:
    return lambda x, weights: _tensor(
        checkpoint(layer, x, weights, use_reentrant=False, context_fn=context)
    )


def reentrant(layer: Layer) -> Layer:
    return lambda x, weights: _tensor(
        checkpoint(recompute.remember(layer), x, weights, use_reentrant=True)
    )


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


def nested(layer: Layer) -> Layer:
    """Two layers in a region, each a region of its own."""
    inner = by_context(layer)
    return by_context(lambda x, weights: inner(inner(x, weights), weights))


def twice(layer: Layer) -> Layer:
    return lambda x, weights: layer(layer(x, weights), weights)


def check_bits(rank: int, backend: str, expand: bool) -> None:
    """One fresh dispatch, however often it is run, and the bits of a run without checkpoints."""
    buffer = buffer_of(backend)
    eager = ours(rank, backend, expand)
    plain = run(eager, rank)
    # The backward pass brings a combine and a cached dispatch of its own.
    once = {"dispatch": 1, "dispatch_again": 2, "combine": 3}
    keep = [torch.ops.ep_megatron.combine.default]
    selective = functools.partial(
        recompute.contexts, functools.partial(create_selective_checkpoint_contexts, keep)
    )
    for checkpointed, expected in (
        (by_context(eager), once),
        (reentrant(eager), once),
        (by_context(eager, selective), once | {"combine": 2}),
        (plainly(eager), {"dispatch": 2, "dispatch_again": 1, "combine": 3}),
    ):
        with counting(buffer) as counts:
            mine = run(checkpointed, rank)
        assert counts == expected
        assert_same(mine, plain)
        assert_no_handles()
    plain = run(twice(eager), rank)
    with counting(buffer) as counts:
        assert_same(run(nested(eager), rank), plain)
    assert counts["dispatch"] == 2
    assert_no_handles()


def check_retained(rank: int, backend: str) -> None:
    """A graph that is kept is recomputed by every backward pass, each time the same way."""
    x, weights = CASE.x(rank, torch.float64).requires_grad_(), CASE.weights(rank)
    out = by_context(ours(rank, backend, True))(x, weights)
    with counting(buffer_of(backend)) as counts:
        first, second = (
            torch.autograd.grad(out.sum(), x, retain_graph=again)[0] for again in (True, False)
        )
    assert torch.equal(first, second)
    assert "dispatch" not in counts


def check_queued(rank: int, backend: str, capacity: int) -> None:
    """Calls of Buffer itself, queued, without expand: ids, counts and handle come again too."""
    buffer = buffer_of(backend)
    case = Case("queued", (9, 6), alignment=4)
    x, idx, weights = case.x(rank, torch.bfloat16), case.topk_idx(rank), case.weights(rank)

    def send() -> tuple[Any, ...]:
        *received, event = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_experts=case.num_experts,
            expert_alignment=case.alignment,
            num_worst_tokens=capacity,
            async_finish=True,
        )
        event.current_stream_wait()
        rows, _, _ = buffer.combine(received[0], received[4])
        return (*received, rows)

    region = recompute.Region()
    with region.recording():
        first = send()
    with counting(buffer) as counts:
        for _ in range(2):
            with region.replaying():
                second = send()
            num_rows = int(first[4].num_recv_rows_tensor) if capacity else len(first[0])
            assert torch.equal(first[0][:num_rows], second[0][:num_rows])
            for mine, theirs in zip(first[1:3], second[1:3], strict=True):
                assert torch.equal(mine, theirs)
            assert first[3] == second[3]
            assert first[4] is second[4]
            assert torch.equal(first[5], second[5])
            second[1].zero_()  # the caller's own
    assert counts == {"dispatch_again": 2, "combine": 2}


def check_lifetime(rank: int, backend: str) -> None:
    """What is kept goes with the checkpoint, and received rows do not wait for it."""
    x, weights = CASE.x(rank, torch.float64).requires_grad_(), CASE.weights(rank)
    kept: list[weakref.ref[Any]] = []
    rows: list[weakref.ref[Any]] = []
    number = ops.register(buffer_of(backend))

    def spying(x: Tensor, weights: Tensor) -> Tensor:
        received, *_, handle = ops.dispatch(x, CASE.topk_idx(rank), weights, 6, number, False)
        kept.append(weakref.ref(ops._memory("test", handle).handle))
        rows.append(weakref.ref(received.untyped_storage()))
        return _tensor(ops.combine(received, handle, len(x)))

    out = by_context(spying)(x, weights)
    gc.collect()
    assert kept[0]() is not None
    assert rows[0]() is None
    del out
    gc.collect()
    assert kept[0]() is None


def check_errors(rank: int, backend: str) -> None:
    """Another routing on one rank raises on all, before anything goes the wrong way."""
    buffer = buffer_of(backend)
    x, idx = CASE.x(rank, torch.float32), CASE.topk_idx(rank)

    def send(idx: Tensor, **options: Any) -> None:
        buffer.dispatch(x, topk_idx=idx, num_experts=CASE.num_experts, **options)

    region = recompute.Region()
    with region.recording():
        send(idx)
    other = (idx + 1) % CASE.num_experts if rank == 1 else idx
    with region.replaying():
        with pytest.raises(ValueError, match="expected the recomputation to dispatch as the forw"):
            send(other)
        with pytest.raises(ValueError, match="expected at most 1 fresh dispatches in the recompu"):
            send(idx)
    for options in ({"expand": True}, {"expert_alignment": 8}):
        with region.replaying(), pytest.raises(ValueError, match="another Buffer, topk_idx or op"):
            send(idx, **options)
    with region.replaying():
        send(idx)  # the Buffer goes on, and so does the region


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def train_counted(rank: int, options: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """Losses with recomputation and without, and the fresh dispatches of the former."""
    layout, case = Layout(ep=2), Training(num_steps=4, num_microbatches=2)
    with model_parallel(layout), with_plugin("process_group"):
        plain = train(layout, case)
        counts = 0
        dispatch = Buffer.dispatch

        def counted(buffer: Buffer, *args: Any, **kwargs: Any) -> Any:
            nonlocal counts
            with counting(buffer) as calls:
                result = dispatch(buffer, *args, **kwargs)
            counts += calls.get("dispatch", 0)
            return result

        Buffer.dispatch = counted  # type: ignore[method-assign,assignment]
        try:
            again = train(layout, replace(case, options=options))
        finally:
            Buffer.dispatch = dispatch  # type: ignore[method-assign]
    return plain, again, counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expand", [False, True], ids=["by_rank", "by_expert"])
def test_bits_without_counting_again(backend: str, expand: bool) -> None:
    run_on_ranks(2, check_bits, backend, expand)


def test_a_retained_graph_is_recomputed_more_than_once() -> None:
    run_on_ranks(2, check_retained, "shared_memory")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [0, 32], ids=["exact", "capacity"])
def test_queued_calls(backend: str, capacity: int) -> None:
    run_on_ranks(2, check_queued, backend, capacity)


def test_what_is_kept_goes_with_the_checkpoint() -> None:
    run_on_ranks(2, check_lifetime, "shared_memory")


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_routing_raises_on_every_rank(backend: str) -> None:
    run_on_ranks(2, check_errors, backend)


@pytest.mark.megatron
@pytest.mark.parametrize("options", [FULL, MOE], ids=["full", "moe"])
def test_megatrons_recomputation_counts_once(options: dict[str, Any]) -> None:
    for plain, again, num_fresh in run_on_ranks(2, train_counted, options):
        assert plain == again
        assert num_fresh == 4 * 2 * 2  # steps, micro-batches, layers
