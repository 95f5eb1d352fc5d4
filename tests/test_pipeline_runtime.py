"""What the runtime refuses, how it ends when a rank is late, evaluation, and what it records."""

import dataclasses
import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron.pipeline.action import Kind, Schedule
from ep_megatron.pipeline.calibrate import calibrate
from ep_megatron.pipeline.measures import measure
from ep_megatron.pipeline.placement import schedule_for
from ep_megatron.pipeline.simulate import simulate
from ep_megatron.pipeline.trace import read_trace, write_trace
from tests.megatron_gpt import Layout
from tests.pipeline_gpt import (
    BATCH,
    SEQUENCE,
    WAIT,
    Shape,
    build_chunks,
    forward_step,
    microbatches,
    pipeline_ranks,
    run_schedule,
    whole_model,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

TWO, SMALL = Layout(pp=2), Shape(num_layers=4, num_microbatches=4)


def _evaluate(rank: int, name: str, num_microbatches: int) -> None:
    from megatron.core import parallel_state

    from ep_megatron.pipeline.forward_backward import get_forward_backward_func

    shape = dataclasses.replace(SMALL, num_microbatches=num_microbatches)
    with pipeline_ranks(name, TWO):
        losses, _ = whole_model(shape, 0)
        chunks = build_chunks(name, shape, TWO)
        with torch.no_grad():
            reported = get_forward_backward_func(name, timeout=60.0)(
                forward_step_func=forward_step,
                data_iterator=[microbatches(shape, 0) for _ in chunks],
                model=chunks,
                num_microbatches=num_microbatches,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                forward_only=True,
            )
        is_last = parallel_state.get_pipeline_model_parallel_rank() == 1
        assert [one["lm loss"] for one in reported] == (losses if is_last else [])
        assert all(parameter.grad is None for chunk in chunks for parameter in chunk.parameters())


@pytest.mark.parametrize(
    ("name", "num_microbatches"), [("dualpipev", 3), ("dualpipe", 2), ("interleaved", 4)]
)
def test_evaluation_gives_the_losses_of_the_whole_model(name: str, num_microbatches: int) -> None:
    run_on_ranks(2, _evaluate, name, num_microbatches)


def _leave(rank: int) -> None:
    from megatron.core import parallel_state

    with pipeline_ranks("dualpipev", TWO):
        chunks = build_chunks("dualpipev", SMALL, TWO)
        run_schedule("dualpipev", SMALL, chunks, 0)
        group = weakref.ref(parallel_state.get_pipeline_model_parallel_group())
        assert group() is not None
        del chunks
    gc.collect()
    assert group() is None


def test_a_schedule_keeps_no_group_alive() -> None:
    """Gloo polls for each: what is kept for the next step would slow down every later layout."""
    run_on_ranks(2, _leave)


def _swapped(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B whose last rank wants to go backwards before it has gone forwards."""
    schedule = schedule_for("1f1b", num_ranks, num_microbatches, num_chunks)
    actions = list(schedule.actions[-1])
    first = next(i for i, action in enumerate(actions) if action.kind is Kind.B)
    actions[first - 1], actions[first] = actions[first], actions[first - 1]
    return dataclasses.replace(schedule, actions=(*schedule.actions[:-1], tuple(actions)))


def _refused(rank: int, what: str) -> None:
    from megatron.core import parallel_state

    refusals: dict[str, Callable[[list[Any]], None]] = {
        "a schedule that cannot run": _run_swapped,
        "ranks with other numbers of micro-batches": _run_unequal,
        "another dispatcher": _run_alltoall,
    }
    with pipeline_ranks("1f1b", TWO):
        chunks = build_chunks("1f1b", SMALL, TWO)
        refusals[what](chunks)
        assert all(parameter.grad is None for chunk in chunks for parameter in chunk.parameters())
        # Nothing has run, so the ranks may go on.
        losses = run_schedule("1f1b", SMALL, chunks, 0)
        assert len(losses) == 4 * (parallel_state.get_pipeline_model_parallel_rank() == 1)


def _run_swapped(chunks: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"check: rank 1, step 0, B0\.0"):
        run_schedule(_swapped, SMALL, chunks, 0)


def _run_unequal(chunks: list[Any]) -> None:
    shape = dataclasses.replace(SMALL, num_microbatches=5 + dist.get_rank())
    with pytest.raises(ValueError, match=r"expected all ranks to hold the schedule 1f1b [56] "):
        run_schedule("1f1b", shape, chunks, 0)


def _run_alltoall(_chunks: list[Any]) -> None:
    shape = dataclasses.replace(SMALL, options={"moe_token_dispatcher_type": "alltoall"})
    theirs = build_chunks("1f1b", shape, TWO)
    with pytest.raises(ValueError, match="to be DeepEPTokenDispatcher, got MoEAlltoAll"):
        run_schedule("1f1b", shape, theirs, 0)


@pytest.mark.parametrize(
    "what",
    [
        "a schedule that cannot run",
        "ranks with other numbers of micro-batches",
        "another dispatcher",
    ],
)
def test_is_refused_before_anything_runs(what: str) -> None:
    run_on_ranks(2, _refused, what)


def _curious(rank: int) -> None:
    from ep_megatron.pipeline.forward_backward import get_forward_backward_func

    def step(data: Any, model: Any) -> Any:
        return forward_step(data, model)[0].mean(), None

    with pipeline_ranks("1f1b", Layout()):
        (chunk,) = build_chunks("1f1b", SMALL, Layout())
        with pytest.raises(AttributeError, match="a use of its mean"):
            get_forward_backward_func("1f1b")(
                forward_step_func=step,
                data_iterator=microbatches(SMALL, 0),
                model=chunk,
                num_microbatches=4,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
            )


def test_a_forward_step_that_uses_the_output_is_told_so() -> None:
    run_on_ranks(1, _curious)


def _late(rank: int) -> str:
    with pipeline_ranks("1f1b", TWO):
        from ep_megatron.pipeline.forward_backward import get_forward_backward_func

        chunks = build_chunks("1f1b", SMALL, TWO)
        function = get_forward_backward_func("1f1b", timeout=3.0)
        run_schedule("1f1b", SMALL, chunks, 0)  # the ranks know that they hold the same schedule
        if rank == 0:
            time.sleep(8)
            return ""
        start = time.monotonic()
        with pytest.raises(RuntimeError) as error:
            function(
                forward_step_func=forward_step,
                data_iterator=microbatches(SMALL, 0),
                model=chunks,
                num_microbatches=4,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
            )
        assert time.monotonic() - start < 60
        return str(error.value)


def test_a_late_rank_is_named() -> None:
    _, error = run_on_ranks(2, _late)
    assert "pipeline" in error
    assert "rank 0" in error


def _late_copy(rank: int) -> str:
    from ep_megatron.pipeline.p2p import swap

    mine, other = torch.ones(3), torch.empty(3)
    if rank == 0:
        time.sleep(8)
        swap(dist.group.WORLD, [mine], [other], 60.0)  # type: ignore[arg-type]
        return ""
    with pytest.raises(RuntimeError) as error:
        swap(dist.group.WORLD, [mine], [other], 1.0)  # type: ignore[arg-type]
    return str(error.value)


def test_a_late_copy_of_a_stage_is_named() -> None:
    _, error = run_on_ranks(2, _late_copy)
    assert "within 1 s" in error
    assert "pipeline rank 0 (rank 0 of the world)" in error


def _recorded(rank: int, folder: str, shape: Shape) -> Any:
    from megatron.core import parallel_state

    from ep_megatron.pipeline.forward_backward import get_forward_backward_func

    layout = Layout(pp=2, ep=2)
    with pipeline_ranks("dualpipev", layout):
        expert = parallel_state.get_expert_model_parallel_rank()
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        chunks = build_chunks("dualpipev", shape, layout)
        function = get_forward_backward_func("dualpipev", timeout=WAIT)  # that of run_schedule
        with function.recorded(pipeline) as recorder:
            run_schedule("dualpipev", shape, chunks, expert)
        spans = tuple(recorder.spans)
        path = Path(folder) / f"{expert}-{pipeline}.json"
        write_trace(recorder.timeline("measured"), path)
        return pipeline, expert, spans


def test_expert_ranks_exchange_and_stages_send_in_the_same_order(tmp_path: Path) -> None:
    options = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
    shape = Shape(num_layers=4, num_microbatches=6, options=options, is_ragged=True)
    ranks = run_on_ranks(4, _recorded, str(tmp_path), shape)
    exchanges: dict[int, list[Any]] = {}
    messages: dict[tuple[int, int], dict[str, list[int]]] = {}
    for pipeline, expert, spans in ranks:
        order = [
            (s.name, s.kind, s.chunk, s.layer, s.microbatch) for s in spans if s.lane == "comm"
        ]
        assert len(order) == 6 * 4 * 2
        exchanges.setdefault(pipeline, []).append(order)
        for span in spans:
            if span.lane == "p2p":
                key = f"{span.name} {span.kind} {span.chunk}"
                messages.setdefault((pipeline, expert), {}).setdefault(key, []).append(
                    span.microbatch
                )
    for one, other in exchanges.values():
        assert one == other
    for expert in range(2):
        top, bottom = messages[1, expert], messages[0, expert]
        # The first chunk goes from the last rank to the first, the second comes back.
        for kind, sender, receiver, chunk in (
            ("F", top, bottom, 0),
            ("F", bottom, top, 1),
        ):
            assert sender[f"send {kind} {chunk}"] == receiver[f"recv {kind} {chunk}"]
    timeline = read_trace([tmp_path / f"0-{pipeline}.json" for pipeline in range(2)])
    assert {span.lane for span in timeline.spans} == {"compute", "comm", "p2p"}
    kinds = {span.kind for span in timeline.spans if span.lane == "compute"}
    assert kinds == {"F", "B", "W"}
    # What was recorded is enough to simulate the run, and all of its work is accounted for.
    found = calibrate(timeline)
    assert found.schedule == schedule_for("dualpipev", 2, 6, 2)
    simulated = simulate(found.schedule, found.costs, found.options)
    for real, ours in zip(measure(timeline), simulated.ranks, strict=True):
        assert ours.compute == pytest.approx(real.compute, rel=0.02)
