"""Python sources of other projects that tests run or read, where they are found."""

import importlib.util
import os
from pathlib import Path

_UNPACKED = Path(__file__).parents[1] / "build" / "sources"


def folders_of(package: str) -> list[Path]:
    """Return the folders that `package` is in: unpacked by `make`, named, or installed.

    `make build/sources` unpacks what requirements-sources.txt pins; the environment variable
    `<PACKAGE>_SOURCES` names folders that hold the package in their place.
    """
    named = os.environ.get(f"{package.upper()}_SOURCES", "")
    folders = [Path(folder) for folder in named.split(os.pathsep) if folder]
    if not folders:
        folders = sorted(_UNPACKED.glob(f"{package}-*"))
    found = [folder / package for folder in folders if (folder / package).is_dir()]
    if not found and (spec := importlib.util.find_spec(package)) is not None:
        found = [Path(where) for where in spec.submodule_search_locations or []]
    return found
