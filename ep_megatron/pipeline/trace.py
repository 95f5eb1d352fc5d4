"""What a run did and when, simulated or measured: spans, and their file, a Chrome trace.

The file opens in Perfetto and chrome://tracing. One process per pipeline rank, one thread per
lane. Each complete event ("ph": "X") carries in `args` what the span was; `otherData` carries
the run's description.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

LANES = ("compute", "comm", "p2p")
"""What a rank does at the same time: compute, dispatch and combine, messages between stages."""

KINDS = ("F", "B", "I", "W")
"""A span's share of an action: F forward, I backward of inputs whose weights' half is a span of
its own (W), B backward in one. Exchanges and messages have F or B."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class Span:
    """One node of one rank.

    Attributes:
        rank: pipeline rank.
        lane: one of `LANES`. Spans of one rank must not overlap within compute nor within comm.
        name: the node: attention, dispatch, experts, combine, dense, embedding, head, loss, send,
            recv; any word may be used, these are coloured.
        kind: one of `KINDS`.
        chunk: the rank's model chunk.
        microbatch: as in the schedule.
        layer: within the chunk; None for what belongs to no layer.
        start: microseconds, on a clock that all ranks of the run share.
        end: microseconds.
        step: index of the action in the rank's schedule.
    """

    rank: int
    lane: str
    name: str
    kind: str
    chunk: int
    microbatch: int
    layer: int | None
    start: float
    end: float
    step: int


@dataclass(frozen=True)
class Timeline:
    """The spans of one training step on all pipeline ranks.

    Attributes:
        title: one line for people.
        num_ranks: pipeline ranks.
        spans: in any order.
        description: what the run was, JSON values: what `program.describe` returns, from which it
            can be simulated again; `measured`; and whatever else.
    """

    title: str
    num_ranks: int
    spans: tuple[Span, ...]
    description: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _by_rank(self) -> list[list[Span]]:
        ranks: list[list[Span]] = [[] for _ in range(self.num_ranks)]
        for span in sorted(self.spans, key=lambda span: (span.start, span.end)):
            ranks[span.rank].append(span)
        return ranks

    def of_rank(self, rank: int) -> list[Span]:
        """Return a rank's spans by their start."""
        return self._by_rank[rank]

    @property
    def start(self) -> float:
        """When the first span begins, in microseconds."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def end(self) -> float:
        """When the last span ends, in microseconds."""
        return max((span.end for span in self.spans), default=0.0)


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write a timeline as a Chrome trace."""
    events: list[dict[str, Any]] = []
    for rank in range(timeline.num_ranks):
        name = {"name": f"pipeline rank {rank}"}
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": name})
        for thread, lane in enumerate(LANES):
            events.append(
                {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread}
                | {"args": {"name": lane}}
            )
    for span in timeline.spans:
        layer = "" if span.layer is None else f" layer {span.layer}"
        events.append(
            {
                "ph": "X",
                "name": f"{span.name}({span.kind}){layer} {span.chunk}.{span.microbatch}",
                "cat": span.kind,
                "pid": span.rank,
                "tid": LANES.index(span.lane),
                "ts": span.start,
                "dur": span.end - span.start,
                "args": {
                    "node": span.name,
                    "kind": span.kind,
                    "chunk": span.chunk,
                    "microbatch": span.microbatch,
                    "layer": span.layer,
                    "step": span.step,
                },
            }
        )
    about = dict(timeline.description) | {
        "title": timeline.title,
        "num_ranks": timeline.num_ranks,
        "version": VERSION,
    }
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_trace(paths: Path | Sequence[Path]) -> Timeline:
    """Read a timeline from one file, or from one file per rank.

    Raises:
        ValueError: names the file, the event and the field when it is not a trace of ours.
        OSError: when a file cannot be read.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    parts = [_read_one(file) for file in files]
    if not parts:
        raise ValueError("read_trace: expected paths to be at least one file, got none")
    first = parts[0]
    for file, part in zip(files, parts, strict=True):
        if part.num_ranks != first.num_ranks:
            raise ValueError(
                f"read_trace: expected num_ranks of {file} to be {first.num_ranks} as in "
                f"{files[0]}, got {part.num_ranks}"
            )
    spans = tuple(span for part in parts for span in part.spans)
    _check_lanes(spans, files)
    return Timeline(first.title, first.num_ranks, spans, first.description)


def _read_one(path: Path) -> Timeline:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = dict(content["otherData"])
        events = list(content["traceEvents"])
        num_ranks, version = int(about.pop("num_ranks")), int(about.pop("version"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"read_trace: expected {path} to be a Chrome trace with otherData.num_ranks and "
            f"otherData.version, got {type(error).__name__}: {error}"
        ) from None
    if version != VERSION:
        raise ValueError(f"read_trace: expected version of {path} to be {VERSION}, got {version}")
    title = str(about.pop("title", path.name))
    spans = []
    for index, event in enumerate(events):
        if isinstance(event, dict) and event.get("ph") != "X":
            continue
        spans.append(_read_span(event, num_ranks, f"{path}, event {index}"))
    return Timeline(title, num_ranks, tuple(spans), about)


def _read_span(event: Any, num_ranks: int, where: str) -> Span:
    try:
        args = event["args"]
        layer = args.get("layer")
        start = float(event["ts"])
        span = Span(
            rank=int(event["pid"]),
            lane=LANES[int(event["tid"])],
            name=str(args["node"]),
            kind=str(args["kind"]),
            chunk=int(args["chunk"]),
            microbatch=int(args["microbatch"]),
            layer=None if layer is None else int(layer),
            start=start,
            end=start + float(event["dur"]),
            step=int(args["step"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"read_trace: {where}: expected pid, tid, ts, dur and args of a span, got "
            f"{type(error).__name__}: {error}"
        ) from None
    for name, is_right, expected in (
        ("pid", 0 <= span.rank < num_ranks, f"a rank below {num_ranks}"),
        ("kind", span.kind in KINDS, f"one of {', '.join(KINDS)}"),
        ("dur", span.end >= span.start, "not negative"),
    ):
        if not is_right:
            raise ValueError(f"read_trace: {where}: expected {name} to be {expected}, got {span}")
    return span


def _check_lanes(spans: Iterable[Span], files: Sequence[Path]) -> None:
    """Refuse spans of one rank and lane that overlap by more than clocks round."""
    lanes: dict[tuple[int, str], list[Span]] = {}
    for span in spans:
        lanes.setdefault((span.rank, span.lane), []).append(span)
    for (rank, lane), members in lanes.items():
        if lane == "p2p":
            continue  # messages of several channels are under way at once
        members.sort(key=lambda span: (span.start, span.end))
        for one, other in pairwise(members):
            if other.start < one.end - 1.0:
                raise ValueError(
                    f"read_trace: expected spans of rank {rank}, lane {lane}, in {files[0]} to "
                    f"follow each other, got {one.name} until {one.end:.0f} us and {other.name} "
                    f"from {other.start:.0f} us"
                )
