"""Compile samples/*.cu to the committed samples/*.ptx. Needs nvcc 13.0 on the path."""

import re
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-arch=sm_90a", "-ptx", "-lineinfo"]


def main() -> None:
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    if "V13.0.88" not in release.stdout:
        raise SystemExit(f"generate: expected nvcc V13.0.88, got {release.stdout.splitlines()[-2]}")
    for source in sorted(FOLDER.glob("*.cu")):
        target = source.with_suffix(".ptx")
        subprocess.run(["nvcc", *FLAGS, source.name, "-o", target.name], cwd=FOLDER, check=True)
        text = target.read_text().replace(str(FOLDER) + "/", "")
        text = re.sub(r"\t\.section\t\.debug_str\s*\{.*?\n\t\}", "", text, flags=re.DOTALL)
        target.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
