"""The simulator: against published formulas, figures and a trace, and against itself."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_megatron.pipeline.calibrate import calibrate, name_halves
from ep_megatron.pipeline.costs import (
    Costs,
    Exchange,
    Piece,
    StageCosts,
    chunk_costs,
    profile_costs,
)
from ep_megatron.pipeline.measures import length, measure, union, without
from ep_megatron.pipeline.plan import Case, by_merit, cases, cluster_cases, run_case
from ep_megatron.pipeline.profile import PROFILES, Profile, load_profile, make_profile
from ep_megatron.pipeline.program import Options, describe, program
from ep_megatron.pipeline.schedule import SCHEDULES, Schedule, make_schedule
from ep_megatron.pipeline.simulate import simulate
from ep_megatron.pipeline.trace import Span, read_trace, write_trace

DEEPSEEK = load_profile("deepseek-v3-h800")


def moe_costs(
    schedule: Schedule, layers: int = 1, exchange: float = 1.0, p2p: float = 0.0
) -> Costs:
    """Return stages of MoE layers with unlike times; the last segment of each is empty."""
    segments: list[tuple[Piece, ...]] = []
    exchanges = []
    for layer in range(layers):
        segments += [
            (Piece("attention", layer, 4.0, 6.0, 2.0),),
            (Piece("experts", layer, 5.0, 5.0, 3.0),),
        ]
        exchanges += [
            Exchange("dispatch", layer, 3.0 * exchange, 4.0 * exchange),
            Exchange("combine", layer, 4.0 * exchange, 3.0 * exchange),
        ]
    return Costs((StageCosts((*segments, ()), tuple(exchanges)),) * schedule.num_stages, p2p)


def small(name: str, ranks: int = 2) -> Schedule:
    return make_schedule(name, ranks, 4 * ranks)


# Published formulas and figures


@pytest.mark.parametrize("times", [(1, 1, 1, 3), (1, 1, 1, 2.6), (2, 2, 2, 5), (1, 1, 0.7, 2.7)])
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_bubbles_are_those_of_the_formulas(
    stages: int, times: tuple[float, float, float, float]
) -> None:
    """DeepSeek's table, where "PP" counts stages; its row for DualPipe(V) holds for F = I."""
    forward, inputs, weights, pair = times
    backward = inputs + weights
    expected = {
        ("1f1b", stages): (stages - 1) * (forward + backward),
        ("zb1p", stages): (stages - 1) * (forward + backward - 2 * weights),
        ("dualpipe", stages): (stages / 2 - 1) * (pair + backward - 3 * weights),
        ("dualpipev", stages // 2): (stages / 2 - 1) * (pair + backward - 3 * weights),
    }
    for (name, ranks), bubble in expected.items():
        schedule = make_schedule(name, ranks, 4 * stages)
        result = simulate(schedule, chunk_costs(schedule, (forward, inputs, weights), pair))
        assert max(rank.idle for rank in result.ranks) == pytest.approx(bubble, abs=1e-6), name


@pytest.mark.parametrize(
    ("inputs", "weights", "formula", "simulated"), [(1.3, 1.0, 7.8, 6.9), (0.8, 1.2, 4.2, 6.0)]
)
def test_the_formula_of_dualpipe_needs_equal_forward_and_inputs(
    inputs: float, weights: float, formula: float, simulated: float
) -> None:
    """With I > F it is an upper bound, with I < F too small: hence a simulator."""
    schedule = make_schedule("dualpipev", 4, 16)
    result = simulate(schedule, chunk_costs(schedule, (1.0, inputs, weights)))
    pair, backward = 1.0 + inputs + weights, inputs + weights
    assert 3 * (pair + backward - 3 * weights) == pytest.approx(formula)
    assert max(rank.idle for rank in result.ranks) == pytest.approx(simulated)


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"), [("dualpipev", 4, 10), ("dualpipe", 8, 20)]
)
def test_deepseeks_figures(name: str, ranks: int, microbatches: int) -> None:
    schedule = make_schedule(name, ranks, microbatches)
    result = simulate(schedule, chunk_costs(schedule, (1, 1, 1)))
    assert result.step_time == 66
    assert [rank.idle for rank in result.ranks] == [6] * ranks
    assert result.peak_chunks == (9,) * ranks


