"""The command `ep-megatron`."""

from pathlib import Path
from typing import Annotated

import typer

from ep_megatron.cli_care import doctor, soak

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Expert-parallel dispatch and combine for Megatron-core."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def pretrain(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of Megatron arguments.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    max_restarts: Annotated[
        int, typer.Option(help="Restarts from the last checkpoint after a process has failed.")
    ] = 0,
    keys: Annotated[bool, typer.Option("--keys", help="List all keys of a config.")] = False,
) -> None:
    """Train a GPT from a config; any key may follow, as `--num-layers 4`.

    Starts the processes it needs on this host. Under torchrun it is one of them.
    """
    from ep_megatron.train.config import load_config
    from ep_megatron.train.launch import is_worker, run_processes, run_recorded

    if keys:
        _print_keys()
        return
    if config is None:
        raise typer.BadParameter("--config FILE is needed; examples/ has some")
    try:
        settings = load_config(config, context.args)
        if is_worker():
            from ep_megatron.train.pretrain import pretrain as train

            code = run_recorded(lambda: train(settings, resume))
        else:
            num_processes = settings.num_processes or settings.model_parallel_size
            settings.check_world_size(num_processes)
            command = ["-m", "ep_megatron.cli", "pretrain", "--config", str(config), *context.args]
            command += ["--resume"] if resume else []
            code = run_processes(num_processes, command, max_restarts)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


