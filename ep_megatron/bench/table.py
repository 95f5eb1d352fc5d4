"""The result for a reader: one block per size, milliseconds and the ratio to one of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

_SIZES = ("direction", "num_ranks", "num_tokens", "hidden", "num_topk", "num_experts")


def print_table(rows: Iterable[Mapping[str, Any]], baseline: str, console: Console) -> None:
    """Print a block per size; `x` is an implementation's median over the baseline's."""
    blocks: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        blocks[tuple(row[name] for name in _SIZES)].append(row)
    for (direction, ranks, tokens, hidden, topk, experts), block in blocks.items():
        medians = {row["implementation"]: row["median_ms"] for row in block}
        reference = medians.get(baseline, block[0]["median_ms"])
        named = baseline if baseline in medians else block[0]["implementation"]
        has_fp8 = any(
            row.get("dispatch_bytes", 0) not in (0, row["payload_bytes"]) for row in block
        )
        has_link = any(row.get("link_bytes") for row in block)
        table = Table(
            "implementation",
            *(_right(header) for header in ("median ms", "min", "max", "GB/s", f"x {named}")),
            *([_right("MB per dispatch")] if has_fp8 else []),
            *([_right("MB on the link")] if has_link else []),
            title=f"{direction}: {ranks} ranks, {tokens} tokens/rank, hidden {hidden}, "
            f"top-{topk} of {experts}, {block[0]['payload_bytes'] / 1e6:.1f} MB one way",
            title_justify="left",
        )
        num_ways = 4 if direction == "forward_backward" else 2
        for row in block:
            table.add_row(
                row["implementation"],
                *(f"{row[name]:.2f}" for name in ("median_ms", "min_ms", "max_ms")),
                f"{num_ways * row['payload_bytes'] / row['median_ms'] / 1e6:.1f}",
                f"{row['median_ms'] / reference:.2f}",
                *([f"{row['dispatch_bytes'] / 1e6:.2f}"] if has_fp8 else []),
                *([f"{row['link_bytes'] / 1e6:.2f}"] if has_link else []),
            )
        console.print(table)


def _right(header: str) -> Column:
    return Column(header, justify="right")
