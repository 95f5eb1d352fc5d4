"""Reads the PTX out of a built extension: nvcc's fat binaries, as they lie in the file.

Each source has one: a header, then entries of machine code (kind 2) and PTX (kind 1), uncompressed
because of `--no-compress`. Those of libraries that are linked in are compressed, and left out.
"""

import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, size of the header, size of what follows
_ENTRY = struct.Struct("<HHIQ")  # kind, version, size of the entry's header, size of its data
_PTX = 1


def embedded_ptx(extension: Path) -> list[str]:
    """Return the PTX of every CUDA source linked into the extension, in the order of the file."""
    data = extension.read_bytes()
    found = []
    start = data.find(_MAGIC)
    while start >= 0:
        _, _, header_bytes, num_bytes = _HEADER.unpack_from(data, start)
        at, end = start + header_bytes, start + header_bytes + num_bytes
        while at < end:
            kind, _, entry_bytes, data_bytes = _ENTRY.unpack_from(data, at)
            body = data[at + entry_bytes : at + entry_bytes + data_bytes]
            if kind == _PTX and b".version" in body[:2000]:
                found.append(body.rstrip(b"\0").decode())
            at += entry_bytes + data_bytes
        start = data.find(_MAGIC, end)
    return found
