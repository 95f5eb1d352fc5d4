"""What every kernel takes, as a table: registers, memory, and how wide its accesses are.

`python -m tests.cuda.resources` writes it to resources.txt, which a test compares. Registers and
spills are ptxas's word on each architecture, accesses those of the PTX.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("resources.txt")
ARCHITECTURES = ("sm_90a", "sm_100a")
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-lineinfo", "-Icsrc", "-Xptxas=-v")
_ACCESS = re.compile(r"\b(ld|st)((?:\.[a-z]+)*?)\.(global|shared|local)((?:\.v\d)?)\.([a-z])(\d+)")


def sources() -> list[Path]:
    """Return the sources of our kernels; what calls into NVSHMEM is linked later."""
    far = [ROOT / "csrc" / "nvshmem" / name for name in ("cross_put.cu", "post.cu", "send.cu")]
    return [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *far]


def flags_of(source: Path) -> tuple[str, ...]:
    return (*FLAGS, "-rdc=true") if source.parent.name == "nvshmem" else FLAGS


def find_nvcc() -> str | None:
    """Return the compiler that setup.py takes: the installed one, or the one from PyPI."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [] if wheels is None else list(wheels.submodule_search_locations or ())
    path = os.pathsep.join(f"{folder}/cu13/bin" for folder in folders)
    return shutil.which("nvcc") or shutil.which("nvcc", path=path)


def compile_to_ptx(nvcc: str, source: Path) -> str:
    """Return what nvcc makes of one source, by the flags of setup.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernels.ptx")
        subprocess.run(
            [
                nvcc,
                *(flag for flag in flags_of(source) if flag != "-Xptxas=-v"),
                "-arch=compute_90a",
                "-ptx",
                "-o",
                output,
                source.relative_to(ROOT),
            ],
            cwd=ROOT,
            check=True,
        )
        return output.read_text()


def _ptxas_report(nvcc: str, source: Path, architecture: str) -> str:
    done = subprocess.run(
        [nvcc, *flags_of(source), f"-arch={architecture}", "-cubin", "-o", os.devnull, source],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def accesses(ptx: str) -> dict[str, Counter[str]]:
    """Count each kernel's loads and stores by space and bytes of a lane."""
    counts: dict[str, Counter[str]] = {}
    kernel = ""
    for line in ptx.splitlines():
        if entry := re.search(r"\.entry (\w+)", line):
            kernel = entry[1]
            counts[kernel] = Counter()
        elif found := _ACCESS.search(line):
            width = int(found[6]) // 8 * int(found[4][2:] or 1)
            counts[kernel][f"{found[1]}.{found[3]}.{width}"] += 1
        elif re.match(r"\s*(@!?%p\d+\s+)?(ld|st|atom|red)\.(?!param)", line):
            counts[kernel]["other"] += 1
    return counts


def table(nvcc: str) -> str:
    """Return the table."""
    lines = [
        f"{'kernel':34s} {'arch':8s} {'registers':>9s} {'shared':>6s} {'stack':>5s} {'spills':>6s}"
    ]
    jobs = [(source, name) for source in sources() for name in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda job: _ptxas_report(nvcc, *job), jobs))
        texts = list(pool.map(lambda source: compile_to_ptx(nvcc, source), sources()))
    rows = []
    for (_, architecture), report in zip(jobs, reports, strict=True):
        for part in report.split("Compiling entry function ")[1:]:
            kernel = part.split("'")[1]
            registers = re.search(r"Used (\d+) registers", part)
            memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
            assert registers is not None
            assert memory is not None
            shared = re.search(r"(\d+) bytes smem", part)
            spills = int(memory[2]) + int(memory[3])
            rows.append(
                f"{kernel:34s} {architecture:8s} {registers[1]:>9s} "
                f"{shared[1] if shared else '0':>6s} {memory[1]:>5s} {spills:6d}"
            )
    lines += sorted(rows)
    lines += ["", "kernel: loads and stores in its PTX, by space and bytes of a lane"]
    for text in texts:
        for kernel, counts in accesses(text).items():
            lines.append(f"{kernel}: {', '.join(f'{k} x{n}' for k, n in sorted(counts.items()))}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(sys.argv[1] if len(sys.argv) > 1 else find_nvcc() or "nvcc"))
