"""Run an unforked Megatron-LM training script with `--moe-token-dispatcher-type deepep`.

    torchrun --nproc-per-node 2 -m ep_megatron.megatron.pretrain_gpt \\
        /path/to/Megatron-LM/pretrain_gpt.py --moe-token-dispatcher-type deepep ...

The script runs as `__main__`, in this process, with its own folder first on `sys.path` and its
own flags. It may be any script that ends in `megatron.training.pretrain`. Where there is no CUDA
device, it trains on the CPU over gloo; docs/megatron.md lists the flags Megatron needs for that.
"""

import argparse
import functools
import logging
import runpy
import sys
import types
from pathlib import Path
from typing import Any, get_args

from ep_megatron.config import BACKENDS
from ep_megatron.fp8 import WireDtype

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Install the plugin, and on a machine without CUDA the CPU in its place; then run the script.

    Args:
        arguments: the command line after the program's name; None takes it from `sys.argv`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ep_megatron.megatron.pretrain_gpt", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--ep-backend",
        default="auto",
        choices=BACKENDS,
        help="how dispatch and combine move rows (default: %(default)s)",
    )
    for flag, what in (
        ("--moe-dispatch-dtype", "rows travel to the experts"),
        ("--moe-combine-grad-dtype", "the gradients of combined rows travel back"),
    ):
        parser.add_argument(
            flag,
            default="bf16",
            choices=get_args(WireDtype),
            help=f"how {what}: as they are, or as FP8 (default: %(default)s)",
        )
    parser.add_argument("script", type=Path, help="Megatron-LM's pretrain_gpt.py, or one like it")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the script's own flags")
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        parser.error(f"expected script to be a file, got {options.script}")

    sys.path.insert(0, str(options.script.resolve().parent))
    sys.argv = [str(options.script), *options.flags]
    # Imported only now: the script's folder may hold the Megatron to use.
    from ep_megatron.megatron import host

    if host.install():
        _train_without_cuda()
    from ep_megatron.megatron import plugin

    plugin.install(
        options.ep_backend,
        dispatch_dtype=options.moe_dispatch_dtype,
        combine_grad_dtype=options.moe_combine_grad_dtype,
    )
    runpy.run_path(str(options.script), run_name="__main__")


def _train_without_cuda() -> None:
    """Lift what keeps megatron.training, beyond megatron.core, from running on a CPU."""
    import torch
    import torch.distributed as dist

    logger.warning("no CUDA device: training on the CPU, over gloo whatever the flags say")
    # Megatron skips its model parallel groups where it counts no devices; a process is one here.
    torch.cuda.device_count = lambda: 1
    # Its arguments ask which architecture to allow for: none of them.
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=1)
    torch.cuda.get_device_properties = lambda *_args: properties  # type: ignore[assignment]
    dist.init_process_group = _over_gloo(dist.init_process_group)
    dist.barrier = _without(dist.barrier, "device_ids")

    try:
        import megatron.training.training as training
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pretrain_gpt: expected megatron.training beside the script or installed, got "
            f"'{error}'; give the script of a Megatron-LM checkout, or install megatron-core "
            "0.19 or later"
        ) from error
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )


def _over_gloo(init_process_group: Any) -> Any:
    bare = _without(init_process_group, "device_id")

    @functools.wraps(init_process_group)
    def call(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        bare("gloo", *args, **kwargs)

    return call


def _without(function: Any, name: str) -> Any:
    """Return `function` less an argument that only NCCL understands."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return function(*args, **kwargs)

    return call


# Saving a checkpoint spawns a process that imports the main module again: it must not train.
if __name__ == "__main__":
    main()
