"""What can be asked of a Buffer while it works: its statistics, also from outside the process."""

import threading
from collections import deque

from ep_megatron.backends.base import Backend, CountingBackend
from ep_megatron.backends.packed import LOW_LATENCY_OPERATIONS, LowLatencyBackend
from ep_megatron.calls import Calls
from ep_megatron.config import BufferConfig
from ep_megatron.handle import DispatchHandle
from ep_megatron.live import StatisticsFile, statistics_folder
from ep_megatron.statistics import BufferStatistics, CallCounts

_WORTH_COUNTING = LOW_LATENCY_OPERATIONS[:2]
_COUNTED_AT_ONCE = 64


class Watched:
    """The part of a Buffer that counts, and tells."""

    _backend: Backend
    _calls: Calls
    _low_latency: LowLatencyBackend | None
    _packed_counts: CallCounts
    config: BufferConfig
    rank: int
    group_size: int

    @property
    def is_counting(self) -> bool:
        """Whether this Buffer has `statistics`: all but those on the backend `cuda`."""
        return isinstance(self._backend, CountingBackend)

    def statistics(self) -> BufferStatistics:
        """Return what this rank has counted since the Buffer was made.

        Local, from any thread, at any time; a call that still runs is not in it. Over
        `process_group` and `hierarchical` ranks compare their hosts' wall clocks: between hosts the
        seconds are as good as those agree. Bytes are what the backend moves: over `process_group` a
        row per token and rank, over `hierarchical` only what crosses hosts.

        Raises:
            NotImplementedError: for the backend `cuda`, which does not count.
        """
        if not isinstance(self._backend, CountingBackend):
            raise NotImplementedError(
                f"statistics: expected a backend that counts, got {self._backend.name}; those for "
                "CPU ranks do"
            )
        operations = dict(self._backend.statistics().operations)
        if self._low_latency is not None:
            operations |= self._packed_counts.operations(_WORTH_COUNTING)
        return BufferStatistics(self.rank, operations, self._expert_counts())

    def _count_experts(self, handle: DispatchHandle) -> None:
        # Added up later and many at once: a dispatch is not to wait for it.
        self._uncounted.append((handle.num_experts, handle.num_valid_tokens_per_expert))
        if len(self._uncounted) >= _COUNTED_AT_ONCE:
            self._expert_counts()

    def _expert_counts(self) -> dict[int, tuple[int, ...]]:
        """Add what was not counted yet; return the rows of each expert, by number of experts."""
        with self._counting:
            while self._uncounted:
                number, counts = self._uncounted.popleft()
                before = self._expert_rows.get(number, (0,) * len(counts))
                rows = (old + new for old, new in zip(before, counts, strict=True))
                self._expert_rows[number] = tuple(rows)
            return dict(self._expert_rows)

    def _watch(self) -> None:
        """Begin to count; write files where that is asked for."""
        self._packed_counts = CallCounts(self.rank, self.group_size)
        self._expert_rows: dict[int, tuple[int, ...]] = {}
        self._uncounted: deque[tuple[int, tuple[int, ...]]] = deque()
        self._counting = threading.Lock()
        folder = statistics_folder(self.config.statistics_dir)
        if folder is not None and isinstance(self._backend, CountingBackend):
            file = StatisticsFile(folder, self.rank, self.group_size, self._backend.name)
            self._calls.after = lambda: file.update(self.statistics)
