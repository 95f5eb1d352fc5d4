"""`ep-megatron doctor`: what it says of machines that are not this one."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ep_megatron.doctor import Finding, Machine, examine, is_fit

SMI = {
    "-L": "".join(f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu})\n" for gpu in range(2)),
    "nvlink": "GPU 0:\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n",
}
IBGDA_PARAMS = 'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"\n'
FULL = {
    "torch": "2.13",
    "megatron-core": "0.16.1",
    "transformer-engine": "2.9",
    "mpi4py": "4.1",
    "nvidia-nvshmem-cu13": "3.4",
    "nvidia-cuda-nvcc": "13.0.88",
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def whole(tmp_path: Path) -> Machine:
    """A machine that has everything."""
    (tmp_path / "dev/shm").mkdir(parents=True)
    (tmp_path / "dev/shm").chmod(0o1777)
    _write(tmp_path / "sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")
    _write(tmp_path / "sys/class/infiniband/mlx5_0/ports/1/link_layer", "Ethernet\n")
    _write(tmp_path / "sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN\n")
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    _write(tmp_path / "proc/driver/nvidia/params", IBGDA_PARAMS)
    _write(tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    _write(tmp_path / "sys/fs/cgroup/memory.max", f"{8 << 30}\n")
    _write(tmp_path / "sys/fs/cgroup/cpu.max", "150000 100000\n")
    _write(tmp_path / "proc/meminfo", "MemTotal:       16384000 kB\n")
    return Machine(
        root=tmp_path,
        which=lambda name: f"/usr/bin/{name}",
        output=lambda command: SMI.get(command[1], "g++ 13.2\nCopyright"),
        version=FULL.get,
        module=lambda name: SimpleNamespace(
            row_kernel_names=lambda: ["baseline", "avx2"], version=lambda: "3.4.5"
        ),
        limit=lambda kind: 65536,
        cores=lambda: 12,
        environment={"NVSHMEM_IB_ENABLE_IBGDA": "1", "NVSHMEM_HCA_LIST": "mlx5_0:1"},
        kernel="6.8.0-45-generic",
    )


def _by_name(machine: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(machine)}


def test_a_whole_machine_is_fit(whole: Machine) -> None:
    found = _by_name(whole)
    assert {f.status for f in found.values()} == {"ok"}
    assert not any(f.fix for f in found.values())
    assert found["ep_megatron._cpu"].found == "row kernels baseline, avx2"
    assert found["ep_megatron._nvshmem"].found == "NVSHMEM 3.4.5"
    assert found["GPUs"].found == "2: GPU 0: NVIDIA H100 80GB HBM3"
    assert found["NVLink"].found == "2 links of 26.562 GB/s"
    assert found["RDMA adapters"].found == "mlx5_0 (RoCE) of 2"
    settings = "NVSHMEM_HCA_LIST=mlx5_0:1, NVSHMEM_IB_ENABLE_IBGDA=1"
    assert found["NVSHMEM settings"].found == settings
    assert found["memory"].found == "16000 MiB, 8192 MiB for this control group"
    assert found["cores"].found == "12, a quota of 1.5"
    assert "setting madvise" in found["huge pages"].found
    assert is_fit(list(found.values()))


def test_a_bare_machine_says_how_to_get_what_is_missing(tmp_path: Path) -> None:
    bare = Machine(
        root=tmp_path,
        which=lambda name: None,
        output=lambda command: None,
        version=lambda package: None,
        module=lambda name: f"No module named {name!r}",
        limit=lambda kind: 100,
        cores=lambda: 1,
        environment={},
        kernel="5.15.0",
    )
    found = _by_name(bare)
    wrong = {name for name, f in found.items() if f.status == "wrong"}
    assert wrong == {"torch", "ep_megatron._cpu", "/dev/shm", "open files", "threads"}
    assert all(found[name].fix for name in wrong)
    # What only hardware gives has no command; everything else that is missing has one.
    without = {n for n, f in found.items() if f.status == "absent" and not f.fix}
    assert without == {"GPUs", "NVLink", "RDMA adapters", "huge pages"}
    assert not is_fit(list(found.values()))


def test_what_ibgda_lacks_is_said(whole: Machine) -> None:
    _write(whole.root / "proc/driver/nvidia/params", "EnableStreamMemOPs: 0\n")
    found = _by_name(whole)["IBGDA"]
    assert found.status == "absent"
    assert "without NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords" in found.found
    assert found.fix.endswith("/etc/modprobe.d/ibgda.conf")
    unset = _by_name(replace(whole, environment={}))
    assert unset["IBGDA"].fix == "export NVSHMEM_IB_ENABLE_IBGDA=1"
    assert unset["NVSHMEM settings"].found == "defaults"


SPOILERS: list[tuple[str, Callable[[Machine], Machine | None], str]] = [
    ("/dev/shm", lambda m: (m.root / "dev/shm").chmod(0o777), "other users may remove"),
    ("/dev/shm", lambda m: (m.root / "dev/shm").rmdir(), "not there"),
    ("open files", lambda m: replace(m, limit=lambda kind: 256), "256"),
    ("torch", lambda m: replace(m, version=lambda package: None), "not installed"),
    ("ep_megatron._cpu", lambda m: replace(m, module=lambda name: "undefined symbol"), "undefined"),
]


@pytest.mark.parametrize(("name", "spoil", "says"), SPOILERS)
def test_what_is_needed_and_wrong_makes_it_unfit(
    whole: Machine, name: str, spoil: Callable[[Machine], Machine | None], says: str
) -> None:
    found = _by_name(spoil(whole) or whole)
    assert found[name].status == "wrong"
    assert says in found[name].found
    assert found[name].fix
    assert not is_fit(list(found.values()))


def test_little_shared_memory_is_wrong(whole: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64 MiB that containers get by default."""
    small = SimpleNamespace(f_blocks=16384, f_bavail=16384, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    finding = _by_name(whole)["/dev/shm"]
    assert (finding.status, finding.found) == ("wrong", "64 MiB free of 64 MiB")
    assert finding.fix == "mount -o remount,size=50% /dev/shm"


def test_the_command_prints_json_and_exits_by_what_it_found() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, expected in ((min(hard, 4096) if hard > 0 else 4096, None), (200, 1)):
        result = subprocess.run(
            [sys.executable, "-m", "ep_megatron.cli", "doctor", "--json"],
            preexec_fn=lambda limit=limit: resource.setrlimit(  # type: ignore[misc]
                resource.RLIMIT_NOFILE, (limit, hard)
            ),
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ},
            check=False,
        )
        findings = [Finding(**entry) for entry in json.loads(result.stdout)]
        assert result.returncode == int(not is_fit(findings)), result.stderr
        assert expected is None or result.returncode == expected
        by_name = {finding.name: finding for finding in findings}
        assert by_name["open files"].found == str(limit)
        assert by_name["torch"].status == "ok"
        assert by_name["ep_megatron._cpu"].found.startswith("row kernels baseline")
