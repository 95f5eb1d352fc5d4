"""Work that one rank does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Return rank 0's result on every rank; collective.

    Raises:
        ValueError: the function raised ValueError or OSError on rank 0; the same text everywhere.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [function(), None]
        except (ValueError, OSError) as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    result: Result = answer[0]
    return result
