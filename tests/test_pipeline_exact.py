"""Every schedule gives the bits of ordinary forwards and backwards of the whole model.

Each rank computes losses and gradients of the whole model with autograd for itself, then runs its
part of the schedule, and compares all its parameters' gradients with `torch.equal`. A schedule adds
gradients in micro-batch order, as the ordinary loop does, so there is one order and no tolerance;
bidirectional DualPipe adds the sums of its two halves, and is compared with that.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron_gpt import Layout
from tests.pipeline_gpt import (
    Shape,
    build_chunks,
    global_names,
    pipeline_ranks,
    run_schedule,
    whole_model,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EXPERTS_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
DEEPSEEK = {
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "num_query_groups": 1,
}
EMBEDDING = "embedding.word_embeddings.weight"
TOP_1 = {"moe_router_topk": 1, "moe_router_pre_softmax": True}


@dataclass(frozen=True)
class Run:
    """One schedule; several runs of one layout and shape share the whole model's gradients."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    layout: Layout
    runs: tuple[Run, ...]
    shape: Shape = field(default_factory=Shape)
    wire: str = "bf16"


LATE = {"launch_early": False}
ALONE = {"overlap": False}
ONE, TWO, FOUR, EP2 = Layout(), Layout(pp=2), Layout(pp=4), Layout(pp=2, ep=2)
SMALL = Shape(num_layers=4, num_microbatches=4)
CASES = {
    "one rank": Case(
        ONE, (Run("1f1b"), Run("zb1p"), Run("interleaved-overlap"), Run("dualpipev"), Run("zbv"))
    ),
    "one rank of two expert ranks": Case(
        Layout(ep=2), (Run("1f1b"), Run("interleaved-overlap", LATE), Run("dualpipev")), SMALL
    ),
    "two stages": Case(
        TWO,
        (
            Run("1f1b"),
            Run("zb1p"),
            Run("interleaved"),
            Run("interleaved-overlap"),
            Run("zbv"),
            Run("dualpipev"),
            Run("dualpipev", LATE),
            Run("dualpipev", ALONE),
            Run("dualpipe"),
        ),
    ),
    "two stages, float32, dense layers, all computed again": Case(
        TWO,
        (Run("dualpipev"), Run("zb1p"), Run("interleaved-overlap")),
        Shape(torch.float32, options=FULL | {"moe_layer_freq": [0, 1, 0, 0, 1, 1, 0, 1]}),
    ),
    "four stages": Case(FOUR, (Run("dualpipev"), Run("dualpipe"), Run("zbv"))),
    "two stages of two expert ranks": Case(
        EP2, (Run("dualpipev"), Run("dualpipev", LATE), Run("interleaved-overlap"), Run("dualpipe"))
    ),
    "ragged micro-batches, experts without tokens": Case(
        EP2,
        (Run("dualpipev"), Run("interleaved-overlap"), Run("zb1p")),
        Shape(num_layers=4, options=TOP_1, is_ragged=True),
    ),
    "multi-token prediction": Case(
        EP2,
        (Run("dualpipev"), Run("dualpipe"), Run("interleaved-overlap"), Run("1f1b", ALONE)),
        Shape(num_layers=4, options={"mtp_num_layers": 2}),
    ),
    "multi-token prediction, computed again, dense": Case(
        TWO,
        (Run("zbv"), Run("dualpipev")),
        Shape(
            torch.float32, 4, options=FULL | {"mtp_num_layers": 1, "moe_layer_freq": [1, 1, 1, 0]}
        ),
    ),
    "deepseek's router, experts computed again, fp8": Case(
        EP2,
        (Run("dualpipev"), Run("zbv")),
        Shape(torch.float32, 4, options=DEEPSEEK | EXPERTS_AGAIN | {"hidden_size": 32}),
        wire="mxfp8",
    ),
}


