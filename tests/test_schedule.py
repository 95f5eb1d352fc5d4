"""Schedules: the published step lists, what they hold in memory, and that wrong ones fail."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ep_megatron.pipeline.action import schedule_from_json
from ep_megatron.pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    check,
    make_schedule,
    parse_action,
    peak_activations,
)


def sizes(name: str, largest: int = 8) -> Iterator[tuple[int, int]]:
    """Yield (P, M) that a schedule is made for."""
    for ranks in (1, 2, 3, 4, 6, 8):
        if name == "dualpipe" and ranks % 2:
            continue
        for microbatches in sorted({1, 2, ranks, ranks + 1, 2 * ranks, 2 * ranks + 2, 4 * ranks}):
            try:
                make_schedule(name, ranks, microbatches)
            except ValueError:
                continue
            if ranks <= largest:
                yield ranks, microbatches


def words(schedule: Schedule, rank: int) -> str:
    return " ".join(map(str, schedule.actions[rank]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_can_run(name: str) -> None:
    for ranks, microbatches in sizes(name):
        schedule = make_schedule(name, ranks, microbatches)
        check(schedule)
        check(schedule.mirrored())
        check(schedule.forward_only())
        check(schedule.without_pairs())
        check(schedule.without_split())


def test_a_schedule_is_what_its_paper_says() -> None:
    """The step lists written out by hand, for sizes that fit on a line."""
    assert words(make_schedule("1f1b", 2, 3), 0) == "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"
    assert words(make_schedule("1f1b", 2, 3), 1) == "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2"
    assert words(make_schedule("zb1p", 2, 3), 0) == "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2"
    assert words(make_schedule("zb1p", 2, 3), 1) == "F0.0 I0.0 F0.1 I0.1 W0.0 F0.2 I0.2 W0.1 W0.2"
    assert words(make_schedule("interleaved", 2, 2), 1) == (
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1"
    )
    assert words(make_schedule("interleaved-overlap", 2, 2), 1) == (
        "F0.0 F0.1 F1.0 F1.1&B1.0 B1.1 B0.0 B0.1"
    )
    assert words(make_schedule("interleaved-overlap", 1, 3), 0) == "F0.0 F0.1&B0.0 F0.2&B0.1 B0.2"
    assert words(make_schedule("dualpipev", 1, 3), 0) == (
        "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 F0.2&B1.1 F1.2&B0.1 B1.2 I0.2 W0.2"
    )
    v = make_schedule("dualpipev", 2, 4)
    assert words(v, 0) == (
        "F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 F0.3&B1.1 F1.2&B0.0 B1.2 F1.3&B0.1 B1.3 I0.2 W0.2 "
        "I0.3 W0.3"
    )
    assert words(v, 1) == (
        "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 F1.2&B0.0 F0.3&B1.1 F1.3&B0.1 B1.2 B0.2 I1.3 I0.3 W1.3 W0.3"
    )
    zero = make_schedule("zbv", 2, 3)
    assert words(zero, 0) == (
        "F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 I1.1 W1.1 I0.0 W0.0 F1.2 I1.2 W1.2 I0.1 W0.1 I0.2 W0.2"
    )
    # Both ends: what rank 0 does to one direction, rank 1 does to the other.
    both = make_schedule("dualpipe", 2, 8)
    swapped = [
        replace(
            action,
            chunk=1 - action.chunk,
            microbatch=(action.microbatch + 4) % 8,
            backward_chunk=None if action.backward_chunk is None else 1 - action.backward_chunk,
            backward_microbatch=None
            if action.backward_microbatch is None
            else (action.backward_microbatch + 4) % 8,
        )
        for action in both.actions[0]
    ]
    assert both.actions[1] == tuple(swapped)


def torch_table(name: str, ranks: int, microbatches: int, rank: int) -> list[Any]:
    """Return the actions that torch.distributed.pipelining lists, without its idle slots."""
    from torch.distributed.pipelining import schedules as torch_schedules

    wanted: dict[str, tuple[Any, int]] = {
        "1f1b": (torch_schedules.Schedule1F1B, 1),
        "interleaved": (torch_schedules.ScheduleInterleaved1F1B, 2),
        "zb1p": (torch_schedules.ScheduleInterleavedZeroBubble, 1),
        "zbv": (torch_schedules.ScheduleZBVZeroBubble, 2),
        "dualpipev": (torch_schedules.ScheduleDualPipeV, 2),
    }
    kind, chunks = wanted[name]
    state = SimpleNamespace(
        pp_group_size=ranks,
        _num_stages=chunks * ranks,
        num_stages=chunks * ranks,
        n_local_stages=chunks,
        _n_microbatches=microbatches,
        microbatches_per_round=microbatches // max(1, microbatches // ranks),
    )
    if name == "1f1b":
        return [a for a in kind._get_pipeline_order(state)[rank] if a is not None]
    actions = kind._calculate_single_rank_operations(state, rank)
    return [a for a in actions if a is not None]


def as_torch(schedule: Schedule, rank: int) -> list[str]:
    """Write our actions as torch does, with stages in place of chunks."""
    texts = []
    for action in schedule.actions[rank]:
        parts = [
            f"{schedule.stage_of(rank, part.chunk)}{part.kind.value}{part.microbatch}"
            for part in action.parts()
        ]
        texts.append(parts[0] if len(parts) == 1 else f"({';'.join(parts)})OVERLAP_F_B")
    return texts


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "zbv", "dualpipev"])
def test_schedules_are_those_of_torch(name: str) -> None:
    compared = 0
    for ranks, microbatches in sizes(name):
        if ranks == 1 or microbatches < ranks:
            continue  # torch's table of 1F1B miscounts fewer micro-batches than warm-up forwards
        schedule = make_schedule(name, ranks, microbatches)
        for rank in range(ranks):
            table = [str(a) for a in torch_table(name, ranks, microbatches, rank)]
            table = [text for text in table if "REDUCE_GRAD" not in text]
            if name == "1f1b" and rank == ranks - 1:  # torch numbers these forwards from 1
                own = [text for text in as_torch(schedule, rank) if "F" in text]
                table = [own.pop(0) if "F" in text else text for text in table]
            assert as_torch(schedule, rank) == table, (ranks, microbatches, rank)
            compared += 1
    assert compared >= 40


@pytest.mark.megatron
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_interleaved_is_what_megatron_runs(overlap: bool) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    name = "interleaved-overlap" if overlap else "interleaved"
    for ranks, chunks, microbatches in ((2, 2, 4), (2, 3, 6), (4, 2, 8), (4, 4, 4), (8, 2, 16)):
        schedule = make_schedule(name, ranks, microbatches, chunks)
        table = get_schedule_table(microbatches, chunks, ranks)
        forwards = [Action(Kind.F, chunk, microbatch) for microbatch, chunk in table]
        backwards = [Action(Kind.B, chunks - 1 - chunk, microbatch) for microbatch, chunk in table]
        for rank in range(ranks):
            group = SimpleNamespace(size=lambda n=ranks: n, rank=lambda r=rank: r)
            peers = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks)
            _, _, num_warmup, _ = get_pp_rank_microbatches(
                microbatches,
                chunks,
                ranks,
                overlap_moe_expert_parallel_comm=overlap,
                p2p_communicator=peers,
            )
            parts = [part for action in schedule.actions[rank] for part in action.parts()]
            assert parts[:num_warmup] == forwards[:num_warmup]
            steady = len(forwards) - num_warmup
            assert parts[num_warmup : num_warmup + 2 * steady : 2] == forwards[num_warmup:]
            assert parts[num_warmup + 1 : num_warmup + 2 * steady : 2] == backwards[:steady]
            assert parts[num_warmup + 2 * steady :] == backwards[steady:]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_peak_activations_are_the_published_ones(ranks: int) -> None:
    """In chunks: a rank of 1F1B holds one chunk of twice the size of the others'."""
    microbatches = 4 * ranks
    for name, expected in {
        "1f1b": [ranks - rank for rank in range(ranks)],
        "zb1p": [ranks] * ranks,
        "zbv": [2 * ranks] * ranks,
        "dualpipev": [2 * ranks + 1] * ranks,
        "dualpipe": [ranks + 1] * ranks,
    }.items():
        peaks = peak_activations(make_schedule(name, ranks, microbatches))
        assert list(peaks) == expected, name
    warmup = [2 * (ranks - rank - 1) + ranks for rank in range(ranks)]
    plain = peak_activations(make_schedule("interleaved", ranks, microbatches))
    assert list(plain) == [count + 1 for count in warmup]
    overlapped = peak_activations(make_schedule("interleaved-overlap", ranks, microbatches))
    assert list(overlapped) == [count + 2 for count in warmup]


