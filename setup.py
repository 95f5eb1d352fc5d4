"""Build ep_megatron._cpu from csrc/ with the system's C++ compiler.

The extension links no torch library, so one build serves every torch. The row kernels are compiled
once per instruction set and chosen at run time; every other source is compiled once.
EP_SANITIZE=address|undefined|thread builds with that sanitizer.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

# Suffix of the symbol table each build of the row kernels exports -> its compiler flags.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx2", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mprefer-vector-width=512",
    ]  # fmt: skip
ROW_KERNELS = "csrc/cpu/row_kernels.cpp"


class BuildExtension(build_ext):
    """Compile in parallel; compile the row kernels once per instruction set."""

    def build_extension(self, ext: Extension) -> None:
        # Headers are not tracked one by one: any newer one rebuilds all, which takes seconds.
        jobs = [(source, "", []) for source in ext.sources if source != ROW_KERNELS]
        jobs += [(ROW_KERNELS, isa, flags) for isa, flags in INSTRUCTION_SETS.items()]
        headers = [*Path("csrc").rglob("*.h"), Path("setup.py")]
        newest_header = max(path.stat().st_mtime for path in headers)

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, isa, flags = job
            folder = Path(self.build_temp, isa or "common")
            target = (folder / source).with_suffix(".o")
            newest = max(newest_header, Path(source).stat().st_mtime)
            if not target.exists() or target.stat().st_mtime < newest:
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
            libraries=["pthread"],
            extra_postargs=[f for f in FLAGS if f.startswith("-fsanitize")],
            target_lang="c++",
        )


setup(
    ext_modules=[
        Extension(
            "ep_megatron._cpu",
            sorted(
                map(str, [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc").glob("bindings*.cpp")])
            ),
            include_dirs=[pybind11.get_include()],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
