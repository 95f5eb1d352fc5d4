"""Operations of torch.library: compiled, checkpointed, and without a handle left behind."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ep_megatron import fused_combine, fused_dispatch, ops
from ep_megatron.fp8 import FP8
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import BACKENDS, bits, buffer_of

CASE = Case("ops", (7, 5), num_topk=3, hidden=128, alignment=4)
KEPT = [torch.ops.ep_megatron.dispatch.default, torch.ops.ep_megatron.combine.default]
Layer = Callable[[Tensor, Tensor], Tensor]


class CountOps(TorchDispatchMode):
    """Counts the operations of this package that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "ep_megatron":
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def layer(
    x: Tensor, weights: Tensor, idx: Tensor, number: int, expand: bool, fp8: int = 0
) -> Tensor:
    """Weight each row, and do something that must be computed again for its backward."""
    rows, _, row_weights, _, handle = ops.dispatch(
        x.sin(), idx, weights, CASE.num_experts, number, expand, CASE.alignment, fp8
    )
    factor = row_weights if expand else row_weights.sum(1)
    inner = (rows * factor[:, None].to(rows.dtype)).sin()
    combined: Tensor = ops.combine(inner, handle, x.shape[0], fp8)
    return combined.cos()


def inputs(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return CASE.x(rank, dtype).requires_grad_(), CASE.weights(rank).requires_grad_()


def run(layer: Layer, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return output and gradients of a layer."""
    x, weights = inputs(rank, dtype)
    out = layer(x, weights)
    (out * CASE.x(rank, dtype)).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return out.detach(), x.grad, weights.grad


def fused(rank: int, backend: str, expand: bool, recipe: Any, dtype: torch.dtype) -> Any:
    buffer = buffer_of(backend)

    def by_function(x: Tensor, weights: Tensor) -> Tensor:
        rows, _, row_weights, handle = fused_dispatch(
            x.sin(),
            CASE.topk_idx(rank),
            weights,
            CASE.num_experts,
            buffer,
            expand=expand,
            expert_alignment=CASE.alignment,
            fp8=recipe,
        )
        assert row_weights is not None
        factor = row_weights if expand else row_weights.sum(1)
        inner = (rows * factor[:, None].to(rows.dtype)).sin()
        return fused_combine(inner, handle, buffer, grad_fp8=recipe).cos()

    return run(by_function, rank, dtype)


def ours(rank: int, backend: str, expand: bool, fp8: int = 0) -> Layer:
    number = ops.register(buffer_of(backend))
    assert number == ops.register(buffer_of(backend))
    return functools.partial(layer, idx=CASE.topk_idx(rank), number=number, expand=expand, fp8=fp8)


def assert_same(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(bits(one), bits(other))


def assert_no_handles() -> None:
    gc.collect()
    assert ops.num_handles() == 0


def check_eager(rank: int, backend: str) -> None:
    """The bits of the autograd functions, forwards and backwards, and no handle afterwards."""
    for expand in (False, True):
        for recipe, dtype in ((None, torch.float64), (FP8, torch.bfloat16)):
            code = 0 if recipe is None else recipe.code
            mine = run(ours(rank, backend, expand, code), rank, dtype)
            assert_same(mine, fused(rank, backend, expand, recipe, dtype))
            assert_no_handles()


def check_compiled(rank: int, compiler: str, expand: bool) -> None:
    """One graph, forwards and backwards; sizes of received rows are unknown to the compiler."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._dynamo.reset()
    eager = ours(rank, "shared_memory", expand)
    compiled = torch.compile(eager, backend=compiler, fullgraph=True)
    mine, theirs = run(compiled, rank), run(eager, rank)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    del mine, theirs
    assert_no_handles()


def check_selective(rank: int, backend: str) -> None:
    """Kept outputs are not communicated again; without keeping everything is."""
    eager = ours(rank, backend, True)
    plain = run(eager, rank)
    keep = functools.partial(create_selective_checkpoint_contexts, KEPT)
    backward = {"combine_weighted": 1, "dispatch_again": 1}
    for options, times in (({"context_fn": keep}, 1), ({}, 2)):

        def again(x: Tensor, weights: Tensor, options: Any = options) -> Tensor:
            out = checkpoint(eager, x, weights, use_reentrant=False, **options)
            assert isinstance(out, Tensor)
            return out

        with CountOps() as mode:
            mine = run(again, rank)
        assert mode.counts == {"dispatch": times, "combine": times, **backward}
        assert_same(mine, plain)
        assert_no_handles()


def check_lifetime(rank: int) -> None:
    """A handle lives as long as the memory of its tensor, whoever holds that."""
    number = ops.register(buffer_of("shared_memory"))
    x, weights = (tensor.detach() for tensor in inputs(rank, torch.float32))

    def send() -> tuple[Tensor, Tensor]:
        rows, _, _, counts, handle = ops.dispatch(
            x, CASE.topk_idx(rank), weights, CASE.num_experts, number, True
        )
        assert counts.sum() == len(rows)
        return rows, handle

    (rows, handle), (_, other) = send(), send()
    assert ops.num_handles() == 2
    view, copy = handle.detach()[:], handle.clone()
    del handle, other
    gc.collect()
    assert ops.num_handles() == 1
    ops.combine(rows, view, len(x))
    with pytest.raises(ValueError, match=r"expected 3 rows, as was said, got \d"):
        ops.combine(rows, view, 3)
    del view
    assert_no_handles()
    with pytest.raises(ValueError, match="which nothing holds any more; keep the tensor, not a co"):
        ops.combine(rows, copy, len(x))
    with pytest.raises(ValueError, match=r"expected buffer to be a number of ops.register, got -1"):
        ops.dispatch(x, CASE.topk_idx(rank), weights, CASE.num_experts, -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_the_autograd_functions(backend: str) -> None:
    run_on_ranks(2, check_eager, backend)


@pytest.mark.parametrize(("compiler", "expand"), [("aot_eager", False), ("inductor", True)])
def test_compiled_as_one_graph(compiler: str, expand: bool) -> None:
    run_on_ranks(2, check_compiled, compiler, expand)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing_keeps_what_was_communicated(backend: str) -> None:
    run_on_ranks(2, check_selective, backend)


def test_a_handle_lives_as_long_as_its_tensor() -> None:
    run_on_ranks(2, check_lifetime)
