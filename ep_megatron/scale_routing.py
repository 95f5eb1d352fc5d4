"""How unevenly a trained router filled its ranks, for the plans of `scale`."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Imbalance:
    """Rows of the busiest rank over the mean, for one number of ranks that share the experts.

    Attributes:
        num_ranks: R.
        ratios: of every micro-batch and layer, ascending.
    """

    num_ranks: int
    ratios: Sequence[float]

    def quantile(self, share: float) -> float:
        """Return the smallest ratio that at least `share` of all do not exceed."""
        return self.ratios[max(0, math.ceil(share * len(self.ratios)) - 1)]


def read_routing(path: Path, first_iteration: int = 0) -> list[Imbalance]:
    """Read the `routing.jsonl` of a training run, from an iteration on; ascending by ranks.

    Raises:
        ValueError: if it is something else, or has nothing of such iterations.
        OSError: if it cannot be read.
    """
    ratios: dict[int, list[float]] = defaultdict(list)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record["iteration"] < first_iteration:
                continue
            for size, rows in record["rows"].items():
                if sum(rows) > 0:
                    ratios[int(size)].append(max(rows) * len(rows) / sum(rows))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"scale: expected line {number} of {path} to be of a routing log, got "
                f"{line[:60]!r} ({error}); `log-routing: true` makes a training run write one"
            ) from None
    if not ratios:
        raise ValueError(
            f"scale: expected {path} to have rows of iteration {first_iteration} or later, got none"
        )
    return [Imbalance(size, sorted(ratios[size])) for size in sorted(ratios)]


def imbalance_table(found: Sequence[Imbalance]) -> str:
    """Return a table: the median, and what one in ten, in a hundred, and none exceeds."""
    lines = [
        "| ranks | dispatches | busiest / mean: median | 9 in 10 below | 99 in 100 below | worst |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        shown = " | ".join(f"{one.quantile(share):.2f}" for share in (0.5, 0.9, 0.99, 1.0))
        lines.append(f"| {one.num_ranks} | {len(one.ratios)} | {shown} |")
    return "\n".join(lines) + "\n"
