"""Build the extensions of ep_megatron from csrc/: `_cpu`, and `_cuda` where nvcc is found.

They link no torch library, so one build serves every torch. The CPU's row kernels are compiled once
per instruction set and chosen at run time; every other source is compiled once.
EP_SANITIZE=address,undefined or thread builds `_cpu` with those sanitizers (`make sanitize`).
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add would change the bits from one machine to the next
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Icsrc",
]
if os.environ.get("EP_SANITIZE"):
    FLAGS += [f"-fsanitize={os.environ['EP_SANITIZE']}", "-fno-omit-frame-pointer"]
    # TSan does not know fences, and warns. Ours order memory between processes, which it does not
    # see either; threads of one process meet at locks and at atomics of their own.
    FLAGS += ["-Wno-tsan"] if "thread" in os.environ["EP_SANITIZE"] else []

# Suffix of the symbol table each build of the row kernels exports -> its compiler flags.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx2", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mprefer-vector-width=512",
    ]  # fmt: skip
ROW_KERNELS = "csrc/cpu/row_kernels.cpp"

# Machine code for both GPUs, and the PTX of the first, which is what the tests run: it is kept
# uncompressed, so that it can be read out of the extension.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",  # as -ffp-contract=off
    "-lineinfo",
    "--no-compress",
    "-Werror=all-warnings",
    "-Xptxas=-warn-spills,-warn-lmem-usage",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Werror",
    "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    "-gencode=arch=compute_100a,code=sm_100a",
    "-Icsrc",
]  # fmt: skip
OLDEST_NVCC = (12, 9)  # knows both architectures


class CudaToolkit(NamedTuple):
    """Where a CUDA compiler and its runtime library are."""

    nvcc: str
    include: str
    library: str


def wheel_folders() -> list[str]:
    """Return where NVIDIA's wheels keep their programs."""
    try:
        import nvidia
    except ImportError:
        return []
    return [f"{folder}/cu13/bin" for folder in nvidia.__path__]


def find_cuda() -> CudaToolkit | None:
    """Return the installed CUDA toolkit, or the one from PyPI (requirements-cuda.txt), or None."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(wheel_folders()))
    if nvcc is None:
        print(
            "_cuda is not built: no nvcc on PATH, and none from requirements-cuda.txt",
            file=sys.stderr,
        )
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if release is None or (int(release[1]), int(release[2])) < OLDEST_NVCC:
        print(f"_cuda is not built: {nvcc} is older than CUDA {OLDEST_NVCC}", file=sys.stderr)
        return None
    # nvcc on PATH may be a link or a script; it knows its own root.
    dry = subprocess.run([nvcc, "--dryrun", "-E", "x.cu"], capture_output=True, text=True)
    root = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    if root is None:
        raise RuntimeError(f"build: expected {nvcc} --dryrun to name its root, got {dry.stderr}")
    top = Path(root[1]).resolve()
    library = next((top / name for name in ("lib64", "lib") if (top / name).is_dir()), top)
    return CudaToolkit(nvcc, str(top / "include"), str(library))


CUDA = find_cuda()


class BuildExtension(build_ext):
    """Compile in parallel; row kernels once per instruction set, .cu files with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        # Headers are not tracked one by one: any newer one rebuilds all of its extension.
        jobs = [(source, "", []) for source in ext.sources if source != ROW_KERNELS]
        if ROW_KERNELS in ext.sources:
            jobs += [(ROW_KERNELS, isa, flags) for isa, flags in INSTRUCTION_SETS.items()]
        other = "cpu" if ext.name.endswith("_cuda") else "cuda"
        headers = [
            path
            for pattern in ("*.h", "*.cuh")
            for path in Path("csrc").rglob(pattern)
            if path.parent != Path("csrc", other)
        ]
        newest_header = max(path.stat().st_mtime for path in [*headers, Path("setup.py")])

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, isa, flags = job
            folder = Path(self.build_temp, isa or "common")
            target = (folder / source).with_suffix(".o")
            newest = max(newest_header, Path(source).stat().st_mtime)
            if target.exists() and target.stat().st_mtime >= newest:
                return str(target)
            if source.endswith(".cu"):
                target.parent.mkdir(parents=True, exist_ok=True)
                command = [CUDA.nvcc, *NVCC_FLAGS, "-c", source, "-o", str(target)]
                subprocess.run(command, check=True)
            else:
                defines = [f"-DEP_ISA={isa}"] if isa else []
                self.compiler.compile(
                    [source],
                    output_dir=str(folder),
                    include_dirs=ext.include_dirs,
                    extra_postargs=FLAGS + flags + defines,
                )
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=[*ext.libraries, "pthread"],
            library_dirs=ext.library_dirs,
            extra_postargs=[f for f in FLAGS if f.startswith("-fsanitize")],
            target_lang="c++",
        )


def sources_in(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


extensions = [
    Extension(
        "ep_megatron._cpu",
        sources_in("csrc/cpu", "*.cpp") + sources_in("csrc", "*.cpp"),
        include_dirs=[pybind11.get_include()],
    )
]
if CUDA is not None and not os.environ.get("EP_SANITIZE"):
    # The static runtime, and no driver library: the extension loads on a machine without a GPU.
    extensions.append(
        Extension(
            "ep_megatron._cuda",
            sources_in("csrc/cuda", "*.cpp", "*.cu"),
            include_dirs=[pybind11.get_include(), CUDA.include],
            library_dirs=[CUDA.library],
            libraries=["cudart_static", "rt", "dl"],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