def _reference(name: str, shape: Shape, data_rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    if name != "dualpipe":
        return whole_model(shape, data_rank)
    half = shape.num_microbatches // 2
    first = whole_model(shape, data_rank, range(half))
    second = whole_model(shape, data_rank, range(half, shape.num_microbatches))
    gradients = {key: gradient + second[1][key] for key, gradient in first[1].items()}
    return [*first[0], *second[0]], gradients


def _compare(rank: int, case: Case) -> int:
    """Return how many gradients were compared; raise where one differs."""
    from megatron.core import parallel_state

    layout, shape = case.layout, case.shape
    references: dict[bool, Any] = {}
    compared = 0
    for run in case.runs:
        with pipeline_ranks(run.name, layout, case.wire):
            data_rank = parallel_state.get_expert_model_parallel_rank()
            is_two_way = run.name == "dualpipe"
            if is_two_way not in references:
                references[is_two_way] = _reference(run.name, shape, data_rank)
            losses, gradients = references[is_two_way]
            chunks = build_chunks(run.name, shape, layout)
            reported = run_schedule(run.name, shape, chunks, data_rank, **run.settings)
            is_last = parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1
            assert len(reported) == (shape.num_microbatches if is_last else 0), run
            for one, other in zip(reported, losses, strict=False):
                assert torch.equal(one, other), run
            if shape.options.get("mtp_num_layers"):
                _add_ends(run, chunks)
            for chunk in chunks:
                for name, parameter in global_names(chunk):
                    assert parameter.grad is not None, (run, name)
                    whole = gradients[name]
                    if name == EMBEDDING and shape.options.get("mtp_num_layers"):
                        # Of a sum of both ends' the order is another.
                        gap = (parameter.grad - whole).abs().max() / whole.abs().max()
                        assert gap <= 10 * torch.finfo(whole.dtype).eps, (run, name)
                        continue
                    assert torch.equal(parameter.grad, whole), (run, name)
                    compared += int(parameter.grad.abs().max() > 0)
    return compared


def _add_ends(run: Run, chunks: list[Any]) -> None:
    """Add up the gradients of an embedding on two ranks, as Megatron does after the schedule."""
    from megatron.core import parallel_state

    if run.name not in ("1f1b", "interleaved-overlap"):
        return  # both ends are on one rank
    for chunk in chunks:
        if chunk.pre_process or chunk.mtp_process:
            gradient = chunk.embedding.word_embeddings.weight.grad
            torch.distributed.all_reduce(gradient, group=parallel_state.get_embedding_group())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_the_whole_model(case: Case) -> None:
    num_ranks = case.layout.pp * case.layout.ep
    compared = run_on_ranks(num_ranks, _compare, case)
    least = 10 * len(case.runs)
    assert min(compared) > least


SCHEDULES = {
    "1f1b": (ALONE,),
    "zb1p": ({}, ALONE),
    "interleaved": (ALONE,),
    "interleaved-overlap": ({}, LATE, ALONE),
    "zbv": ({}, ALONE),
    "dualpipe": ({}, LATE, ALONE),
    "dualpipev": ({}, LATE, ALONE),
}


@pytest.mark.matrix
@pytest.mark.parametrize("again", [{}, FULL, EXPERTS_AGAIN], ids=["kept", "all", "experts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_the_matrix(pp: int, ep: int, dtype: torch.dtype, again: dict[str, Any]) -> None:
    """All schedules, overlapped or not, W split or not, with and without recomputation."""
    runs = tuple(
        Run(name, settings)
        for name, all_settings in SCHEDULES.items()
        for settings in all_settings
        if pp > 1 or name not in ("interleaved", "dualpipe")  # they need two ranks
    )
    case = Case(Layout(pp=pp, ep=ep), runs, Shape(dtype, options=again))
    assert min(run_on_ranks(pp * ep, _compare, case)) > 10 * len(runs)


def test_a_reference_of_other_microbatches_differs() -> None:
    """The comparison can fail: it does for a run over other data."""
    case = Case(ONE, (Run("1f1b"),), replace(SMALL, num_microbatches=3))
    run_on_ranks(1, _compare, case)
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        run_on_ranks(1, _compare_with_other_data, case)


def _compare_with_other_data(rank: int, case: Case) -> None:
    with pipeline_ranks("1f1b", case.layout):
        _, gradients = whole_model(case.shape, 0)
        (chunk,) = build_chunks("1f1b", case.shape, case.layout)
        run_schedule("1f1b", case.shape, [chunk], 1)
        for name, parameter in global_names(chunk):
            assert torch.equal(parameter.grad, gradients[name]), name