def test_pairs_of_dualpipe_are_always_of_two_chunks() -> None:
    for name in ("dualpipe", "dualpipev"):
        for ranks, microbatches in sizes(name):
            for _, _, action in make_schedule(name, ranks, microbatches).steps():
                assert action.kind is not Kind.FB or action.chunk != action.backward_chunk


def mutations(schedule: Schedule, draw: random.Random) -> Iterator[tuple[str, Schedule]]:
    """Yield schedules with one thing wrong."""
    rank = draw.randrange(schedule.num_ranks)
    actions = list(schedule.actions[rank])
    step = draw.randrange(len(actions))
    for what in ("dropped", "duplicated", "swapped", "renumbered", "moved", "other kind"):
        wrong = list(actions)
        if what == "dropped":
            del wrong[step]
        elif what == "duplicated":
            wrong.insert(draw.randrange(step, len(wrong)), wrong[step])
        elif what == "swapped":
            other = draw.randrange(len(actions))
            wrong[step], wrong[other] = wrong[other], wrong[step]
        elif what == "renumbered":
            number = (wrong[step].microbatch + 1) % schedule.num_microbatches
            wrong[step] = replace(wrong[step], microbatch=number)
        elif what == "moved":
            wrong.insert(draw.randrange(len(actions)), wrong.pop(step))
        elif wrong[step].kind in (Kind.B, Kind.I):
            to = Kind.I if wrong[step].kind is Kind.B else Kind.B
            wrong[step] = replace(wrong[step], kind=to)
        if wrong != actions:
            everyone = list(schedule.actions)
            everyone[rank] = tuple(wrong)
            yield what, replace(schedule, actions=tuple(everyone))


