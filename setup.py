"""Build the extensions of ep_megatron from csrc/: `_cpu`, `_cuda` where nvcc is found, `_nvshmem`
where NVSHMEM is as well.

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


def wheel_folders(name: str) -> list[str]:
    """Return where NVIDIA's wheels of that name are unpacked."""
    try:
        import nvidia
    except ImportError:
        return []
    return [f"{folder}/{name}" for folder in nvidia.__path__]


def find_cuda() -> CudaToolkit | None:
    """Return the installed CUDA toolkit, or the one from PyPI (requirements-cuda.txt), or None."""
    in_wheels = os.pathsep.join(f"{folder}/bin" for folder in wheel_folders("cu13"))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=in_wheels)
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


def find_nvshmem() -> Path | None:
    """Return where NVSHMEM is: at $NVSHMEM_HOME, or from PyPI (requirements-cuda.txt); or None."""
    homes = [os.environ["NVSHMEM_HOME"]] if "NVSHMEM_HOME" in os.environ else []
    for folder in map(Path, homes or wheel_folders("nvshmem")):
        if (folder / "include" / "nvshmem_host.h").exists():
            return folder
    print(
        "_nvshmem is not built: no NVSHMEM at $NVSHMEM_HOME, and none from requirements-cuda.txt",
        file=sys.stderr,
    )
    return None


NVSHMEM_MODULE = "ep_megatron._nvshmem"
CUDA = find_cuda()
NVSHMEM = find_nvshmem() if CUDA is not None else None


class BuildExtension(build_ext):
    """Compile in parallel; row kernels once per instruction set, .cu files with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        # Headers are not tracked one by one: any newer one rebuilds all of its extension.
        jobs = [(source, "", []) for source in ext.sources if source != ROW_KERNELS]
        if ROW_KERNELS in ext.sources:
            jobs += [(ROW_KERNELS, isa, flags) for isa, flags in INSTRUCTION_SETS.items()]
        newest_header = max(Path(path).stat().st_mtime for path in [*ext.depends, "setup.py"])

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, isa, flags = job
            folder = Path(self.build_temp, isa or "common")
            target = (folder / source).with_suffix(".o")
            newest = max(newest_header, Path(source).stat().st_mtime)
            if target.exists() and target.stat().st_mtime >= newest:
                return str(target)
            if source.endswith(".cu"):
                target.parent.mkdir(parents=True, exist_ok=True)
                run_nvcc(*flags_of(ext, source), "-c", source, "-o", str(target))
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
        if ext.name == NVSHMEM_MODULE:
            objects.append(link_device_code(objects, self.build_temp))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=[*ext.libraries, "pthread"],
            library_dirs=ext.library_dirs,
            runtime_library_dirs=ext.runtime_library_dirs,
            extra_postargs=[
                *(flag for flag in FLAGS if flag.startswith("-fsanitize")),
            ],
            target_lang="c++",
        )


def run_nvcc(*arguments: str) -> None:
    subprocess.run([CUDA.nvcc, *arguments], check=True)


def flags_of(ext: Extension, source: str) -> list[str]:
    """Return nvcc's flags for one source."""
    if ext.name != NVSHMEM_MODULE:
        return NVCC_FLAGS
    flags = [*NVCC_FLAGS, "-rdc=true", "-isystem", str(NVSHMEM / "include")]
    # NVSHMEM's own functions, which this source instantiates, spill.
    return [f for f in flags if "warn-spills" not in f or source != "csrc/nvshmem/network.cu"]


def link_device_code(objects: list[str], folder: str) -> str:
    """Link kernels with NVSHMEM's functions, by nvcc; the host's linker does the rest."""
    target = str(Path(folder, "nvshmem_device.o"))
    architectures = [flag for flag in NVCC_FLAGS if flag.startswith("-gencode")]
    libraries = [f"-L{NVSHMEM / 'lib'}", "-lnvshmem_device", f"-L{CUDA.library}"]
    run_nvcc(*architectures, "-Xcompiler=-fPIC", "-dlink", *objects, *libraries, "-o", target)
    return target


def sources_in(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


def headers_in(*folders: str) -> list[str]:
    return [path for folder in folders for path in sources_in(folder, "*.h", "*.cuh")]


extensions = [
    Extension(
        "ep_megatron._cpu",
        sources_in("csrc/cpu", "*.cpp") + sources_in("csrc", "*.cpp"),
        include_dirs=[pybind11.get_include()],
        depends=headers_in("csrc", "csrc/core", "csrc/cpu"),
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
            depends=headers_in("csrc/core", "csrc/cuda"),
        )
    )
    if NVSHMEM is not None:
        # An extension of its own: it does not load where NVSHMEM's library is missing. That one is
        # looked for where it was found, and beside the package.
        extensions.append(
            Extension(
                NVSHMEM_MODULE,
                sources_in("csrc/nvshmem", "*.cpp", "*.cu"),
                # What nvcc would add by itself: NVSHMEM's headers want the CUDA C++ library.
                include_dirs=[
                    pybind11.get_include(),
                    CUDA.include,
                    f"{CUDA.include}/cccl",
                    str(NVSHMEM / "include"),
                ],
                library_dirs=[CUDA.library, str(NVSHMEM / "lib")],
                runtime_library_dirs=["$ORIGIN/../nvidia/nvshmem/lib", str(NVSHMEM / "lib")],
                libraries=[
                    ":libnvshmem_host.so.3",
                    ":libnvshmem_device.a",
                    "cudadevrt",
                    "cudart_static",
                    "rt",
                    "dl",
                ],
                depends=headers_in("csrc/core", "csrc/cuda", "csrc/nvshmem"),
            )
        )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
