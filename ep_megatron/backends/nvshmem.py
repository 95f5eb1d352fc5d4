"""The network between GPUs of several hosts, by NVSHMEM.

NVSHMEM knows one world of ranks per process, which lives as long as the process does. The first
Buffer over several hosts makes it of its ranks; later ones over the same ranks are in it already,
and one over others is refused.
"""

import importlib
from collections.abc import Callable
from typing import Any

from ep_megatron.backends.device import Launch
from ep_megatron.backends.meeting import Gathering

_MODULE = "ep_megatron._nvshmem"
_NO_WORLD, _ANOTHER_WORLD = "", "another"
_MAX_BYTES = 2048
_FIX = "pip install -r requirements-cuda.txt and ep_megatron anew, on every host"


def load_native() -> Any:
    """Return the compiled module; imported only where several hosts have GPUs."""
    return importlib.import_module(_MODULE)


class NvshmemNetwork:
    """See `Network`. Collective constructor.

    Args:
        meeting: all ranks.
        ordinal: of this rank's GPU.
        stream: that puts go behind, as CUDA's handle.
        load: returns the compiled module.

    Raises:
        RuntimeError: on every rank, if one has no NVSHMEM, or is in a world of other ranks.
    """

    def __init__(
        self,
        meeting: Gathering,
        ordinal: int,
        stream: int,
        load: Callable[[], Any] = load_native,
    ) -> None:
        self._native: Any = None
        self._stream = stream

        def find() -> str:
            self._native = load()
            world: tuple[bytes, int, int] | None = self._native.world()
            if world is None:
                return _NO_WORLD
            unique_id, rank, num_ranks = world
            is_same = (rank, num_ranks) == (meeting.rank, meeting.num_ranks)
            return unique_id.hex() if is_same else _ANOTHER_WORLD

        found = _on_all_ranks(meeting, f"NVSHMEM on every rank ({_FIX})", find)
        if len(set(found)) > 1 or found[0] == _ANOTHER_WORLD:
            raise RuntimeError(
                "Buffer: expected the ranks of the first Buffer over several hosts, got others: "
                "NVSHMEM knows one group per process; make the group's Buffer in processes of its "
                "own"
            )
        if found[0] != _NO_WORLD:
            return  # an earlier Buffer has joined it
        (name, *_) = _on_all_ranks(
            meeting,
            "NVSHMEM to find a network",
            lambda: self._native.unique_id().hex() if meeting.rank == 0 else "",
        )
        _on_all_ranks(
            meeting,
            "NVSHMEM to join all GPUs",
            lambda: self._native.join(
                bytes.fromhex(name), meeting.rank, meeting.num_ranks, ordinal
            ),
        )

    def allocate(self, num_bytes: int) -> int:
        """See `Network.allocate`. The memory stays until the process ends."""
        address: int = self._native.allocate(num_bytes)
        return address

    def peer_address(self, address: int, peer: int) -> int:
        """See `Network.peer_address`."""
        there: int = self._native.peer_address(address, peer)
        return there

    def launch(self, launch: Launch) -> None:
        """See `Network.launch`."""
        self._native.launch(launch.kernel, launch.grid, launch.block, launch.params, self._stream)

    def put_signal(
        self, peer: int, source: int, target: int, num_bytes: int, signal: int, value: int
    ) -> None:
        """See `Network.put_signal`."""
        self._native.put_signal(peer, source, target, num_bytes, signal, value, self._stream)


def _on_all_ranks(meeting: Gathering, expected: str, action: Callable[[], str | None]) -> list[str]:
    """Return what `action` says on each rank, or raise on all what it raised on some."""
    problem, text = "", ""
    try:
        text = action() or ""
    except (ImportError, RuntimeError, ValueError) as error:
        problem = str(error)
    message = f"{bool(problem):d}{problem or text}"[: _MAX_BYTES // 4]  # of 4 bytes a letter
    said = meeting.gather_text("Buffer", message, _MAX_BYTES)
    problems = [f"rank {rank}: {one[1:]}" for rank, one in enumerate(said) if one[0] == "1"]
    if problems:
        raise RuntimeError(f"Buffer: expected {expected}, got {'; '.join(problems)}")
    return [one[1:] for one in said]
