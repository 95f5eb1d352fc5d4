"""Start the benchmark's processes: under mpirun where MPI takes part, else as torchrun does."""

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ep_megatron.bench.case import Case
from ep_megatron.train.launch import run_processes


def has_mpi() -> bool:
    """Return whether mpirun and mpi4py are installed."""
    return shutil.which("mpirun") is not None and importlib.util.find_spec("mpi4py") is not None


def run(
    cases: Sequence[Case],
    implementations: Sequence[str],
    directions: Sequence[str],
    num_samples: int,
    num_steps: int = 1,
) -> list[dict[str, Any]]:
    """Measure all cases; one set of processes per number of ranks.

    Returns:
        The rows that `--json` writes.

    Raises:
        RuntimeError: a process failed.
    """
    rows: list[dict[str, Any]] = []
    for num_ranks in dict.fromkeys(case.num_ranks for case in cases):
        with tempfile.TemporaryDirectory(prefix="ep_bench_") as folder:
            job, output = Path(folder, "job.json"), Path(folder, "results.json")
            sizes = [vars(case) for case in cases if case.num_ranks == num_ranks]
            job.write_text(
                json.dumps(
                    {
                        "cases": sizes,
                        "implementations": list(implementations),
                        "directions": list(directions),
                        "num_samples": num_samples,
                        "num_steps": num_steps,
                        "output": str(output),
                        "port": _free_port(),
                    }
                )
            )
            arguments = ["-m", "ep_megatron.bench.launch", str(job)]
            if "mpi" in implementations:
                _run_under_mpi(num_ranks, arguments)
            else:
                run_processes(num_ranks, arguments)
            rows += json.loads(output.read_text())
    return rows


def _run_under_mpi(num_ranks: int, arguments: Sequence[str]) -> None:
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    # Where ranks outnumber cores OpenMPI must yield while it waits, which it finds out by itself
    # only with a host file.
    if num_ranks > (os.cpu_count() or 1):
        command += ["--mca", "mpi_yield_when_idle", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*command, sys.executable, *arguments], env=environment, check=False)
    if process.returncode:
        raise RuntimeError(f"bench: expected mpirun to succeed, got exit code {process.returncode}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _work(job: dict[str, Any]) -> None:
    import torch.distributed as dist

    from ep_megatron.bench.measure import measure

    # Megatron's collectives have names that torch has deprecated; not the reader's business here.
    warnings.filterwarnings("ignore", category=FutureWarning)

    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    else:
        rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
        size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
        address = f"tcp://127.0.0.1:{job['port']}"
        dist.init_process_group("gloo", address, timedelta(minutes=5), size, rank)
    measure(
        [Case(**sizes) for sizes in job["cases"]],
        job["implementations"],
        job["directions"],
        job["num_samples"],
        job["num_steps"],
        Path(job["output"]),
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    _work(json.loads(parser.parse_args().job.read_text()))
