"""What callers of DeepEP's Buffer set or ask for beside its calls."""

from typing import ClassVar

from ep_megatron import sizes
from ep_megatron.sizes import Config
from ep_megatron.streams import EventHandle, EventOverlap


class Settings:
    """The static half of `Buffer`: class-wide, without any rank.

    Attributes:
        num_sms: for `Config`, and the most threads that move a Buffer's rows on a CPU, within
            `BufferConfig.num_threads`.
    """

    num_sms: ClassVar[int] = 20

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Let all Buffers, those that exist too, use at most as many SMs; on a CPU threads.

        Takes effect with a Buffer's next call. `BufferConfig.num_threads` still holds.

        Raises:
            ValueError: unless the number is even and positive.
        """
        if new_num_sms < 2 or new_num_sms % 2:
            raise ValueError(
                f"set_num_sms: expected new_num_sms to be even and at least 2, got {new_num_sms}"
            )
        Settings.num_sms = new_num_sms

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Return whether kernels for SM90 are there: no, the Buffer moves rows without."""
        return False

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return DeepEP's chunk sizes for a dispatch among any number of ranks."""
        return sizes.default_config("dispatch", num_ranks, Settings.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return DeepEP's chunk sizes for a combine among any number of ranks."""
        return sizes.default_config("combine", num_ranks, Settings.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes of DeepEP's low-latency buffer; see `sizes.low_latency_size_hint`."""
        return sizes.low_latency_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    @staticmethod
    def capture() -> EventOverlap:
        """Return an event for the work that the current stream holds now."""
        return EventOverlap(EventHandle())
