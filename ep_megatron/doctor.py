"""What this machine and this installation have, what each part enables, and how to get the rest.

Every check reads through a `Machine`, so tests can show it any other one.
"""

import importlib
import importlib.metadata
import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["ok", "absent", "wrong"]
MIB = 1 << 20
# A rank's first arena and its control part, rounded up; eight ranks need this much to start.
_MIN_SHM_BYTES = 8 * 32 * MIB
_MIN_OPEN_FILES = 1024
_MIN_THREADS = 256
_BUILD = "pip install --no-build-isolation --no-deps -e ."


@dataclass(frozen=True)
class Finding:
    """One part of a machine.

    Attributes:
        name: what was looked for.
        status: `"ok"`, `"absent"` (something optional is not there) or `"wrong"` (something needed
            is not there, or will fail under load).
        found: what is there, in a few words.
        enables: what it is for.
        fix: the one command that gets it; "" where it is there, or where no command can.
    """

    name: str
    status: Status
    found: str
    enables: str
    fix: str = ""


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None if it fails or takes longer than 20 s."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(name: str) -> object | str:
    """Return a module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return str(error)


@dataclass(frozen=True)
class Machine:
    """Where the checks look; the defaults are this machine."""

    root: Path = Path("/")
    which: Callable[[str], str | None] = shutil.which
    output: Callable[[list[str]], str | None] = _output
    version: Callable[[str], str | None] = _version
    module: Callable[[str], object | str] = _import
    limit: Callable[[int], int] = field(default=lambda kind: resource.getrlimit(kind)[0])
    cores: Callable[[], int] = field(default=lambda: len(os.sched_getaffinity(0)))
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    kernel: str = field(default_factory=lambda: os.uname().release)

    def read(self, path: str) -> str:
        """Return a file's text without the last newline, or ""."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return ""

    def names(self, folder: str) -> list[str]:
        """Return what a folder holds, sorted; nothing if it is not there."""
        path = self.root / folder
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def examine(machine: Machine) -> list[Finding]:
    """Return a finding per part. Reads only."""
    return [finding for check in _CHECKS for finding in check(machine)]


def is_fit(findings: list[Finding]) -> bool:
    """Return whether nothing that is needed is wrong."""
    return all(finding.status != "wrong" for finding in findings)


def _packages(machine: Machine) -> Iterator[Finding]:
    for package, enables, is_needed in (
        ("torch", "everything", True),
        ("megatron-core", "the token dispatcher, the plugin and `ep-megatron pretrain`", False),
        ("transformer-engine", "te_fp8: received rows as its FP8 tensors", False),
        ("mpi4py", "MPI in `ep-megatron bench`", False),
    ):
        version = machine.version(package)
        missing: Status = "wrong" if is_needed else "absent"
        fix = f"pip install {package}"
        if package == "transformer-engine":
            fix = "pip install 'transformer-engine[pytorch]'"
        yield Finding(
            package,
            "ok" if version else missing,
            version or "not installed",
            enables,
            "" if version else fix,
        )


def _extensions(machine: Machine) -> Iterator[Finding]:
    cpu = machine.module("ep_megatron._cpu")
    enables = "backends shared_memory and hierarchical (process_group works without)"
    if isinstance(cpu, str):
        yield Finding("ep_megatron._cpu", "wrong", cpu, enables, _BUILD)
    else:
        names = cpu.row_kernel_names()  # type: ignore[attr-defined]
        yield Finding("ep_megatron._cpu", "ok", f"row kernels {', '.join(names)}", enables)
    cuda = machine.module("ep_megatron._cuda")
    is_there = not isinstance(cuda, str)
    yield Finding(
        "ep_megatron._cuda",
        "ok" if is_there else "absent",
        "built" if is_there else "not built",
        "backend cuda",
        "" if is_there else f"pip install -r requirements-cuda.txt && {_BUILD}",
    )
    nvshmem = machine.module("ep_megatron._nvshmem")
    is_linked = not isinstance(nvshmem, str)
    yield Finding(
        "ep_megatron._nvshmem",
        "ok" if is_linked else "absent",
        f"NVSHMEM {nvshmem.version()}" if is_linked else str(nvshmem),  # type: ignore[attr-defined]
        "backend cuda over several hosts",
        "" if is_linked else f"pip install -r requirements-cuda.txt && {_BUILD}",
    )


