"""What the CUDA backend needs of a network between GPUs that do not reach each other's memory.

NVSHMEM has all of it: a symmetric heap, and `nvshmemx_putmem_signal_nbi_on_stream`. Only one order
is relied on: a signal is seen after the data of its own put.
"""

from typing import Protocol

from ep_megatron.backends.device import Launch


class Network(Protocol):
    """See the module. Methods raise RuntimeError with the system's reason."""

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory that peers may put into; the same size everywhere.

        Collective. In a put the address stands for the peer's memory of the same allocation, which
        stays until the process ends.
        """

    def peer_address(self, address: int, peer: int) -> int:
        """Return where kernels reach a peer's memory of the same allocation; 0 if they do not."""

    def launch(self, launch: Launch) -> None:
        """Launch a kernel that puts by itself, on the device's stream, inside `on_stream`."""

    def put_signal(
        self, peer: int, source: int, target: int, num_bytes: int, signal: int, value: int
    ) -> None:
        """Copy memory to a peer, and then write `value` to its uint64 at `signal`.

        On the device's stream, inside `on_stream`: behind the kernels launched before. It ends
        at any later time; `source` must not change until the peer has seen the signal.

        Args:
            peer: rank.
            source: address of memory of this network, a multiple of 16.
            target: likewise, standing for the peer's.
            num_bytes: a multiple of 16.
            signal: a multiple of 8, standing for the peer's.
            value: to be written.
        """