def test_zero_bubble_v_has_none_but_its_ramp() -> None:
    schedule = make_schedule("zbv", 4, 16)
    result = simulate(schedule, chunk_costs(schedule, (1, 1, 1)))
    for rank in range(4):
        spans = result.timeline.of_rank(rank)
        assert sum(s.end - s.start for s in spans) == spans[-1].end - spans[0].start


def deepseek_pair(whole_exchange: bool) -> tuple[float, float]:
    """Return span and exposed time in ms of a pair of 4 MoE layers, as in DeepSeek's trace."""
    layers = DEEPSEEK.layers
    moe = layers["moe"]
    if whole_exchange:  # with notification and the wait for peers
        dispatch, combine = {"F": 6690, "B": 7487}, {"F": 8684, "B": 5769}
        moe = moe.model_validate(moe.model_dump() | {"dispatch": dispatch, "combine": combine})
    content = DEEPSEEK.model_dump() | {
        "layers": {"moe": moe.model_dump()},
        "pattern": [],
        "num_layers": 4,
        "embedding": {},
        "head": {},
    }
    schedule = make_schedule("interleaved-overlap", 1, 2)
    result = simulate(schedule, profile_costs(Profile.model_validate(content), schedule))
    pair = [span for span in result.timeline.spans if span.step == 1]
    timeline = replace(result.timeline, spans=tuple(pair))
    return (timeline.end - timeline.start) / 1e3, measure(timeline)[0].exposed / 1e3


def test_deepseeks_trace_is_met_within_four_per_cent() -> None:
    """Measured: 129.0 ms with 4.2 ms exposed. The gaps between kernels are in no node's time."""
    span, exposed = deepseek_pair(whole_exchange=False)
    assert span == pytest.approx(124.3, abs=0.05)  # what the trace computes: all else is hidden
    assert span == pytest.approx(129.0, rel=0.04)
    assert exposed == 0.0
    span, exposed = deepseek_pair(whole_exchange=True)
    assert span == pytest.approx(129.0, rel=0.03)
    assert 1.0 < exposed < 4.2


def test_a_pair_runs_in_deepseeks_order() -> None:
    """The order of kernels on the two streams of the published trace, two layers."""
    schedule = make_schedule("interleaved-overlap", 1, 2)
    nodes = [n for n in program(schedule, moe_costs(schedule, 2), Options(), 0) if n.step == 1]
    exchanges = [f"{n.name}({n.kind})" for n in nodes if not n.is_compute]
    assert exchanges == ["combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"] * 2
    compute = [f"{n.name}({n.kind})" for n in nodes if n.is_compute and n.name != "border"]
    one_layer = ["attention(F)", "experts(I)", "experts(W)", "experts(F)", "attention(I)"]
    assert compute == [*one_layer, "attention(W)"] * 2


