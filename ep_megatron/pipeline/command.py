"""What `ep-megatron simulate` prints and writes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ep_megatron.pipeline.calibrate import calibrate, name_halves
from ep_megatron.pipeline.measures import measure
from ep_megatron.pipeline.page import Entry, to_html
from ep_megatron.pipeline.picture import format_time, to_svg
from ep_megatron.pipeline.plan import Outcome
from ep_megatron.pipeline.simulate import Simulation, simulate
from ep_megatron.pipeline.trace import Timeline, read_trace, write_trace

GIB = 2.0**30


def print_plan(
    outcomes: Sequence[Outcome], console: Console, memory_limit: float | None = None
) -> list[Simulation]:
    """Print what cases come to, by rank where there is one case; return the simulations.

    Raises:
        ValueError: when no case can be; says why the first one cannot.
    """
    found = [outcome.simulation for outcome in outcomes if outcome.simulation is not None]
    if not outcomes:
        raise ValueError(
            "simulate: expected pipeline ranks to divide the GPUs, expert ranks what remains, and "
            "that the batch, got no such combination; change --gpus, --global-batch, "
            "--pipeline-parallel or --expert-parallel"
        )
    if not found:
        raise ValueError(outcomes[0].reason)
    print_outcomes(outcomes, console, memory_limit)
    if len(found) == 1:
        print_ranks(found[0], console)
    return found


def print_outcomes(
    outcomes: Sequence[Outcome], console: Console, memory_limit: float | None = None
) -> None:
    """Print a table, best first; below it why some combinations cannot be."""
    has_memory = any(o.simulation and o.simulation.peak_bytes for o in outcomes)
    has_speed = any(o.tokens_per_second is not None for o in outcomes)
    choices = [
        (heading, name)
        for heading, name in (
            ("PP", "pipeline_parallel"),
            ("M", "num_microbatches"),
            ("chunks", "num_chunks"),
            ("EP", "expert_parallel"),
            ("SMs", "communication_sms"),
        )
        if any(getattr(outcome.case, name) is not None for outcome in outcomes)
    ]
    table = Table(Column("schedule", overflow="fold"), pad_edge=False)
    for column in [heading for heading, _ in choices] + ["step", "bubble", "exposed", "peak"]:
        table.add_column(column, justify="right", no_wrap=True)
    if has_memory:
        table.add_column("GiB", justify="right", no_wrap=True)
    if has_speed:
        table.add_column("tokens/s", justify="right", no_wrap=True)
    for outcome in outcomes:
        simulation = outcome.simulation
        if simulation is None:
            continue
        row = [outcome.case.schedule]
        for _, name in choices:
            value = getattr(outcome.case, name)
            row.append("" if value is None else str(value))
        row += _facts(simulation)
        if has_memory:
            is_over = memory_limit is not None and simulation.peak_bytes > memory_limit
            row.append(f"{simulation.peak_bytes / GIB:.1f}" + ("!" if is_over else ""))
        if has_speed:
            speed = outcome.tokens_per_second
            row.append("" if speed is None else f"{speed:,.0f}")
        table.add_row(*row)
    console.print(table)
    words = ["peak: chunk activations held at one time"]
    words += ["GiB: with weights and gradients, of the fullest rank"] if has_memory else []
    words += ["!: over the limit"] if memory_limit is not None else []
    words += ["tokens/s: per rank"] if has_speed else []
    console.print("; ".join(words), style="dim", highlight=False)
    for outcome in outcomes:
        if outcome.simulation is None:
            console.print(f"left out {outcome.case}: {outcome.reason}", highlight=False)


def _facts(simulation: Simulation) -> list[str]:
    low, high = min(simulation.peak_chunks), max(simulation.peak_chunks)
    return [
        format_time(simulation.step_time),
        f"{100 * simulation.bubble:.1f}%",
        f"{100 * simulation.exposed:.1f}%",
        f"{high:.3g}" if low == high else f"{low:.3g}-{high:.3g}",
    ]


def print_ranks(simulation: Simulation, console: Console) -> None:
    """Print what each rank of one simulation does."""
    table = Table("rank", title=simulation.timeline.title)
    for column in ("compute", "comm", "exposed", "idle", "peak", "GiB"):
        table.add_column(column, justify="right")
    for rank in simulation.ranks:
        memory = simulation.peak_activation_bytes[rank.rank] + simulation.parameter_bytes[rank.rank]
        table.add_row(
            str(rank.rank),
            *map(format_time, (rank.compute, rank.communication, rank.exposed, rank.idle)),
            f"{simulation.peak_chunks[rank.rank]:.3g}",
            f"{memory / GIB:.1f}" if memory else "",
        )
    console.print(table)


def compare_with_trace(
    paths: Sequence[Path], against: Sequence[Path], console: Console
) -> tuple[Simulation, Timeline]:
    """Simulate a measured run and print both side by side.

    Args:
        paths: the trace that node times are taken from.
        against: the trace that says what is simulated, and is compared; the same one when empty.
            It may be of another schedule with the same stages, or of a run with more overlap.
        console: where the table goes.

    Raises:
        ValueError: when a file is no trace of ours, or does not say what was run.
        OSError: when a file cannot be read.
    """
    source = calibrate(read_trace(paths))
    measured = read_trace(against or paths)
    found = calibrate(measured) if against else source
    simulation = simulate(found.schedule, source.costs, found.options, "simulated")
    table = Table("", title=measured.title)
    for column in ("measured", "simulated", "ratio"):
        table.add_column(column, justify="right")
    real, ranks = measure(measured), simulation.ranks
    step = measured.end - measured.start
    rows = [("step", step, simulation.step_time)]
    for what in ("compute", "communication", "exposed", "idle"):
        ours = [sum(getattr(rank, what) for rank in side) / len(side) for side in (real, ranks)]
        rows.append((f"{what}, mean of ranks", ours[0], ours[1]))
    for name, one, other in rows:
        ratio = f"{other / one:.3f}" if one else ""
        table.add_row(name, format_time(one), format_time(other), ratio)
    console.print(table)
    return simulation, name_halves(measured, found.schedule)


def write_files(
    timelines: Sequence[tuple[Timeline, Simulation | None]],
    html: Path | None,
    svg: Path | None,
    trace: Path | None,
) -> list[Path]:
    """Write a page of all timelines, a picture and a trace of the first; return what was written.

    Raises:
        OSError: when a file cannot be written.
    """
    written = []
    if html is not None:
        entries = [
            Entry(timeline, () if simulation is None else _page_facts(simulation))
            for timeline, simulation in timelines
        ]
        title = timelines[0][0].title if len(timelines) == 1 else "Pipeline schedules"
        html.write_text(to_html(title, entries), encoding="utf-8")
        written.append(html)
    if svg is not None:
        svg.write_text(to_svg(timelines[0][0]), encoding="utf-8")
        written.append(svg)
    if trace is not None:
        write_trace(timelines[0][0], trace)
        written.append(trace)
    return written


def _page_facts(simulation: Simulation) -> tuple[tuple[str, str], ...]:
    facts = [("chunk activations", _facts(simulation)[-1])]
    if simulation.peak_bytes:
        facts.append(("memory", f"{simulation.peak_bytes / GIB:.1f} GiB"))
    return tuple(facts)


def as_json(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as JSON: times in microseconds, memory in bytes."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        row: dict[str, Any] = asdict(outcome.case)
        simulation = outcome.simulation
        if simulation is None:
            row["reason"] = outcome.reason
        else:
            row |= {
                "step_time": simulation.step_time,
                "bubble": simulation.bubble,
                "exposed": simulation.exposed,
                "tokens_per_second": outcome.tokens_per_second,
                "peak_bytes": simulation.peak_bytes,
                "peak_chunks": simulation.peak_chunks,
                "peak_activation_bytes": simulation.peak_activation_bytes,
                "parameter_bytes": simulation.parameter_bytes,
                "ranks": [asdict(rank) for rank in simulation.ranks],
            }
        rows.append(row)
    return json.dumps(rows, indent=1) + "\n"