def is_harmless(schedule: Schedule) -> bool:
    """Execute in the most naive way and look at what was computed; nothing shared with `check`.

    Each chunk keeps the list of micro-batches that it added to its gradients. Ranks take turns,
    one part at a time; a message is a key in a set. Channels are lists that must be read in order.
    """
    programs = [[p for a in rank for p in a.parts()] for rank in schedule.actions]
    pairs = [a for rank in schedule.actions for a in rank if a.kind is Kind.FB]
    if any((p.chunk, p.microbatch) == (p.backward_chunk, p.backward_microbatch) for p in pairs):
        return False
    # A pair's halves start together: both must be fed before either has run.
    heads: list[list[list[Action]]] = [[list(a.parts()) for a in r] for r in schedule.actions]
    done: set[tuple[str, int, int, int]] = set()
    channels: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    gradients: dict[tuple[int, int], list[int]] = {}
    last = schedule.num_stages - 1
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(heads):
            if not program:
                continue
            ready = True
            takes: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
            for part in program[0]:
                stage = schedule.stages[rank][part.chunk]
                way = schedule.directions[part.chunk]
                key = (stage, way, part.microbatch)
                if part.microbatch not in schedule.microbatches_of(part.chunk):
                    return False
                if part.kind is Kind.W:
                    ready &= ("I", *key) in done and ("W", *key) not in done
                    continue
                if (part.kind.value.replace("B", "I"), *key) in done:
                    return False
                if part.kind is not Kind.F:
                    ready &= ("F", *key) in done
                at_end = stage == (0 if part.kind is Kind.F else last)
                if not at_end:
                    from_stage = stage - 1 if part.kind is Kind.F else stage + 1
                    letter = "F" if part.kind is Kind.F else "I"
                    ready &= (letter, from_stage, way, part.microbatch) in done
                    source = schedule.rank_of(from_stage, way)
                    if source != rank:
                        takes.setdefault((source, rank, letter), []).append(key[1:])
            if not ready:
                continue
            for channel, messages in takes.items():
                if channels[channel][: len(messages)] != messages:
                    return False
                del channels[channel][: len(messages)]
            for part in program.pop(0):
                stage = schedule.stages[rank][part.chunk]
                way = schedule.directions[part.chunk]
                letter = part.kind.value.replace("B", "I")
                done.add((letter, stage, way, part.microbatch))
                if part.kind in (Kind.B, Kind.W):
                    done.add(("W", stage, way, part.microbatch))
                    gradients.setdefault((rank, part.chunk), []).append(part.microbatch)
                if part.kind is not Kind.W:
                    target = stage + 1 if letter == "F" else stage - 1
                    if 0 <= target <= last and (to := schedule.rank_of(target, way)) != rank:
                        channels.setdefault((rank, to, letter), []).append((way, part.microbatch))
            progress = True
    assert programs
    return not any(heads) and all(
        gradients.get((rank, chunk)) == list(schedule.microbatches_of(chunk))
        for rank in range(schedule.num_ranks)
        for chunk in range(schedule.num_chunks)
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_wrong_schedule_is_refused_or_harmless(name: str) -> None:
    draw = random.Random(name)
    refused: dict[str, int] = {}
    for _ in range(60):
        ranks, microbatches = draw.choice([s for s in sizes(name, 4) if s != (1, 1)])
        for what, wrong in mutations(make_schedule(name, ranks, microbatches), draw):
            try:
                check(wrong)
            except ValueError as error:
                assert str(error).startswith("check: ")  # noqa: PT017
                assert "rank" in str(error)  # noqa: PT017
                refused[what] = refused.get(what, 0) + 1
            else:
                assert what in ("swapped", "moved"), (what, wrong)
                assert is_harmless(wrong), (what, wrong)
    assert refused["dropped"] >= 50
    assert refused["duplicated"] >= 50
    assert refused["swapped"] >= 20


def test_the_naive_execution_accepts_right_schedules() -> None:
    for name in SCHEDULES:
        for ranks, microbatches in sizes(name, 4):
            assert is_harmless(make_schedule(name, ranks, microbatches))


def edited(name: str, rank: int, text: str) -> Schedule:
    """Return a schedule for 2 ranks and 4 micro-batches with one rank's actions given."""
    schedule = make_schedule(name, 2, 4)
    actions = list(schedule.actions)
    actions[rank] = tuple(map(parse_action, text.split()))
    return replace(schedule, actions=tuple(actions))


@pytest.mark.parametrize(
    ("rank", "text", "message"),
    [
        (
            1,
            "F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3",
            r"check: expected every rank to finish, got a deadlock: rank 0 at step 2, B0\.0, for B "
            r"of micro-batch 0 on rank 1; rank 1 at step 2, F0\.2, for F of micro-batch 2 on",
        ),
        (
            0,
            "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3",
            r"check: rank 0: expected B0\.3, got none",
        ),
        (
            0,
            "F0.0 F0.1 B0.0 F0.2 B0.1 B0.1 F0.3 B0.2",
            r"check: rank 0, step 5, B0\.1: expected the next backward of chunk 0 to be of "
            r"micro-batch 2, got 1",
        ),
        (0, "F0.0 B0.1", r"check: rank 0, step 1, B0\.1: expected the next backward .* 0, got 1"),
        (0, "F0.0 F1.0", r"check: rank 0, step 1, F1\.0: expected chunk to be below 1, got 1"),
        (
            0,
            "F0.4",
            r"check: rank 0, step 0, F0\.4: expected microbatch of chunk 0 to be in \[0, 4",
        ),
        (0, "W0.0", r"check: rank 0, step 0, W0\.0: expected I0\.0 to come before it, once"),
        (0, "F0.0 I0.0 F0.1 B0.1 W0.0", r"step 4, W0\.0: expected weights' gradients .* 0 after 1"),
        (0, "F0.0&B0.0", r"step 0, F0\.0&B0\.0: expected the halves of a pair to be independent"),
        (0, "B0.0 F0.0", r"step 0, B0\.0: expected F0\.0 to come before it"),
    ],
)
def test_what_is_wrong_is_named(rank: int, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(edited("1f1b", rank, text))


def test_messages_in_another_order_are_refused() -> None:
    schedule = make_schedule("interleaved", 2, 2)
    actions = [list(rank) for rank in schedule.actions]
    assert words(schedule, 0).startswith("F0.0 F0.1 F1.0 F1.1")
    actions[0][1:3] = [Action(Kind.F, 1, 0), Action(Kind.F, 0, 1)]
    with pytest.raises(ValueError, match=r"expected rank 1 to receive F messages in the order in"):
        check(replace(schedule, actions=tuple(map(tuple, actions))))


def test_places_are_checked() -> None:
    schedule = make_schedule("dualpipev", 2, 4)
    with pytest.raises(ValueError, match="expected each of 4 stages to have one place"):
        check(replace(schedule, stages=((0, 3), (0, 2))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipew", 2, 4), "expected name to be one of 1f1b, .*, got 'dualpipew'"),
        (("1f1b", 0, 4), "expected pipeline_parallel to be at least 1, got 0"),
        (("1f1b", 2, 0), "expected num_microbatches to be at least 1, got 0"),
        (("1f1b", 2, 4, 2), "expected num_chunks of 1f1b to be 1, got 2"),
        (
            ("interleaved", 2, 5),
            r"of interleaved to be a multiple of pipeline_parallel \(2\), got 5",
        ),
        (("interleaved", 2, 4, 1), "expected num_chunks of interleaved to be at least 2, got 1"),
        (("dualpipev", 4, 7), r"of dualpipev to be at least 2 \* pipeline_parallel \(8\), got 7"),
        (("dualpipe", 3, 8), "expected pipeline_parallel of dualpipe to be even, got 3"),
        (("dualpipe", 4, 9), "of dualpipe to be even and at least"),
    ],
)
def test_what_cannot_be_made_is_said(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


def test_places_and_ways_of_both_directions() -> None:
    schedule = make_schedule("dualpipe", 4, 8)
    assert (schedule.num_stages, schedule.num_chunks, schedule.num_directions) == (4, 2, 2)
    assert (schedule.first_ranks, schedule.loss_ranks) == ((0, 3), (3, 0))
    assert [schedule.direction_of(m) for m in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert schedule.previous(1, 1) == (2, 1)
    assert schedule.following(3, 0) is None
    v = make_schedule("dualpipev", 4, 8)
    assert (v.first_ranks, v.loss_ranks) == ((0,), (0,))
    assert (v.mirrored().first_ranks, v.mirrored().loss_ranks) == ((3,), (3,))
    assert v.following(3, 0) == (3, 1)
    assert v.place_of(5) == (2, 1)


def test_a_digest_tells_schedules_apart() -> None:
    all_of_them = [make_schedule(name, 2, 8) for name in SCHEDULES]
    assert len({s.digest() for s in all_of_them}) == len(SCHEDULES)
    assert make_schedule("zbv", 2, 8).digest() == make_schedule("zbv", 2, 8).digest()


def test_actions_are_text_and_back() -> None:
    for name in SCHEDULES:
        for _, _, action in make_schedule(name, 2, 8).steps():
            assert parse_action(str(action)) == action
    with pytest.raises(ValueError, match=r"parse_action: expected text to be like F0\.3"):
        parse_action("F0.3&F0.1")


def test_schedules_are_json_and_back() -> None:
    for name in SCHEDULES:
        schedule = make_schedule(name, 2, 8)
        assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    with pytest.raises(ValueError, match=r"expected schedule, num_microbatches, .* nothing"):
        schedule_from_json({})
    with pytest.raises(ValueError, match="parse_action: expected text to be like"):
        schedule_from_json(make_schedule("1f1b", 1, 1).to_json() | {"actions": ["F0"]})