# Its own properties


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mode", ["pairs", "lone", "blocking", "in step", "late", "whole"])
def test_all_work_is_done_and_nothing_at_the_same_time(name: str, mode: str) -> None:
    options = {
        "pairs": Options(),
        "lone": Options(pairs=False),
        "blocking": Options(blocking=True),
        "in step": Options(host_runs_ahead=False),
        "late": Options(host_runs_ahead=False, launch_early=False),
        "whole": Options(whole_actions=True),
    }[mode]
    schedule = small(name)
    result = simulate(schedule, moe_costs(schedule, 2, p2p=2.0), options)
    per_chunk, exchanged = 2 * 25.0, 2 * 14.0
    visits = sum(len(schedule.microbatches_of(chunk)) for chunk in range(schedule.num_chunks))
    for rank in result.ranks:
        assert rank.compute == pytest.approx(per_chunk * visits)
        assert rank.communication == pytest.approx(exchanged * visits)
        assert rank.compute + rank.exposed + rank.idle == pytest.approx(result.step_time)
        if mode == "blocking":
            assert rank.exposed == pytest.approx(rank.communication)
    for rank_index in range(2):
        for lane in ("compute", "comm"):
            spans = [s for s in result.timeline.of_rank(rank_index) if s.lane == lane]
            ends = [s.end for s in spans]
            assert all(s.start >= end - 1e-9 for s, end in zip(spans[1:], ends, strict=False))


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_freedom_is_never_slower(name: str) -> None:
    schedule = small(name, 4)
    costs = moe_costs(schedule, 2, p2p=1.0)
    steps = [
        simulate(schedule, costs, options).step_time
        for options in (
            Options(),
            Options(host_runs_ahead=False),
            Options(host_runs_ahead=False, launch_early=False),
            Options(blocking=True),
        )
    ]
    assert steps == sorted(steps)
    if name in ("dualpipe", "dualpipev", "interleaved-overlap"):
        assert steps[0] < 0.85 * steps[-1]
        assert steps[1] < steps[2]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    scale=st.floats(0.1, 10),
    exchange=st.floats(0, 4),
    p2p=st.floats(0, 10),
    pairs=st.booleans(),
)
def test_time_scales_and_slower_parts_never_help(
    name: str, scale: float, exchange: float, p2p: float, pairs: bool
) -> None:
    schedule = small(name)
    costs = moe_costs(schedule, 1, exchange, p2p)
    options = Options(pairs=pairs)
    step = simulate(schedule, costs, options).step_time

    def scaled(stage: StageCosts) -> StageCosts:
        exchanges = tuple(
            Exchange(x.name, x.layer, x.forward * scale, x.backward * scale)
            for x in stage.exchanges
        )
        return replace(_times(stage, scale), exchanges=exchanges)

    larger = Costs(tuple(map(scaled, costs.stages)), p2p * scale)
    assert simulate(schedule, larger, options).step_time == pytest.approx(scale * step)
    slower = moe_costs(schedule, 1, exchange + 0.5, p2p)
    assert simulate(schedule, slower, options).step_time >= step - 1e-6
    farther = replace(costs, p2p=p2p + 1.0)
    assert simulate(schedule, farther, options).step_time >= step - 1e-6
    shared = replace(costs, compute_share=0.8)
    assert simulate(schedule, shared, options).step_time >= step - 1e-6


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_one_microbatch_passes_all_stages_and_comes_back(ranks: int) -> None:
    schedule = make_schedule("1f1b", ranks, 1)
    costs = replace(chunk_costs(schedule, (3.0, 2.0, 1.0)), p2p=0.5)
    result = simulate(schedule, costs)
    assert result.step_time == pytest.approx(ranks * 6.0 + 2 * (ranks - 1) * 0.5)


def test_messages_of_one_channel_follow_each_other() -> None:
    """Two forwards ready at 1 and 2, a message takes 4: they arrive at 5 and 9."""
    schedule = make_schedule("1f1b", 2, 2)
    costs = replace(chunk_costs(schedule, (1.0, 1.0, 0.0)), p2p=4.0)
    arrivals = [s.end for s in simulate(schedule, costs).timeline.spans if s.lane == "p2p"]
    # and the backwards: computed by 7 and 11, sent back
    assert sorted(arrivals) == [5.0, 9.0, 11.0, 15.0]


def test_compute_slows_down_while_an_exchange_runs() -> None:
    """By hand: a layer's weights (2 + 3) run beside its exchanges at half their speed."""
    schedule = make_schedule("1f1b", 1, 1)
    costs = replace(moe_costs(schedule), compute_share=0.5)
    spans = simulate(schedule, costs).timeline.spans
    # forward 4, dispatch 3, experts 5, combine 4; backward: combine 3, experts 5, and then
    # dispatch 4 beside experts' weights: 2 done of 3 when it ends, the last one at full speed
    weights = next(s for s in spans if (s.name, s.kind) == ("experts", "W"))
    assert (weights.start, weights.end) == (24.0, 29.0)
    inputs = next(s for s in spans if (s.name, s.kind) == ("attention", "I"))
    assert (inputs.start, inputs.end) == (29.0, 35.0)


def test_the_order_of_exchanges_depends_on_the_schedule_alone() -> None:
    """Peers with other loads, down to empty experts, start the same exchanges in the same order."""
    for name in SCHEDULES:
        schedule = small(name, 4)
        for rank in range(4):
            orders = [
                [
                    (n.name, n.kind, n.chunk, n.microbatch, n.layer)
                    for n in program(schedule, moe_costs(schedule, 2, load), Options(), rank)
                    if not n.is_compute
                ]
                for load in (0.0, 1.0, 30.0)
            ]
            assert orders[0] == orders[1] == orders[2]
            assert len(orders[0]) == len(set(orders[0]))


