"""Overlap measured: a pipeline schedule on two hosts that a slow link joins, in three modes.

    blocking   nothing runs beside an exchange
    lone       weights' gradients run beside the exchange of their inputs' gradients
    overlap    and the two halves of a pair run beside each other's exchanges

Two ranks, one per host, share the experts of each pipeline stage; every exchange crosses the link,
and no message between stages does. From the recorded
timelines: the step, the exposed communication (when an exchange runs and nothing is computed), and
beside each the simulator's word on it, whose node times are those of the blocking run alone.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ep_megatron.bench.pipeline_model import EXPERT_RANKS, Sizes
from ep_megatron.bench.pipeline_ranks import MODES, trace_file
from ep_megatron.bench.two_hosts import run_ranks, two_hosts
from ep_megatron.pipeline.calibrate import calibrate
from ep_megatron.pipeline.measures import measure
from ep_megatron.pipeline.page import Entry, to_html
from ep_megatron.pipeline.picture import to_svg
from ep_megatron.pipeline.simulate import Simulation, simulate
from ep_megatron.pipeline.trace import Timeline, read_trace, write_trace

SCHEDULES = ("dualpipev", "interleaved-overlap")
"""Those that have pairs, on any number of pipeline ranks."""

_SECONDS = 1800  # for all schedules over one link


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        schedules: names, of `SCHEDULES`.
        num_microbatches: of a step.
        num_steps: measured per mode; modes take turns step by step.
        compute_ms: what every compute node is padded to.
        sizes: of the model.
        pipeline_parallel: pipeline ranks on each host.
    """

    schedules: tuple[str, ...] = SCHEDULES
    num_microbatches: int = 12
    num_steps: int = 3
    compute_ms: float = 40.0
    sizes: Sizes = field(default_factory=Sizes)
    pipeline_parallel: int = 1


@dataclass(frozen=True)
class Row:
    """One mode of one schedule over one link; times in milliseconds, medians over steps.

    Attributes:
        link: rate of the link.
        schedule: its name.
        mode: one of `MODES`.
        pipeline_parallel: pipeline ranks.
        step: from the first node's start to the last one's end, mean of both hosts.
        min_step: the shortest.
        max_step: the longest.
        predicted_step: by the simulator, from the blocking run.
        exposed: communication without compute, mean of all ranks.
        predicted_exposed: by the simulator, from the blocking run.
        exposed_share: `exposed` over that of the blocking run.
        exchange: mean time of an exchange in the blocking run.
        load: of the machine over the last minute, when the run ended.
    """

    link: str
    schedule: str
    mode: str
    pipeline_parallel: int
    step: float
    min_step: float
    max_step: float
    predicted_step: float
    exposed: float
    predicted_exposed: float
    exposed_share: float
    exchange: float
    load: float


def run(link: str, plan: Plan, folder: Path | None = None) -> list[Row]:
    """Measure over one link; write the timelines into `folder` if given.

    For every schedule: a Chrome trace per mode and host of the median step, a page of these steps
    with their simulations, and a picture of the overlapped one.

    Args:
        link: rate, as `tc` spells it.
        plan: what is measured.
        folder: is made where it is not.

    Raises:
        HostsUnavailableError: this process may not make hosts here; with the reason.
        RuntimeError: a rank failed, with its output; or gradients of two modes differ.
    """
    with tempfile.TemporaryDirectory(prefix="ep_bench_") as work, two_hosts(link) as hosts:
        job = Path(work, "job.json")
        job.write_text(json.dumps(asdict(plan) | {"folder": work, "modes": list(MODES)}))
        arguments = ["-m", "ep_megatron.bench.pipeline_ranks", str(job)]
        stages = plan.pipeline_parallel
        run_ranks(hosts, (stages, stages), arguments, {}, _SECONDS, in_turn=True)
        load = os.getloadavg()[0]
        rows = []
        for schedule in plan.schedules:
            steps = {
                mode: [
                    _read(Path(work), (schedule, mode, step), stages)
                    for step in range(plan.num_steps)
                ]
                for mode in MODES
            }
            rows += _judge(link, schedule, steps, load)
            if folder is not None:
                _write(link, schedule, steps, folder)
    return rows


_Step = list[Timeline]  # one timeline, of all pipeline ranks, per expert rank


