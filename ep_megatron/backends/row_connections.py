"""Rows between all ranks over torch.distributed, each part to its own rank, with a deadline."""

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.backends.meeting import Meeting, describe_late, has_gloo, wait_for_each

_ROWS_TAG = 1  # of messages on the connections; 0 is the meeting's


class RowConnections:
    """Moves rows: on a CPU point to point over connections of its own, else by the group.

    Collective constructor. Rows to higher ranks go over the meeting's connections, to lower ranks
    over others: gloo answers "ready to receive" on the connection that carries rows, where it
    would queue behind them.

    Args:
        group: the ranks.
        meeting: of the same ranks, private to its owner.

    Attributes:
        num_bytes: sent to, and received from, each rank since `start_counting`.
    """

    def __init__(self, group: dist.ProcessGroup, meeting: Meeting) -> None:
        self._group, self._meeting = group, meeting
        self._down = None
        if has_gloo(group):
            self._down = Meeting(group, meeting.timeout, is_private=True)
        self.start_counting()

    def start_counting(self) -> None:
        """Forget what has been moved."""
        ranks = self._meeting.num_ranks
        self.num_bytes: tuple[list[int], list[int]] = ([0] * ranks, [0] * ranks)

    def interrupt(self) -> None:
        """End what waits, in any thread, with an error; no row gets through after. Local."""
        self._meeting.interrupt()
        if self._down is not None:
            self._down.interrupt()

    def exchange(
        self, values: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Tensor:
        """Send `values [sum(send_counts), ...]` by parts; return `[sum(recv_counts), ...]`.

        Collective.

        Raises:
            RuntimeError: naming the ranks whose rows did not come, where the connections are ours.
        """
        row_bytes = math.prod(values.shape[1:]) * values.element_size()
        for moved, counts in zip(self.num_bytes, (send_counts, recv_counts), strict=True):
            moved[:] = [n + row_bytes * count for n, count in zip(moved, counts, strict=True)]
        received = values.new_empty(sum(recv_counts), *values.shape[1:])
        # Without elements any strides count as contiguous, but not every view of them is allowed.
        dense = values.contiguous() if values.numel() else values.new_empty(values.shape)
        # As bytes: no backend of torch.distributed sends every dtype (gloo sends no float8).
        to, sent = (tensor.flatten(1).view(torch.uint8) for tensor in (received, dense))
        if self._down is None or values.device.type != "cpu":
            self._over_group(to, sent, (list(recv_counts), list(send_counts)))
            return received
        deadline = time.monotonic() + self._meeting.timeout
        late: dict[int, str] = {}
        parts = to.split(list(recv_counts)), sent.split(list(send_counts))
        works = self._post(*parts, self._down.gloo, late)
        self._meeting.wait(lambda: wait_for_each(works, late, deadline), self.interrupt)
        if late:
            raise self._no_rows(f"none from {describe_late(late, self._meeting.last_call)}")
        return received

    def _over_group(self, to: Tensor, sent: Tensor, counts: tuple[list[int], list[int]]) -> None:
        """Move rows over the caller's group, which does not say whose are missing."""
        try:
            work = self._group.alltoall_base(to, sent, *counts, dist.AllToAllOptions())
            work.wait(timedelta(seconds=self._meeting.timeout))
        except RuntimeError as error:
            raise self._no_rows(str(error).splitlines()[0]) from error

    def _no_rows(self, actual: str) -> RuntimeError:
        meeting = self._meeting
        return RuntimeError(
            f"process_group: rank {meeting.rank} expected its rows of call {meeting.num_calls} "
            f"within {meeting.timeout:g} s, got {actual}; a rank stopped between the count "
            "exchange and the rows. This Buffer and its process group cannot go on"
        )

    def _post(
        self, receives: Sequence[Tensor], sends: Sequence[Tensor], down: Any, late: dict[int, str]
    ) -> list[tuple[int, Any]]:
        """Start to move each rank's part, every receive before a send; return what to wait for.

        Ranks whose connection is gone already are noted in `late`.
        """
        up, rank = self._meeting.gloo, self._meeting.rank
        works: list[tuple[int, Any]] = []
        receives[rank].copy_(sends[rank])
        for is_receive, parts in ((True, receives), (False, sends)):
            for peer, part in enumerate(parts):
                if peer == rank or len(part) == 0:
                    continue
                group = up if (peer > rank) != is_receive else down
                post = group.recv if is_receive else group.send
                try:
                    works.append((peer, post([part], peer, _ROWS_TAG)))
                except RuntimeError as error:
                    late[peer] = str(error)
        return works
