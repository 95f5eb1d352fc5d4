"""Litmus tests: the emulator produces only what the PTX memory model allows, and reports a race
exactly when some execution has one."""

import re
from pathlib import Path

import pytest

from tests.emulator.litmus import Op, Program, Thread, emulate, explore


def load(place: str, register: str, order: str = "weak", scope: str = "sys") -> Op:
    return Op("ld", order, scope, place, register=register)


def store(place: str, value: int, order: str = "weak", scope: str = "sys") -> Op:
    return Op("st", order, scope, place, value)


def add(place: str, value: int, order: str, scope: str = "sys", register: str = "") -> Op:
    return Op("add", order, scope, place, value, register)


def fence(scope: str) -> Op:
    return Op("fence", "acq_rel", scope)


def then(op: Op, register: str, value: int = 1) -> Op:
    """Take a step only if a load returned a value."""
    return Op(op.kind, op.order, op.scope, op.place, op.value, op.register, (register, value))


def two(first: list[Op], second: list[Op], where: str = "ranks") -> tuple[Thread, ...]:
    rank, cta, warp, lane = {
        "ranks": (1, 0, 0, 0),
        "ctas": (0, 1, 0, 0),
        "warps": (0, 0, 1, 0),
        "lanes": (0, 0, 0, 5),
    }[where]
    return Thread(0, 0, 0, 0, tuple(first)), Thread(rank, cta, warp, lane, tuple(second))


def message(send: list[Op], receive: list[Op], where: str = "ranks") -> Program:
    """Write x, send; receive into f and read x if the message is there."""
    receive = [*receive, then(load("x", "r"), "f")]
    return Program(two([store("x", 1), *send], receive, where), ("f", "r"))


def flag(order: str, scope: str = "sys") -> list[Op]:
    return [store("flag", 1, order, scope)]


def poll(order: str, scope: str = "sys") -> list[Op]:
    return [load("flag", "f", order, scope)]


PROGRAMS: dict[str, Program] = {}
for _scope in ("cta", "gpu", "sys"):
    for _where in ("ranks", "ctas", "warps", "lanes"):
        PROGRAMS[f"message, {_scope} between {_where}"] = message(
            flag("release", _scope), poll("acquire", _scope), _where
        )