def test_a_wrong_schedule_is_not_simulated() -> None:
    schedule = small("1f1b")
    wrong = replace(schedule, actions=(schedule.actions[0][:-1], schedule.actions[1]))
    with pytest.raises(ValueError, match=r"check: rank 0: expected B0\.7, got none"):
        simulate(wrong, chunk_costs(schedule, (1, 1, 1)))
    with pytest.raises(ValueError, match="expected costs to be of 2 stages, got 1"):
        simulate(schedule, Costs(chunk_costs(schedule, (1, 1, 1)).stages[:1]))


# Measures


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12), st.data())
def test_intervals_are_sets_of_times(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))

    def spans(which: list[tuple[int, int]]) -> list[Span]:
        return [Span(0, "comm", "x", "F", 0, 0, None, s, s + n, 0) for s, n in which]

    def points(which: list[tuple[int, int]]) -> set[int]:
        return {t for s, n in which for t in range(s, s + n)}

    covered, hidden = union(spans(pairs)), union(spans(others))
    assert length(covered) == len(points(pairs))
    assert length(without(covered, hidden)) == len(points(pairs) - points(others))
    assert all(a[1] < b[0] for a, b in pairwise(covered))


# Measured runs


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_is_simulated_from_its_trace(name: str, tmp_path: Path) -> None:
    """The trace of a run whose node times are known gives its step time back."""
    schedule = small(name, 2)
    for options in (Options(), Options(blocking=True), Options(whole_actions=True)):
        run = simulate(schedule, moe_costs(schedule, 2, p2p=1.5), options)
        about = describe(schedule, options) | {"measured": True}
        write_trace(replace(run.timeline, description=about), tmp_path / "run.json")
        found = calibrate(read_trace(tmp_path / "run.json"))
        assert found.schedule == schedule
        again = simulate(found.schedule, found.costs, found.options)
        assert again.step_time == pytest.approx(run.step_time)
        assert again.exposed == pytest.approx(run.exposed)


def test_a_run_with_overlap_is_foretold_from_one_without() -> None:
    """Hosts see an exchange's end when they ask; what they were not seen to wait for is a bound."""
    schedule = small("dualpipev", 2)
    costs = moe_costs(schedule, 2, 100.0, p2p=50.0)
    costs = replace(costs, stages=tuple(_times(stage, 100.0) for stage in costs.stages))
    blocking, woven = Options(blocking=True), Options(host_runs_ahead=False)
    runs = [simulate(schedule, costs, options) for options in (blocking, woven)]
    found = []
    for run, options in zip(runs, (blocking, woven), strict=True):
        spans = list(run.timeline.spans)
        for index, span in enumerate(spans):
            computing = [
                other.end
                for other in run.timeline.of_rank(span.rank)
                if other.lane == "compute" and other.start < span.end < other.end
            ]
            if span.lane == "comm" and computing:
                spans[index] = replace(span, end=computing[0])
        about = describe(schedule, options)
        found.append(calibrate(replace(run.timeline, spans=tuple(spans), description=about)))
    for source in found:
        again = simulate(schedule, source.costs, found[1].options)
        assert again.step_time == pytest.approx(runs[1].step_time)


def _times(stage: StageCosts, factor: float) -> StageCosts:
    segments = tuple(
        tuple(
            replace(
                p, forward=p.forward * factor, inputs=p.inputs * factor, weights=p.weights * factor
            )
            for p in segment
        )
        for segment in stage.segments
    )
    return replace(stage, segments=segments)


def test_a_run_of_ones_own_schedule_is_understood() -> None:
    schedule = replace(small("dualpipev").mirrored().without_split(), name="my own")
    run = simulate(schedule, moe_costs(schedule, 1))
    found = calibrate(run.timeline)
    assert found.schedule == schedule
    assert simulate(found.schedule, found.costs).step_time == pytest.approx(run.step_time)


def test_messages_of_whole_actions_wait_for_their_end() -> None:
    """By hand: two stages, forward 1, inputs 2, weights 4; the first stage goes back later."""
    schedule = make_schedule("1f1b", 2, 1)
    stage = StageCosts(((Piece("attention", 0, 1.0, 2.0, 4.0),),))
    costs = Costs((stage, stage))
    assert simulate(schedule, costs).step_time == 1 + 1 + 2 + (2 + 4)
    whole = simulate(schedule, costs, Options(whole_actions=True))
    assert whole.step_time == 1 + 1 + (2 + 4) + (2 + 4)