def _read(folder: Path, which: tuple[str, str, int], stages: int) -> _Step:
    files = [trace_file(folder, *which, rank) for rank in range(EXPERT_RANKS * stages)]
    return [read_trace(files[rank::EXPERT_RANKS]) for rank in range(EXPERT_RANKS)]


def _duration(step: _Step) -> float:
    return statistics.fmean(timeline.end - timeline.start for timeline in step)


def _exposed(step: _Step) -> float:
    return statistics.fmean(rank.exposed for timeline in step for rank in measure(timeline))


def _median_step(steps: Sequence[_Step]) -> _Step:
    return sorted(steps, key=_duration)[len(steps) // 2]


def _foretell(base: _Step, step: _Step, title: str) -> Simulation:
    """Simulate what `step` ran, with the node times of `base` alone."""
    ran = calibrate(step[0])
    return simulate(ran.schedule, calibrate(base[0]).costs, ran.options, title)


def _judge(link: str, schedule: str, steps: dict[str, list[_Step]], load: float) -> list[Row]:
    base = _median_step(steps["blocking"])
    exchanges = [span.end - span.start for span in base[0].spans if span.lane == "comm"]
    blocking = statistics.median(map(_exposed, steps["blocking"]))
    rows = []
    for mode, found in steps.items():
        simulation = _foretell(base, _median_step(found), mode)
        exposed = statistics.median(map(_exposed, found))
        durations = [_duration(step) / 1e3 for step in found]
        rows.append(
            Row(
                link=link,
                schedule=schedule,
                mode=mode,
                pipeline_parallel=base[0].num_ranks,
                step=statistics.median(durations),
                min_step=min(durations),
                max_step=max(durations),
                predicted_step=simulation.step_time / 1e3,
                exposed=exposed / 1e3,
                predicted_exposed=statistics.fmean(r.exposed for r in simulation.ranks) / 1e3,
                exposed_share=exposed / blocking,
                exchange=statistics.fmean(exchanges) / 1e3,
                load=load,
            )
        )
    return rows


def _write(link: str, schedule: str, steps: dict[str, list[_Step]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base, shown = _median_step(steps["blocking"]), []
    stages = base[0].num_ranks
    name = f"{schedule}-{link}" + (f"-pp{stages}" if stages > 1 else "")
    for mode, found in steps.items():
        step = _median_step(found)
        for rank, timeline in enumerate(step):
            write_trace(timeline, folder / f"{name}-{mode}-rank{rank}.json")
        shown.append(replace(step[0], title=f"{mode}, measured over {link}"))
        if mode != "blocking":
            shown.append(_foretell(base, step, f"{mode}, simulated").timeline)
        if mode == "overlap":
            picture = to_svg(shown[-2], duration=base[0].end - base[0].start)
            (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    page = to_html(f"{schedule} over {link}", [Entry(timeline) for timeline in shown])
    (folder / f"{name}.html").write_text(page, encoding="utf-8")


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a table per link and schedule, each narrow enough for a plain terminal."""
    columns = ("exposed", "share", "simulated", "step", "simulated", "ratio")
    for (link, schedule), group in groupby(rows, lambda row: (row.link, row.schedule)):
        modes = list(group)
        title = f"{schedule} over {link}, an exchange takes {modes[0].exchange:.1f} ms"
        table = Table("mode", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in modes:
            table.add_row(
                row.mode,
                f"{row.exposed / 1e3:.2f} s",
                f"{100 * row.exposed_share:.1f} %",
                f"{row.predicted_exposed / 1e3:.2f} s",
                f"{row.step / 1e3:.2f} s",
                f"{row.predicted_step / 1e3:.2f} s",
                f"{row.predicted_step / row.step:.3f}",
            )
        console.print(table)
    load = max(row.load for row in rows)
    words = (
        "exposed: an exchange runs and nothing is computed; share: of blocking; simulated: with "
        "the node times of the blocking run; "
        f"ratio: simulated over measured step; load of the machine: {load:.1f}"
    )
    console.print(words, style="dim", highlight=False)


def to_json(rows: Sequence[Row], plan: Plan) -> dict[str, Any]:
    """Return the rows, times in milliseconds, and what was measured."""
    return {"plan": asdict(plan), "rows": [asdict(row) for row in rows]}
