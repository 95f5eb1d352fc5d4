"""Memory that every rank has of one size, and which of it this rank's kernels reach."""

from collections.abc import Sequence

from ep_megatron.backends.device import Device, Launch
from ep_megatron.backends.device_arena import share
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.network import Network


class Reach:
    """Of one rank.

    Args:
        device: this rank's.
        far: the network to ranks that are out of reach, and the ranks that are not; None if the
            devices of all ranks reach each other's shared memory.
    """

    def __init__(self, device: Device, far: tuple[Network, Sequence[int]] | None) -> None:
        self._device, self._far = device, far

    def share(self, meeting: Meeting, num_bytes: int) -> list[int]:
        """Return where each rank's zeroed memory is; 0 where it is out of reach. Collective.

        Raises:
            RuntimeError: on every rank, if one has no room or does not reach what it should.
        """
        if self._far is None:
            found = share(self._device, meeting, "Buffer", num_bytes, is_zeroed=True)
            return [address or 0 for address in found]
        network, near = self._far
        own = network.allocate(num_bytes)
        addresses = [0] * meeting.num_ranks
        for rank in near:
            addresses[rank] = own if rank == meeting.rank else network.peer_address(own, rank)
        lost = ", ".join(str(rank) for rank in near if not addresses[rank])
        said = meeting.gather_text("Buffer", lost)
        problems = [
            f"rank {rank} does not reach rank {text}" for rank, text in enumerate(said) if text
        ]
        if problems:
            raise RuntimeError(
                "Buffer: expected the GPUs of a host to reach each other's memory, got "
                f"{'; '.join(problems)}; is NVSHMEM_DISABLE_P2P set?"
            )
        return addresses

    def launch_far(self, launch: Launch) -> None:
        """Launch what brings something to ranks out of reach, if there are any."""
        if self._far is not None:
            self._far[0].launch(launch)