@pytest.mark.parametrize("name", ["zbv", "dualpipev", "1f1b"])
def test_halves_of_a_backward_are_told_apart_by_the_schedule(name: str) -> None:
    """A run may call every backward B; what had its weights' half put off was an I."""
    schedule = small(name)
    run = simulate(schedule, moe_costs(schedule)).timeline
    blurred = tuple(replace(s, kind="B" if s.kind == "I" else s.kind) for s in run.spans)
    named = name_halves(replace(run, spans=blurred), schedule)
    for span in named.spans:
        is_half = schedule.actions[span.rank][span.step].kind.value == "I"
        assert span.kind in (("I",) if is_half else ("F", "B", "W"))


def test_a_trace_that_does_not_say_enough_is_refused() -> None:
    run = simulate(small("1f1b"), chunk_costs(small("1f1b"), (1, 1, 1))).timeline
    about = {key: value for key, value in run.description.items() if key != "stages"}
    with pytest.raises(ValueError, match=r"expected schedule, .* got .*KeyError\('stages'\)"):
        calibrate(replace(run, description=about))
    with pytest.raises(ValueError, match="to have forward spans of stage 1, got none"):
        calibrate(replace(run, spans=tuple(s for s in run.spans if s.rank == 0)))
    with pytest.raises(ValueError, match="expected options of the trace to be those of a run"):
        calibrate(replace(run, description=dict(run.description) | {"options": {"x": 1}}))


# Profiles and plans


@pytest.mark.parametrize("name", PROFILES)
def test_built_in_profiles_serve_every_schedule(name: str) -> None:
    for schedule in SCHEDULES:
        outcome = run_case(Case(schedule, 4, 8), load_profile(name), Options())
        assert outcome.simulation is not None, outcome.reason


def test_layers_are_dealt_once_and_evenly() -> None:
    for name, ranks in (("1f1b", 8), ("dualpipev", 16), ("interleaved", 4)):
        schedule = make_schedule(name, ranks, 4 * ranks)
        stages = profile_costs(DEEPSEEK, schedule).stages
        counts = [len({p.layer for s in stage.segments for p in s} - {None}) for stage in stages]
        assert sum(counts) == 61
        assert min(counts) >= 1
        assert max(counts[:-1]) - min(counts[:-1]) <= 1
        names = [p.name for stage in stages for s in stage.segments for p in s]
        assert (names[0], names[-1]) == ("embedding", "head")
        assert names.count("dense") == 3


def test_every_rank_does_the_same_work_in_every_schedule() -> None:
    """The whole model, once per micro-batch, however it is cut."""
    totals = set()
    for name in SCHEDULES:
        outcome = run_case(Case(name, 4, 8), DEEPSEEK, Options())
        assert outcome.simulation is not None
        totals.add(round(sum(rank.compute for rank in outcome.simulation.ranks)))
    assert max(totals) - min(totals) <= len(SCHEDULES)  # rounding


def test_a_plan_answers_with_the_best_first() -> None:
    asked = list(cases(["1f1b", "dualpipev"], [4], [8, 16], None, [8, 64], [None]))
    assert len(asked) == 8
    outcomes = [run_case(case, DEEPSEEK, Options()) for case in asked]
    speeds = [o.tokens_per_second or 0.0 for o in by_merit(outcomes)]
    assert speeds == sorted(speeds, reverse=True)
    limited = by_merit(outcomes, 100 * 2.0**30)
    is_over = [o.simulation is not None and o.simulation.peak_bytes > 100 * 2**30 for o in limited]
    assert is_over == sorted(is_over)
    assert any(is_over)
    refused = run_case(Case("dualpipe", 3, 8), DEEPSEEK, Options())
    assert refused.simulation is None
    assert "to be even, got 3" in refused.reason
    assert by_merit([refused, *outcomes])[-1] is refused


def test_a_cluster_and_a_batch_admit_what_divides_them() -> None:
    asked = list(cases(["dualpipev"], [3, 4, 8, 256], [1], None, [8, 64], [None]))
    # 64 / 3 is no number of GPUs; 64 / 256 is none at all; 64 / 4 and 64 / 8 hold no 64 experts.
    found = list(cluster_cases(iter(asked), 64, 512, DEEPSEEK))
    assert [(c.pipeline_parallel, c.num_microbatches) for c in found] == [(4, 32), (8, 64)]
    assert {c.expert_parallel for c in found} == {8}
    assert not list(cluster_cases(iter(asked), 64, 510, DEEPSEEK))
    outcomes = [run_case(case, DEEPSEEK, Options()) for case in found]
    # All GPUs work on the same batch, so the shortest step has most tokens per second and GPU.
    steps = [o.simulation.step_time for o in by_merit(outcomes) if o.simulation]
    assert steps == sorted(steps)


