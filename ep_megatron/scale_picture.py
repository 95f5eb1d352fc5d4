"""The plans of `scale` as a picture. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ep_megatron.scale import Plan


def draw(by_fabric: Mapping[str, Sequence[Plan]], path: Path) -> None:
    """Write bytes, counts, memory and times over the number of ranks, a colour per machine.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for index, (name, plans) in enumerate(by_fabric.items()):
        ranks, colour = [plan.num_ranks for plan in plans], f"C{index}"
        width = 4.5 - 1.5 * index  # machines that do not differ lie on top of each other
        series = [
            (axes[0][0], [plan.network[0] / 1e6 for plan in plans], "-", f"{name}, network"),
            (axes[0][0], [plan.nvlink[0] / 1e6 for plan in plans], "--", f"{name}, NVLink"),
            (axes[0][1], [plan.counts / 1e6 for plan in plans], "-", f"{name}, as told"),
            (axes[0][1], [p.counts_to_all / 1e6 for p in plans], "--", f"{name}, all to all"),
            (axes[1][0], [plan.received / 1e6 for plan in plans], "-", f"{name}, received rows"),
            (
                axes[1][0],
                [plan.low_latency_window / 1e6 for plan in plans],
                ":",
                f"{name}, low-latency window",
            ),
        ]
        for axis, values, line, label in series:
            axis.plot(ranks, values, line, color=colour, label=label, linewidth=width)
        low, high = zip(*(plan.dispatch for plan in plans), strict=True)
        axes[1][1].fill_between(
            ranks, [1e3 * t for t in low], [1e3 * t for t in high], color=colour, alpha=0.25
        )
        axes[1][1].plot(ranks, [1e3 * t for t in low], color=colour, label=name)
    first = next(iter(by_fabric.values()))
    axes[1][0].plot(
        [plan.num_ranks for plan in first],
        [plan.deepep_low_latency / 1e6 for plan in first],
        "k-.",
        label="DeepEP V1 low latency",
    )
    titles = [
        (axes[0][0], "Rows of a dispatch that leave a rank", "MB"),
        (axes[0][1], "Counts that a rank sends", "MB"),
        (axes[1][0], "Memory of a rank", "MB"),
        (axes[1][1], "Time of a dispatch, as a range", "ms"),
    ]
    for axis, title, unit in titles:
        axis.set(title=title, xlabel="ranks", ylabel=unit, xscale="log", yscale="log")
        axis.set_xticks([plan.num_ranks for plan in first], [str(p.num_ranks) for p in first])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