PROGRAMS |= {
    "relaxed store": message(flag("relaxed"), poll("acquire")),
    "relaxed load": message(flag("release"), poll("relaxed")),
    "weak flag": message([store("flag", 1)], poll("acquire")),
    "fences around relaxed flags": message(
        [fence("sys"), *flag("relaxed")], [*poll("relaxed"), fence("sys")]
    ),
    "sender's fence within the gpu": message(
        [fence("gpu"), *flag("relaxed")], [*poll("relaxed"), fence("sys")]
    ),
    "receiver's fence within the gpu": message(
        [fence("sys"), *flag("relaxed")], [*poll("relaxed"), fence("gpu")]
    ),
    "fence, then gpu flag": message(
        [fence("sys"), *flag("relaxed", "gpu")], [*poll("relaxed"), fence("sys")]
    ),
    "atomic counter": message([add("flag", 1, "release")], poll("acquire")),
    "atomic without release": message([add("flag", 1, "relaxed")], poll("acquire")),
    "receiver adds": message(flag("release"), [add("flag", 4, "acquire", register="f")]),
    "receiver adds at gpu scope": message(
        flag("release"), [add("flag", 4, "acquire", "gpu", register="f")]
    ),
    "store after the flag": Program(
        two(
            [store("flag", 1, "release"), store("x", 1)],
            [load("flag", "f", "acquire"), then(load("x", "r"), "f")],
        ),
        ("f", "r"),
    ),
    "slot given back by a release": Program(
        two(
            [load("head", "f", "acquire"), then(store("x", 2), "f")],
            [load("x", "r"), store("head", 1, "release")],
        ),
        ("f", "r"),
    ),
    "slot given back by a relaxed store": Program(
        two(
            [load("head", "f", "relaxed"), then(store("x", 2), "f")],
            [load("x", "r"), store("head", 1, "relaxed")],
        ),
        ("f", "r"),
    ),
    "a relaxed add carries a release on": Program(
        (
            Thread(0, 0, 0, 0, (store("x", 1), add("flag", 1, "release"))),
            Thread(0, 1, 0, 0, (add("flag", 2, "relaxed"),)),
            Thread(1, 0, 0, 0, (load("flag", "f", "acquire"), then(load("x", "r"), "f", 3))),
        ),
        ("f", "r"),
    ),
    "a relaxed store does not": Program(
        (
            Thread(0, 0, 0, 0, (store("x", 1), store("flag", 1, "release"))),
            Thread(0, 1, 0, 0, (store("flag", 2, "relaxed"),)),
            Thread(1, 0, 0, 0, (load("flag", "f", "acquire"), then(load("x", "r"), "f", 2))),
        ),
        ("f", "r"),
    ),
    "two hops": Program(
        (
            Thread(0, 0, 0, 0, (store("x", 1), store("a", 1, "release", "gpu"))),
            Thread(
                0,
                1,
                0,
                0,
                (load("a", "f", "acquire", "gpu"), then(store("b", 1, "release"), "f")),
            ),
            Thread(1, 0, 0, 0, (load("b", "g", "acquire"), then(load("x", "r"), "g"))),
        ),
        ("g", "r"),
    ),
    "two hops, the second relaxed": Program(
        (
            Thread(0, 0, 0, 0, (store("x", 1), store("a", 1, "release", "gpu"))),
            Thread(
                0,
                1,
                0,
                0,
                (load("a", "f", "acquire", "gpu"), then(store("b", 1, "relaxed"), "f")),
            ),
            Thread(1, 0, 0, 0, (load("b", "g", "acquire"), then(load("x", "r"), "g"))),
        ),
        ("g", "r"),
    ),
    "barrier, then one releases for all": Program(
        (
            Thread(0, 0, 0, 0, (store("x", 1), Op("bar"))),
            Thread(0, 0, 1, 0, (Op("bar"), store("flag", 1, "release"))),
            Thread(1, 0, 0, 0, (load("flag", "f", "acquire"), then(load("x", "r"), "f"))),
        ),
        ("f", "r"),
    ),
    "one acquires for all, then a barrier": Program(
        (
            Thread(0, 0, 0, 0, (store("x", 1), store("flag", 1, "release"))),
            Thread(1, 0, 0, 0, (load("flag", "f", "acquire"), Op("bar"))),
            Thread(1, 0, 1, 0, (Op("bar"), load("x", "r"))),
        ),
        ("f", "r"),
    ),
    "warp barrier, then one lane releases": Program(
        (
            Thread(0, 0, 0, 3, (store("x", 1), Op("warp"))),
            Thread(0, 0, 0, 0, (Op("warp"), store("flag", 1, "release"))),
            Thread(1, 0, 0, 0, (load("flag", "f", "acquire"), then(load("x", "r"), "f"))),
        ),
        ("f", "r"),
    ),
    "no warp barrier": Program(
        (
            Thread(0, 0, 0, 3, (store("x", 1),)),
            Thread(0, 0, 0, 0, (store("flag", 1, "release"),)),
            Thread(1, 0, 0, 0, (load("flag", "f", "acquire"), then(load("x", "r"), "f"))),
        ),
        ("f", "r"),
    ),
    "barrier between two stores": Program(
        two([store("x", 1), Op("bar")], [Op("bar"), store("x", 2), load("x", "r")], "warps"),
        ("r",),
    ),
    "relaxed stores at too small a scope": Program(
        two([store("x", 1, "relaxed", "gpu")], [load("x", "r", "relaxed", "gpu")]), ("r",)
    ),
    "relaxed stores at the same scope": Program(
        two([store("x", 1, "relaxed", "gpu")], [load("x", "r", "relaxed", "gpu")], "ctas"), ("r",)
    ),
    "store buffering": Program(
        two(
            [store("x", 1, "relaxed"), load("y", "a", "relaxed")],
            [store("y", 1, "relaxed"), load("x", "b", "relaxed")],
        ),
        ("a", "b"),
    ),
    "load buffering": Program(
        two(
            [load("x", "a", "relaxed"), store("y", 1, "relaxed")],
            [load("y", "b", "relaxed"), store("x", 1, "relaxed")],
        ),
        ("a", "b"),
    ),
    "reads of one place in order": Program(
        two(
            [store("x", 1, "relaxed"), store("x", 2, "relaxed")],
            [load("x", "a", "relaxed"), load("x", "b", "relaxed")],
        ),
        ("a", "b"),
    ),
    "atomics lose nothing": Program(
        two(
            [add("x", 1, "relaxed", register="a")],
            [add("x", 2, "relaxed", register="b")],
        ),
        ("a", "b"),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_allowed_results_and_races_where_there_are_some(name: str) -> None:
    program = PROGRAMS[name]
    allowed = explore(program)
    raced = False
    for seed in range(24):
        for mode in ("weak", "race", "race+weak"):
            result, reports = emulate(program, seed, mode)
            assert result in allowed.results, (mode, seed, sorted(allowed.results))
            assert {kind for kind, _ in reports} <= {"race"}
            raced = raced or bool(reports)
    assert raced == allowed.has_race


def test_weak_mode_shows_what_only_weak_memory_does() -> None:
    program = PROGRAMS["relaxed store"]
    seen = {emulate(program, seed, "weak")[0] for seed in range(300)}
    assert (1, 0) in seen  # the flag without the data
    buffering = {emulate(PROGRAMS["store buffering"], seed, "weak")[0] for seed in range(300)}
    assert (0, 0) in buffering


@pytest.mark.parametrize(
    ("name", "bad", "is_allowed"),
    [
        ("message, sys between ranks", (1, 0), False),
        ("message, gpu between ranks", (1, 0), True),
        ("message, gpu between ctas", (1, 0), False),
        ("message, cta between ctas", (1, 0), True),
        ("relaxed store", (1, 0), True),
        ("relaxed load", (1, 0), True),
        ("fences around relaxed flags", (1, 0), False),
        ("sender's fence within the gpu", (1, 0), True),
        ("slot given back by a release", (1, 2), False),
        ("slot given back by a relaxed store", (1, 2), True),
        ("a relaxed add carries a release on", (3, 0), False),
        ("a relaxed store does not", (2, 0), True),
        ("two hops", (1, 0), False),
        ("barrier, then one releases for all", (1, 0), False),
        ("no warp barrier", (1, 0), True),
        ("store buffering", (0, 0), True),
        ("reads of one place in order", (2, 1), False),
        ("atomics lose nothing", (0, 0), False),
    ],
)
def test_the_checker_knows_the_classics(name: str, bad: tuple[int, ...], is_allowed: bool) -> None:
    assert (bad in explore(PROGRAMS[name]).results) == is_allowed


def test_the_programs_that_the_documentation_names_are_there() -> None:
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    table = text.split("### Litmus tests")[1].split("##")[0]
    names = [
        name for row in re.findall(r"^\|.*$", table, re.M) for name in re.findall("`(.*?)`", row)
    ]
    assert len(names) > 10
    assert not set(names) - set(PROGRAMS)
