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
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ep_megatron.bench.case import Case
from ep_megatron.bench.two_hosts import (
    AGENT_SCRIPT,
    FIRST_ADDRESS,
    NETWORK,
    LinkMeter,
    run_ranks,
    two_hosts,
)
from ep_megatron.train.launch import run_processes

_SECONDS_ON_TWO_HOSTS = 1800
_FORWARDED = ("PYTHONPATH", "PATH")  # to processes that mpirun starts on the other host


def has_mpi() -> bool:
    """Return whether mpirun and mpi4py are installed."""
    return shutil.which("mpirun") is not None and importlib.util.find_spec("mpi4py") is not None


def run(
    cases: Sequence[Case],
    implementations: Sequence[str],
    directions: Sequence[str],
    num_samples: int,
    num_steps: int = 1,
    link: str | None = None,
) -> list[dict[str, Any]]:
    """Measure all cases; one set of processes per number of ranks.

    With `link`, a rate that `tc` knows, half of the ranks are on each of two hosts that are set up
    for it, joined by a link of that rate.

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
                        "address": (
                            f"tcp://{FIRST_ADDRESS}:29500"
                            if link
                            else f"tcp://127.0.0.1:{_free_port()}"
                        ),
                        "is_on_two_hosts": link is not None,
                    }
                )
            )
            arguments = ["-m", "ep_megatron.bench.launch", str(job)]
            if link is not None:
                _run_on_two_hosts(num_ranks, arguments, link, "mpi" in implementations)
            elif "mpi" in implementations:
                command = [*_mpirun(num_ranks), sys.executable, *arguments]
                _run_command(command, {**os.environ, "OMP_NUM_THREADS": "1"})
            else:
                run_processes(num_ranks, arguments)
            rows += json.loads(output.read_text())
    return rows


def _run_on_two_hosts(
    num_ranks: int, arguments: Sequence[str], link: str, is_under_mpi: bool
) -> None:
    if num_ranks % 2:
        raise RuntimeError(f"bench: expected an even number of ranks on two hosts, got {num_ranks}")
    with two_hosts(link) as hosts:
        if not is_under_mpi:
            half = num_ranks // 2
            run_ranks(hosts, (half, half), arguments, {}, _SECONDS_ON_TWO_HOSTS)
            return
        with tempfile.TemporaryDirectory(prefix="ep_bench_") as folder:
            # mpirun starts the other host's processes through what it takes for ssh.
            agent = Path(folder, "agent")
            agent.write_text(AGENT_SCRIPT)
            agent.chmod(0o700)
            places = ",".join(f"{host.name}:{num_ranks // 2}" for host in hosts)
            command = [
                *(str(agent), hosts[0].name, *_mpirun(num_ranks), "--host", places),
                *("--map-by", "slot", "--mca", "plm_rsh_agent", str(agent)),
                *(word for name in _FORWARDED if name in os.environ for word in ("-x", name)),
                *("--mca", "oob_tcp_if_include", NETWORK, "--mca", "btl_tcp_if_include", NETWORK),
                *(sys.executable, *arguments),
            ]
            _run_command(command, {**os.environ, "OMP_NUM_THREADS": "1"})


def _mpirun(num_ranks: int) -> list[str]:
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    # Where ranks outnumber cores OpenMPI must yield while it waits, which it finds out by itself
    # only with a host file.
    if num_ranks > (os.cpu_count() or 1):
        command += ["--mca", "mpi_yield_when_idle", "1"]
    return command


def _run_command(command: Sequence[str], environment: Mapping[str, str]) -> None:
    process = subprocess.run(command, env=environment, check=False)
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

    meter = None
    if job["is_on_two_hosts"]:
        # A host's interface has its name.
        interface = os.environ["GLOO_SOCKET_IFNAME"] = socket.gethostname()
        local = os.environ.get("LOCAL_RANK") or os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]
        meter = LinkMeter(interface, local == "0")
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    else:
        rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
        size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
        address = job["address"]
        dist.init_process_group("gloo", address, timedelta(minutes=5), size, rank)
    measure(
        [Case(**sizes) for sizes in job["cases"]],
        job["implementations"],
        job["directions"],
        job["num_samples"],
        job["num_steps"],
        Path(job["output"]),
        meter,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    _work(json.loads(parser.parse_args().job.read_text()))
