"""Two hosts on one machine: network namespaces joined by a link that may be slowed down.

Each has a network, a host name, System V and POSIX shared memory and a `/dev/shm` of its own, so
that programs find out by themselves that they are on different hosts. Needs the right to make
namespaces (CAP_SYS_ADMIN, CAP_NET_ADMIN) and iproute2.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_SECONDS_TO_SETTLE = 0.3
FIRST_ADDRESS = "10.77.0.1"
NETWORK = "10.77.0.0/24"  # private addresses; inside the namespaces nothing else has any
_BURST, _QUEUE = "128kb", "8mb"  # of the shaped link: what passes unshaped, and what may wait

# Runs "$@" once per rank, in the host that the first arguments describe.
_HOST_SCRIPT = """
mount -t tmpfs -o size=50% ep_shm /dev/shm && hostname "$1" || exit 97
ranks=$2; shift 2; pids=; local=0
for rank in $ranks; do
    RANK=$rank LOCAL_RANK=$local "$@" &
    pids="$pids $!"; local=$((local + 1))
done
code=0
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""

# Runs a command line on the host that the first argument names, as ssh would.
AGENT_SCRIPT = """#!/bin/sh
name=$1; shift
exec ip netns exec "$name" unshare --uts --ipc --mount sh -c '
    mount -t tmpfs -o size=50% ep_shm /dev/shm && hostname "$0" || exit 97
    exec sh -c "$*"' "$name" "$@"
"""


@dataclass(frozen=True)
class Host:
    """One of the two; `interface` is its end of the link, and has the host's name."""

    name: str
    interface: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return a command that runs `arguments` in this host's network."""
        return ["ip", "netns", "exec", self.name, *arguments]


class HostsUnavailableError(RuntimeError):
    """This process may not make hosts here, or lacks what it takes."""


@contextmanager
def two_hosts(rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Set two hosts up, and remove them at the end, whatever happens in between.

    Args:
        rate: of the link, each direction for itself, as `tc` spells it (`"1gbit"`); None leaves it
            as fast as the kernel copies.

    Raises:
        HostsUnavailableError: with the reason.
    """
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            raise HostsUnavailableError(f"two_hosts: expected {tool} to be installed, got none")
    number = os.getpid()
    # An interface's name has at most 15 characters.
    hosts = tuple(
        Host(f"ep{number}{letter}", f"ep{number}{letter}", f"10.77.0.{last}")
        for letter, last in (("a", 1), ("b", 2))
    )
    a, b = hosts
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
        _run(
            *("ip", "link", "add", a.interface, "netns", a.name, "type", "veth"),
            *("peer", "name", b.interface, "netns", b.name),
        )
        for host in hosts:
            _set_up(host, hosts, rate)
        yield a, b
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", host.name), ignore_errors=True)


def run_ranks(
    hosts: Sequence[Host],
    ranks_per_host: Sequence[int],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    timeout: float,
    *,
    in_turn: bool = False,
) -> list[str]:
    """Run `python *arguments` as that many ranks on each host, as torchrun would start them.

    With `in_turn` ranks are dealt to the hosts in turn, in place of one host after the other; each
    host then has as many.

    Returns:
        Each host's output.

    Raises:
        RuntimeError: with the output, if a rank failed or they took longer than `timeout` seconds.
    """
    running, first, total = [], 0, sum(ranks_per_host)
    for index, (host, num_ranks) in enumerate(zip(hosts, ranks_per_host, strict=True)):
        ranks = range(index, total, len(hosts)) if in_turn else range(first, first + num_ranks)
        command = host.command(
            [
                *("unshare", "--uts", "--ipc", "--mount", "sh", "-c", _HOST_SCRIPT, "sh"),
                *(host.name, " ".join(map(str, ranks)), sys.executable, *arguments),
            ]
        )
        ours = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(total),
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": "29500",  # a namespace has all ports to itself
            "GLOO_SOCKET_IFNAME": host.interface,
            **environment,
        }
        first += num_ranks
        running.append(
            subprocess.Popen(
                command,
                env=ours,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    outputs, is_late = [], False
    try:
        for process in running:
            outputs.append(process.communicate(timeout=timeout)[0])
    except subprocess.TimeoutExpired:
        is_late = True
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                outputs.append(process.communicate()[0])
    if is_late or any(process.returncode for process in running):
        what = f"they took longer than {timeout:g} s" if is_late else "a rank failed"
        raise RuntimeError(
            "two_hosts: expected all ranks to succeed, got: " + "\n".join([what, *outputs])
        )
    return outputs


class LinkMeter:
    """Counts what the hosts send, by their interfaces; every rank of a group has one.

    Args:
        interface: of this rank's host.
        is_first: whether this rank is the first on its host, and reads for all of them.
    """

    def __init__(self, interface: str, is_first: bool) -> None:
        self._statistics = Path("/sys/class/net", interface, "statistics/tx_bytes")
        self._is_first = is_first

    def read(self) -> int:
        """Return what has left this host so far, headers included, while nobody sends. Collective.

        0 where this rank is not the first of its host.
        """
        dist.barrier()
        time.sleep(_SECONDS_TO_SETTLE)
        count = int(self._statistics.read_text()) if self._is_first else 0
        dist.barrier()
        return count

    def count(self, step: Callable[[], object], num_steps: int = 3) -> int:
        """Return how many bytes leave both hosts in one step. Collective."""
        before = self.read()
        for _ in range(num_steps):
            step()
        sent = torch.tensor(self.read() - before)
        dist.all_reduce(sent)
        return int(sent) // num_steps


def _set_up(host: Host, hosts: Sequence[Host], rate: str | None) -> None:
    _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
    _run("ip", "-n", host.name, "link", "set", "lo", "up")
    _run("ip", "-n", host.name, "link", "set", host.interface, "up")
    if rate is not None:
        tbf = ("tbf", "rate", rate, "burst", _BURST, "limit", _QUEUE)
        _run(*host.command(["tc", "qdisc", "add", "dev", host.interface, "root", *tbf]))
    # What a process in the namespace finds as /etc/hosts.
    names = Path("/etc/netns", host.name, "hosts")
    names.parent.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", *(f"{other.address} {other.name}" for other in hosts)]
    names.write_text("\n".join(lines) + "\n")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsUnavailableError(
            f"two_hosts: expected `{' '.join(command)}` to succeed, got {done.stderr.strip()}"
        )
