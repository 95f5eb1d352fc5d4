"""The commands that look after machines and running ranks: `doctor` and `soak`."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    live: Annotated[
        Path | None,
        typer.Option(help="Folder of running ranks' statistics (EP_MEGATRON_STATISTICS_DIR)."),
    ] = None,
) -> None:
    """Look at this machine and this installation: what is there, what it enables, how to get more.

    Ends with 1 if something that is needed is missing or will fail under load. With --live it says
    instead what running ranks wait for.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from ep_megatron.doctor import Machine, examine, is_fit

    if live is not None:
        from ep_megatron.live import live_report

        typer.echo(live_report(live))
        raise typer.Exit(0 if live.is_dir() else 1)
    findings = examine(Machine())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("", "part", "found", "enables", "fix")
        for finding in findings:
            table.add_row(finding.status, finding.name, finding.found, finding.enables, finding.fix)
        Console(markup=False).print(table)
    raise typer.Exit(0 if is_fit(findings) else 1)


def soak(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60.0,
    num_ranks: Annotated[int, typer.Option(help="Processes.")] = 8,
    seed: Annotated[int, typer.Option(help="Of rounds, faults and all numbers.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was seen.")] = None,
) -> None:
    """Run random calls with pauses and faults for hours, and check every result.

    Ragged dispatch and combine, FP8, low latency, queued or not, over the backends for CPUs; ranks
    are paused, stopped, killed and interrupted, and must be named. Ends with 1 if anything was
    wrong, or memory, threads, descriptors or segments grew.
    """
    import json

    from ep_megatron.soak.launch import soak as run
    from ep_megatron.soak.launch import to_json, words

    if num_ranks < 2:
        raise typer.BadParameter(f"--num-ranks: expected two or more, got {num_ranks}")
    try:
        outcome = run(minutes, num_ranks, seed, typer.echo)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(words(outcome))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(outcome), indent=1) + "\n")
    raise typer.Exit(1 if outcome.problems else 0)