@app.command()
def bench(  # noqa: PLR0913  (every parameter is an option)
    num_ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "2,4,8",
    num_tokens: Annotated[str, typer.Option(help="Tokens per rank.")] = "128,1024",
    hidden: Annotated[str, typer.Option(help="Elements per token.")] = "1024,2048",
    num_topk: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    num_experts: Annotated[int, typer.Option(help="Experts on all ranks.")] = 64,
    implementation: Annotated[
        str, typer.Option(help="Which, by comma; all but low_latency* without.")
    ] = "",
    direction: Annotated[str, typer.Option(help="forward, forward_backward or both.")] = "",
    samples: Annotated[int, typer.Option(help="Samples of each; medians are reported.")] = 15,
    steps: Annotated[
        int, typer.Option(help="Steps in a row per sample; 1: caches as others left them.")
    ] = 1,
    baseline: Annotated[
        str, typer.Option(help="Whose time the ratios are over; the first without.")
    ] = "",
    link: Annotated[
        str, typer.Option(help="On two hosts made for it, joined at this rate, as 1gbit.")
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows here.")] = None,
) -> None:
    """Measure dispatch and combine beside gloo, MPI, Megatron's dispatchers and plain copies.

    All implementations take turns in the same processes. MPI takes part where mpirun and mpi4py
    are installed.
    """
    import json

    from rich.console import Console

    from ep_megatron.bench.case import DIRECTIONS, Case
    from ep_megatron.bench.launch import has_mpi, run
    from ep_megatron.bench.measure import (
        IMPLEMENTATIONS,
        LINK_IMPLEMENTATIONS,
        PACKED_IMPLEMENTATIONS,
    )
    from ep_megatron.bench.table import print_table

    known = LINK_IMPLEMENTATIONS if link else IMPLEMENTATIONS
    names = _choices("--implementation", implementation, known)
    if not implementation:
        names = [name for name in names if name not in PACKED_IMPLEMENTATIONS]
        if not has_mpi():
            names.remove("mpi")
    cases = [
        Case(ranks, tokens, width, num_topk, num_experts)
        for ranks in _numbers("--num-ranks", num_ranks)
        for tokens in _numbers("--num-tokens", num_tokens)
        for width in _numbers("--hidden", hidden)
    ]
    try:
        directions = _choices("--direction", direction, DIRECTIONS)
        rows = run(cases, names, directions, samples, steps, link or None)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print_table(rows, baseline or names[0], Console())
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


@app.command("bench-overlap")
def bench_overlap(
    link: Annotated[
        str, typer.Option(help="Rates of a link between two hosts, by comma; none: no hosts.")
    ] = "200mbit",
    late_ms: Annotated[
        float, typer.Option(help="How late one of two ranks is; 0: no such scenario.")
    ] = 50.0,
    num_tokens: Annotated[int, typer.Option(help="Tokens per rank on a link.")] = 4096,
    samples: Annotated[int, typer.Option(help="Samples of each mode; medians are reported.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows here.")] = None,
) -> None:
    """Measure what queued calls hide behind equally long computation.

    Behind a rank that comes late, on one host, and behind a slow link between two hosts that are
    made for it (network namespaces; needs root and iproute2).
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    from ep_megatron.bench.overlap import print_rows, run

    try:
        rows = run([rate for rate in link.split(",") if rate], late_ms, num_tokens, samples)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print_rows(rows, Console())
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


@app.command("bench-pipeline")
def bench_pipeline(  # noqa: PLR0913  (every parameter is an option)
    link: Annotated[
        str, typer.Option(help="Rates of the link between the two hosts, by comma.")
    ] = "200mbit,400mbit",
    schedule: Annotated[str, typer.Option(help="dualpipev, interleaved-overlap; both.")] = "",
    num_microbatches: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps of each mode; medians are reported.")] = 3,
    compute_ms: Annotated[
        float, typer.Option(help="Milliseconds that every compute node is padded to.")
    ] = 40.0,
    pipeline_parallel: Annotated[int, typer.Option(help="Pipeline ranks on each host.")] = 1,
    num_layers: Annotated[int, typer.Option(help="0: two per pipeline rank.")] = 0,
    hidden: Annotated[int, typer.Option(help="Elements per token, in float32.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences of 256 tokens per micro-batch.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Write traces, pages and pictures into this folder.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows here.")] = None,
) -> None:
    """Measure how much communication a pipeline schedule hides, beside what the simulator says.

    Two hosts are made for it (network namespaces), with one expert rank of each pipeline rank on
    either, joined by a slow link. Real Megatron layers run, padded by sleep; gradients of all modes
    are compared in bits.
    """
    import json

    from rich.console import Console

    from ep_megatron.bench.pipeline import SCHEDULES, Plan, print_rows, run, to_json
    from ep_megatron.bench.pipeline_model import Sizes

    stages = _positive("--pipeline-parallel", pipeline_parallel)
    plan = Plan(
        tuple(_choices("--schedule", schedule, SCHEDULES)),
        _positive("--num-microbatches", num_microbatches),
        _positive("--steps", steps),
        compute_ms,
        Sizes(
            num_layers=_positive("--num-layers", num_layers or 2 * stages),
            hidden=_positive("--hidden", hidden),
            batch=_positive("--batch", batch),
        ),
        stages,
    )
    rows = []
    try:
        for rate in link.split(","):
            rows += run(rate, plan, output)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print_rows(rows, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(rows, plan), indent=1) + "\n")


@app.command()
def simulate(  # noqa: PLR0913  (every parameter is an option)
    schedule: Annotated[str, typer.Option(help="By comma; dualpipev, with --gpus all.")] = "",
    pipeline_parallel: Annotated[str, typer.Option(help="Ranks, by comma; 4, or 2,4,8,16.")] = "",
    num_microbatches: Annotated[str, typer.Option(help="Micro-batches, by comma.")] = "16",
    gpus: Annotated[int, typer.Option(help="Of a cluster that shares --global-batch.")] = 0,
    global_batch: Annotated[int, typer.Option(help="Micro-batches of a step on all --gpus.")] = 0,
    num_chunks: Annotated[int | None, typer.Option(help="Per rank, if interleaved.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="All schedules.")] = False,
    profile: Annotated[
        str, typer.Option(help="Node times: a YAML file, or deepseek-v3-h800, or unit.")
    ] = "deepseek-v3-h800",
    expert_parallel: Annotated[str, typer.Option(help="Expert-parallel sizes, by comma.")] = "",
    communication_sms: Annotated[str, typer.Option(help="SMs for exchanges, by comma.")] = "",
    imbalance: Annotated[float, typer.Option(help="Rows of the fullest rank over the mean.")] = 1.0,
    overlap: Annotated[
        str, typer.Option(help="pairs; weights (behind exchanges, no pairs); none (blocking).")
    ] = "pairs",
    host_in_step: Annotated[bool, typer.Option("--host-in-step", help="As on CPUs.")] = False,
    launch_late: Annotated[
        bool, typer.Option("--launch-late", help="Exchanges, in a pair.")
    ] = False,
    memory_limit: Annotated[float | None, typer.Option(help="GiB of a rank.")] = None,
    from_trace: Annotated[
        list[Path] | None, typer.Option(help="Traces of a measured run; simulate that run.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Simulate this measured run with the node times of --from-trace."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of the timelines.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the best one's picture.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write its Perfetto trace.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows here.")] = None,
) -> None:
    """Predict the step time, bubble, exposed communication and memory of pipeline schedules.

    Several values of an option give a table of all combinations, best first.
    """
    from rich.console import Console

    from ep_megatron.pipeline import command
    from ep_megatron.pipeline.plan import by_merit, cases, cluster_cases, run_case
    from ep_megatron.pipeline.profile import load_profile
    from ep_megatron.pipeline.program import Options
    from ep_megatron.pipeline.schedule import SCHEDULES

    console = Console()
    try:
        if from_trace:
            simulation, measured = command.compare_with_trace(from_trace, against or [], console)
            timelines = [(measured, None), (simulation.timeline, simulation)]
            written = command.write_files(timelines, html, svg, trace)
        else:
            (mode,) = _choices("--overlap", overlap, ("pairs", "weights", "none"))
            options = Options(
                mode == "pairs", mode != "none", mode == "none", not host_in_step, not launch_late
            )
            known = load_profile(profile)
            limit = None if memory_limit is None else memory_limit * command.GIB
            chosen = schedule or ("" if gpus else "dualpipev")
            asked = cases(
                _choices("--schedule", "" if compare else chosen, tuple(SCHEDULES)),
                _numbers("--pipeline-parallel", pipeline_parallel or ("2,4,8,16" if gpus else "4")),
                _numbers("--num-microbatches", num_microbatches),
                num_chunks,
                _numbers("--expert-parallel", expert_parallel) if expert_parallel else [None],
                _numbers("--communication-sms", communication_sms) if communication_sms else [None],
            )
            if gpus or global_batch:
                asked = cluster_cases(asked, gpus, global_batch, known)
            outcomes = by_merit([run_case(c, known, options, imbalance) for c in asked], limit)
            found = command.print_plan(outcomes, console, limit)
            written = command.write_files([(f.timeline, f) for f in found], html, svg, trace)
            if json_file is not None:
                json_file.write_text(command.as_json(outcomes))
                written.append(json_file)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    for file in written:
        typer.echo(f"wrote {file}")


@app.command()
def scale(  # noqa: PLR0913  (every parameter is an option)
    fabric: Annotated[str, typer.Option(help="h100, b200, nvl72, by comma; all without.")] = "",
    num_ranks: Annotated[
        str, typer.Option(help="Ranks, separated by commas.")
    ] = "8,16,32,64,128,256,512,1024,2048",
    num_tokens: Annotated[int, typer.Option(help="Tokens per rank.")] = 4096,
    hidden: Annotated[int, typer.Option(help="Elements per token.")] = 7168,
    num_topk: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    num_experts: Annotated[int, typer.Option(help="Experts; with more ranks, one per rank.")] = 256,
    max_nodes: Annotated[int, typer.Option(help="Most nodes of a token; 0: any number.")] = 4,
    busiest: Annotated[float, typer.Option(help="Rows of the busiest rank over the mean.")] = 1.0,
    routing: Annotated[
        Path | None, typer.Option(help="routing.jsonl of a training run, in place of --busiest.")
    ] = None,
    first_iteration: Annotated[int, typer.Option(help="Of --routing, the first to count.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here.")] = None,
) -> None:
    """Work out bytes, messages, memory and expected times of large groups; nothing is run.

    FP8 rows in dispatch, bfloat16 in combine. docs/scale.md says what is assumed.
    """
    from ep_megatron.scale import FABRICS, Layer, markdown, plans
    from ep_megatron.scale_routing import imbalance_table, read_routing

    sizes = _numbers("--num-ranks", num_ranks)
    try:
        if routing is not None:
            found_routing = read_routing(routing, first_iteration)
            busiest = found_routing[-1].quantile(0.5)
            typer.echo(f"{routing}:\n\n{imbalance_table(found_routing)}")
            typer.echo(f"below, the busiest rank has {busiest:.2f} times the mean (last median)\n")
        layer = Layer(num_tokens, hidden, num_topk, num_experts, max_nodes, busiest=busiest)
        by_fabric = {
            name: plans(sizes, layer, FABRICS[name])
            for name in _choices("--fabric", fabric, tuple(FABRICS))
        }
        for name, found in by_fabric.items():
            typer.echo(f"{name}: {FABRICS[name].name}\n\n{markdown(found)}")
        if plot is not None:
            from ep_megatron.scale_picture import draw

            draw(by_fabric, plot)
            typer.echo(f"wrote {plot}")
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _numbers(option: str, text: str) -> list[int]:
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"{option}: expected positive numbers, got {text!r}")
    return [int(part) for part in text.split(",")]


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise typer.BadParameter(f"{option}: expected a positive number, got {value}")
    return value


def _choices(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    return names


def _print_keys() -> None:
    """Print key, type, default and meaning of every key, by section."""
    from rich.console import Console
    from rich.table import Table

    from ep_megatron.train.config import SECTIONS
    from ep_megatron.train.section import describe_keys

    console = Console()
    for section in SECTIONS:
        table = Table("key", "values", "default", "meaning", title=section.__doc__)
        for row in describe_keys(section):
            table.add_row(*row)
        console.print(table)


app.command()(doctor)
app.command()(soak)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
