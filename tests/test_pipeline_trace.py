"""The file of a run's spans: it comes back as written, and a wrong one is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from ep_megatron.pipeline.trace import LANES, Span, Timeline, read_trace, write_trace


def example(ranks: tuple[int, ...] = (0, 1)) -> Timeline:
    spans = [
        Span(
            rank, lane, node, kind, 0, microbatch, layer, start + 7 * rank, start + 7 * rank + 5, 3
        )
        for rank in ranks
        for lane, node, kind, microbatch, layer, start in (
            ("compute", "attention", "F", 0, 0, 0.0),
            ("comm", "dispatch", "F", 0, 0, 5.0),
            ("compute", "experts", "W", 1, 1, 5.5),
            ("p2p", "send", "F", 0, None, 12.25),
        )
    ]
    return Timeline("a run", 2, tuple(spans), {"schedule": "1f1b", "measured": True})


def test_a_trace_comes_back_as_written(tmp_path: Path) -> None:
    write_trace(example(), tmp_path / "run.json")
    assert read_trace(tmp_path / "run.json") == example()
    for rank in (0, 1):
        write_trace(example((rank,)), tmp_path / f"{rank}.json")
    assert read_trace([tmp_path / "0.json", tmp_path / "1.json"]) == example()


def test_a_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    write_trace(example(), tmp_path / "run.json")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(rank, i): lane for rank in (0, 1) for i, lane in enumerate(LANES)}
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == 8
    assert all(e["dur"] == 5 and isinstance(e["name"], str) for e in complete)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pid": 2}, "event 8: expected pid to be a rank below 2"),
        ({"tid": 3}, "event 8: expected pid, tid, ts, dur and args of a span, got IndexError"),
        ({"dur": -1}, "event 8: expected dur to be not negative"),
        ({"ts": None}, "event 8: expected pid, tid, ts"),
        ({"args": {"node": "x"}}, "event 8: expected pid, .*KeyError: 'kind'"),
        (
            {"dur": 9.0, "ts": -2.0, "tid": 1},
            "expected spans of rank 0, lane comm, in .* to follow",
        ),
    ],
)
def test_a_wrong_trace_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "run.json"
    write_trace(example(), file)
    content = json.loads(file.read_text())
    assert content["traceEvents"][8]["ph"] == "X"
    content["traceEvents"][8] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_trace(file)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for text in ("", "[]", "{}", '{"traceEvents": [], "otherData": {"num_ranks": "x"}}'):
        file.write_text(text)
        with pytest.raises(
            ValueError, match=r"read_trace: expected .*run\.json to be a Chrome trace"
        ):
            read_trace(file)
    with pytest.raises(ValueError, match="at least one file"):
        read_trace([])