def _tools(machine: Machine) -> Iterator[Finding]:
    compiler = machine.which("c++") or machine.which("g++") or machine.which("clang++")
    version = (machine.output([compiler, "--version"]) or "").splitlines() if compiler else []
    yield Finding(
        "C++ compiler",
        "ok" if compiler else "absent",
        version[0] if version else compiler or "none",
        "building the extension",
        "" if compiler else "apt-get install g++",
    )
    wheel = machine.version("nvidia-cuda-nvcc")
    nvcc = machine.which("nvcc") or (f"nvidia-cuda-nvcc {wheel}" if wheel else None)
    yield Finding(
        "CUDA compiler",
        "ok" if nvcc else "absent",
        nvcc or "none",
        "building the CUDA kernels",
        "" if nvcc else "pip install -r requirements-cuda.txt",
    )


def _gpus(machine: Machine) -> Iterator[Finding]:
    listed = machine.output(["nvidia-smi", "-L"]) if machine.which("nvidia-smi") else None
    gpus = [line for line in (listed or "").splitlines() if line.startswith("GPU ")]
    driver = machine.read("proc/driver/nvidia/version").split("\n")[0]
    yield Finding(
        "GPUs",
        "ok" if gpus else "absent",
        f"{len(gpus)}: {gpus[0].split(' (UUID')[0]}" if gpus else driver or "none",
        "backend cuda",
    )
    status = machine.output(["nvidia-smi", "nvlink", "--status"]) if gpus else None
    links = re.findall(r"Link \d+: ([\d.]+) GB/s", status or "")
    yield Finding(
        "NVLink",
        "ok" if links else "absent",
        f"{len(links)} links of {links[0]} GB/s" if links else "none",
        "rows between GPUs at NVLink's rate",
    )
    names = [f"nvidia-nvshmem-cu{major}" for major in (13, 12)]
    wheels = [f"{name} {v}" for name in names if (v := machine.version(name))]
    yield Finding(
        "NVSHMEM",
        "ok" if wheels else "absent",
        wheels[0] if wheels else "not installed",
        "rows between GPUs of several hosts",
        "" if wheels else f"pip install {names[0]}",
    )
    adapters = machine.names("sys/class/infiniband")
    active = [
        a for a in adapters if "ACTIVE" in machine.read(f"sys/class/infiniband/{a}/ports/1/state")
    ]
    layers = [machine.read(f"sys/class/infiniband/{a}/ports/1/link_layer") for a in active]
    links = [
        f"{adapter} ({'RoCE' if layer == 'Ethernet' else layer or 'unknown link'})"
        for adapter, layer in zip(active, layers, strict=True)
    ]
    yield Finding(
        "RDMA adapters",
        "ok" if active else "absent",
        f"{', '.join(links) or 'no active port'} of {len(adapters)}" if adapters else "none",
        "rows between GPUs of several hosts; CPU ranks are joined by TCP",
    )
    has_peermem = (machine.root / "sys/module/nvidia_peermem").is_dir()
    yield Finding(
        "GPUDirect RDMA",
        "ok" if has_peermem else "absent",
        "nvidia_peermem" if has_peermem else "nvidia_peermem is not loaded; dma-buf may serve",
        "RDMA adapters that read and write GPU memory",
        "" if has_peermem else "modprobe nvidia_peermem",
    )


def _nvshmem_settings(machine: Machine) -> Iterator[Finding]:
    settings = sorted(
        f"{k}={v}" for k, v in machine.environment.items() if k.startswith("NVSHMEM_")
    )
    enables = "how NVSHMEM moves rows (docs/operations.md)"
    yield Finding("NVSHMEM settings", "ok", ", ".join(settings) or "defaults", enables)
    asked = machine.environment.get("NVSHMEM_IB_ENABLE_IBGDA", "").lower()
    driver = machine.read("proc/driver/nvidia/params")
    options = {
        "EnableStreamMemOPs: 1": "NVreg_EnableStreamMemOPs=1",
        "PeerMappingOverride=1": 'NVreg_RegistryDwords="PeerMappingOverride=1;"',
    }
    missing = [option for sign, option in options.items() if sign not in driver]
    found, fix = "on", ""
    if asked not in ("1", "true", "yes", "on", "y"):
        found, fix = "NVSHMEM_IB_ENABLE_IBGDA is not set", "export NVSHMEM_IB_ENABLE_IBGDA=1"
    elif missing:
        found = f"the driver runs without {' '.join(missing)}"
        fix = f"echo 'options nvidia {' '.join(options.values())}' > /etc/modprobe.d/ibgda.conf"
    yield Finding(
        "IBGDA",
        "absent" if fix else "ok",
        found,
        "low-latency puts by kernels themselves, with no thread of the host in between",
        fix,
    )