def test_too_few_sms_and_too_many_both_cost() -> None:
    steps = {}
    for sms in (8, 20, 60):
        outcome = run_case(Case("dualpipev", 8, 32, None, None, sms), DEEPSEEK, Options())
        assert outcome.simulation is not None
        steps[sms] = outcome.simulation.step_time
    assert steps[20] < steps[8]
    assert steps[20] < steps[60]
    unreserved = DEEPSEEK.model_dump()
    unreserved["sms"]["reserved"] = False
    outcome = run_case(Case("1f1b", 2, 4), Profile.model_validate(unreserved), Options())
    assert outcome.simulation is not None


def test_imbalance_costs_what_waiting_costs() -> None:
    schedule = small("dualpipev")
    steps = [
        simulate(schedule, profile_costs(DEEPSEEK, schedule, imbalance=x)).step_time
        for x in (1.0, 1.5, 3.0)
    ]
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layer": 3}, "here: num_layer: Extra inputs are not permitted, got 3"),
        (
            {"num_layers": -1},
            "here: num_layers: Input should be greater than or equal to 0, got -1",
        ),
        ({"rest": "x"}, r"here: profile: .*one of \['moe', 'dense'\], got 'x'"),
        ({"chunk": {"F": 1, "I": 1, "W": 1}}, "either chunk or layers, got both"),
        (
            {"layers": {"moe": {"attention": {"F": -1}, "experts": {}}}},
            r"layers\.moe\.attention\.F",
        ),
        (
            {"layers": {"moe": {"attention": {}, "experts": {}, "dispatch": {"F": 1, "B": 1}}}},
            "dispatch and combine to be given both or neither",
        ),
    ],
)
def test_a_wrong_profile_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_profile(DEEPSEEK.model_dump() | change, "here")


def test_what_a_profile_cannot_say_is_refused(tmp_path: Path) -> None:
    schedule = small("1f1b")
    with pytest.raises(ValueError, match=r"to be one of \[8, 16, 32, 64\] for profile .* got 24"):
        profile_costs(DEEPSEEK, schedule, expert_parallel=24)
    with pytest.raises(ValueError, match="communication_sms to be between 1 and 131, got 132"):
        profile_costs(DEEPSEEK, schedule, communication_sms=132)
    with pytest.raises(ValueError, match="imbalance to be at least 1"):
        profile_costs(DEEPSEEK, schedule, imbalance=0.5)
    many = make_schedule("dualpipev", 32, 64)
    with pytest.raises(ValueError, match=r"at least one per stage \(64\), got 61"):
        profile_costs(DEEPSEEK, many)
    with pytest.raises(ValueError, match="profile to be a file or one of deepseek-v3-h800, unit"):
        load_profile("nothing")
    (tmp_path / "p.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=r"expected .*p\.yaml to be YAML or JSON"):
        load_profile(tmp_path / "p.yaml")


def test_memory_of_a_rank_is_its_stages(tmp_path: Path) -> None:
    """By hand: DualPipe keeps every stage twice; activations count what is in flight."""
    (tmp_path / "p.yaml").write_text(
        "name: small\nnum_layers: 4\nrest: dense\nbytes_per_parameter: 2\n"
        "layers: {dense: {attention: {F: 1, I: 1, W: 1}, experts: {F: 1, I: 1, W: 1},"
        " activation_bytes: 10, parameters: 100}}\n"
    )
    profile = load_profile(tmp_path / "p.yaml")
    expected = {"1f1b": (40.0, 400.0), "dualpipe": (60.0, 800.0), "dualpipev": (50.0, 400.0)}
    for name, (activations, parameters) in expected.items():
        schedule = make_schedule(name, 2, 8)
        result = simulate(schedule, profile_costs(profile, schedule))
        assert max(result.peak_activation_bytes) == activations
        assert result.parameter_bytes == (parameters, parameters)
