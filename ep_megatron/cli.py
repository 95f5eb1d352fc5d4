"""The command `ep-megatron`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Expert-parallel dispatch and combine for Megatron-core."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def pretrain(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of Megatron arguments.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
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
            code = run_processes(num_processes, [*command, *(["--resume"] if resume else [])])
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
    implementation: Annotated[str, typer.Option(help="Which, by comma; all without.")] = "",
    direction: Annotated[str, typer.Option(help="forward, forward_backward or both.")] = "",
    samples: Annotated[int, typer.Option(help="Samples of each; medians are reported.")] = 15,
    steps: Annotated[
        int, typer.Option(help="Steps in a row per sample; 1: caches as others left them.")
    ] = 1,
    baseline: Annotated[str, typer.Option(help="Whose time the ratios are over.")] = (
        "shared_memory"
    ),
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
    from ep_megatron.bench.measure import IMPLEMENTATIONS
    from ep_megatron.bench.table import print_table

    names = _choices("--implementation", implementation, IMPLEMENTATIONS)
    if not implementation and not has_mpi():
        names.remove("mpi")
    cases = [
        Case(ranks, tokens, width, num_topk, num_experts)
        for ranks in _numbers("--num-ranks", num_ranks)
        for tokens in _numbers("--num-tokens", num_tokens)
        for width in _numbers("--hidden", hidden)
    ]
    try:
        rows = run(cases, names, _choices("--direction", direction, DIRECTIONS), samples, steps)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print_table(rows, baseline, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


def _numbers(option: str, text: str) -> list[int]:
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"{option}: expected positive numbers, got {text!r}")
    return [int(part) for part in text.split(",")]


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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
