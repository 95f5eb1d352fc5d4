"""Compile the emulator once per state of its sources and import it."""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(__file__).parents[2] / "build" / "emulator"
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # fused operations only where PTX says fma
    "-frounding-math",  # directed rounding modes are used
    "-Wall",
    "-Wextra",
    "-Werror",
]
SANITIZERS: list[str] = []
if os.environ.get("EP_SANITIZE"):  # as in setup.py
    SANITIZERS = [f"-fsanitize={os.environ['EP_SANITIZE']}", "-fno-omit-frame-pointer"]


def digest_of(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def build() -> Path:
    """Return the extension's path, compiling what no earlier build has compiled."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    headers = [path.read_bytes() for path in sorted(SOURCES.glob("*.h"))]
    common = digest_of(
        " ".join(FLAGS + SANITIZERS).encode(),
        pybind11.__version__.encode(),
        suffix.encode(),
        *headers,
    )
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = {
        source: CACHE / f"{source.stem}-{digest_of(common.encode(), source.read_bytes())}.o"
        for source in sources
    }
    folder = CACHE / digest_of(*(path.name.encode() for path in objects.values()))
    target = folder / f"_emulator{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def make(output: Path, command: list[str]) -> None:
        # Several processes may build at once: each writes its own file, the last one stays.
        if output.exists():
            return
        unfinished = output.with_name(f"{output.name}.{os.getpid()}")
        command = [compiler, *command, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"build: expected success, got\n{done.stderr[-4000:]}")
        unfinished.replace(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiles = [
            pool.submit(make, output, [*FLAGS, *SANITIZERS, *includes, "-c", str(source)])
            for source, output in objects.items()
        ]
        for compiled in compiles:
            compiled.result()
    make(target, ["-shared", *SANITIZERS, *map(str, objects.values()), "-pthread"])
    return target


def load() -> ModuleType:
    """Import the extension, building it first when needed."""
    spec = importlib.util.spec_from_file_location("_emulator", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
