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