def _shared_memory(machine: Machine) -> Iterator[Finding]:
    folder = machine.root / "dev/shm"
    enables = "backends shared_memory and hierarchical"
    if not folder.is_dir():
        yield Finding("/dev/shm", "wrong", "not there", enables, "mount -t tmpfs tmpfs /dev/shm")
        return
    status = os.statvfs(folder)
    size, free = (n * status.f_frsize for n in (status.f_blocks, status.f_bavail))
    found = f"{free // MIB} MiB free of {size // MIB} MiB"
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("/dev/shm", "wrong", f"mode {mode:o}", enables, "chmod 1777 /dev/shm")
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        found = f"mode {mode:o}: other users may remove files"
        yield Finding("/dev/shm", "wrong", found, enables, "chmod 1777 /dev/shm")
    elif free < _MIN_SHM_BYTES:
        # In a container: --shm-size or --ipc=host, for which no command can be given from inside.
        fix = "mount -o remount,size=50% /dev/shm"
        yield Finding("/dev/shm", "wrong", found, enables, fix)
    else:
        yield Finding("/dev/shm", "ok", found, enables)


def _limits(machine: Machine) -> Iterator[Finding]:
    enables = "how much rows may take"
    limit = machine.read("sys/fs/cgroup/memory.max")
    total = re.search(r"MemTotal:\s+(\d+)", machine.read("proc/meminfo"))
    memory = f"{int(total[1]) // 1024} MiB" if total else "unknown"
    if limit.isdigit():
        memory += f", {int(limit) // MIB} MiB for this control group"
    yield Finding("memory", "ok", memory, enables)
    cores = machine.cores()
    quota = machine.read("sys/fs/cgroup/cpu.max").split()
    found = str(cores)
    if len(quota) == 2 and quota[0] != "max":
        found += f", a quota of {int(quota[0]) / int(quota[1]):g}"
    yield Finding("cores", "ok", found, "a rank spins while it waits only if each has a core")
    for name, kind, least, enables, fix in (
        ("open files", resource.RLIMIT_NOFILE, _MIN_OPEN_FILES, "a file per rank and Buffer",
         "ulimit -n 65536"),
        ("threads", resource.RLIMIT_NPROC, _MIN_THREADS, "threads that move rows",
         "ulimit -u 65536"),
    ):  # fmt: skip
        number = machine.limit(kind)
        is_enough = number == resource.RLIM_INFINITY or number >= least
        text = "unlimited" if number == resource.RLIM_INFINITY else str(number)
        status: Status = "ok" if is_enough else "wrong"
        yield Finding(name, status, text, enables, "" if is_enough else fix)


def _huge_pages(machine: Machine) -> Iterator[Finding]:
    enables = "huge pages for rows: fewer walks through page tables"
    setting = machine.read("sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting)
    numbers = [int(part) for part in re.findall(r"\d+", machine.kernel)[:2]]
    if not setting:
        yield Finding("huge pages", "absent", "not in this kernel", enables)
    elif numbers < [6, 1]:
        found = f"Linux {machine.kernel} has no MADV_COLLAPSE (6.1 has)"
        yield Finding("huge pages", "absent", found, enables)
    else:
        found = f"on request (setting {chosen[1] if chosen else setting}, Linux {machine.kernel})"
        yield Finding("huge pages", "ok", found, enables)


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _packages,
    _extensions,
    _tools,
    _gpus,
    _nvshmem_settings,
    _shared_memory,
    _limits,
    _huge_pages,
)
