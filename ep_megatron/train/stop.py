"""Ctrl-C and SIGTERM end a run after the iteration, with a checkpoint, on all ranks at once."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers a signal until all ranks have heard of it; a second signal acts as usual."""

    def __init__(self) -> None:
        """Take over the handlers of `SIGNALS` in this process."""
        self._signal = 0
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        self.restore()

    def restore(self) -> None:
        """Give the signals back to their earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """Return the signal any rank has had, or 0; collective over all ranks."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        number = torch.tensor(self._signal, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)
