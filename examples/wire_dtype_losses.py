"""Train the same model with rows on the wire as BF16, FP8 and MXFP8, for several seeds.

    python examples/wire_dtype_losses.py --config examples/tiny_deepseek.yaml --seeds 1,2,3

prints a table of the mean loss of the last tenth of the iterations and of the validation loss, and
with --figure draws the difference to BF16 over the iterations, with the spread of BF16 itself over
the seeds beside it. What follows `--` goes to `ep-megatron pretrain` as it is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

Curves = dict[tuple[int, str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--dtypes", default="bf16,fp8,mxfp8", help="the first is compared with")
    parser.add_argument("--train-iters", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/wire_dtypes"))
    parser.add_argument("--figure", type=Path, help="an SVG or PNG file")
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments, rest = parser.parse_known_args()
    rest = [word for word in rest if word != "--"]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    dtypes = arguments.dtypes.split(",")
    curves: Curves = {}
    rows = []
    for seed in seeds:
        for dtype in dtypes:
            folder = arguments.folder / f"{dtype}-{seed}"
            train(arguments.config, seed, dtype, arguments.train_iters, folder, rest)
            lines = (folder / "losses.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            curves[seed, dtype] = [r["loss"] for r in records if "loss" in r]
            rows.append(row_of(records, seed, dtype))
    print(f"| seed | rows | last {last(arguments.train_iters)} iterations | validation |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row['seed']} | {row['dtype']} | {row['loss']:.4f} | {row['validation']:.4f} |")
    for dtype in dtypes[1:]:
        print(f"\n{dtype} - {dtypes[0]}: " + summary(rows, dtype, dtypes[0]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.figure is not None:
        draw(curves, seeds, dtypes, arguments.figure)


def train(
    config: str, seed: int, dtype: str, num_iterations: int, folder: Path, rest: list[str]
) -> None:
    """Run `ep-megatron pretrain`; raise if it fails."""
    iterations = str(num_iterations)
    command = [sys.executable, "-m", "ep_megatron.cli", "pretrain", "--config", config]
    command += ["--bf16", "true", "--seed", str(seed), "--run-dir", str(folder)]
    command += ["--train-iters", iterations, "--eval-interval", iterations]
    command += ["--moe-dispatch-dtype", dtype, "--moe-combine-grad-dtype", dtype, *rest]
    done = subprocess.run(
        command,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"expected {' '.join(command)} to succeed, got:\n{done.stdout}")


def last(num_iterations: int) -> int:
    return max(1, num_iterations // 10)


def row_of(records: list[dict[str, Any]], seed: int, dtype: str) -> dict[str, Any]:
    losses = [r["loss"] for r in records if "loss" in r]
    validation = [r["validation-loss"] for r in records if "validation-loss" in r]
    return {
        "seed": seed,
        "dtype": dtype,
        "loss": statistics.mean(losses[-last(len(losses)) :]),
        "validation": validation[-1] if validation else float("nan"),
    }


def summary(rows: list[dict[str, Any]], dtype: str, reference: str) -> str:
    """Say how a dtype's last losses differ from the reference's, seed by seed."""
    loss = {(row["seed"], row["dtype"]): row["loss"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    gaps = [loss[seed, dtype] / loss[seed, reference] - 1 for seed in seeds]
    spread = [loss[seed, reference] for seed in seeds]
    return (
        f"mean {statistics.mean(gaps):+.2%}, from {min(gaps):+.2%} to {max(gaps):+.2%} over "
        f"{len(seeds)} seeds; {reference} alone spreads by {max(spread) / min(spread) - 1:.2%}"
    )


def draw(curves: Curves, seeds: list[int], dtypes: list[str], path: Path) -> None:
    """Draw each dtype's relative difference to the first, a line per seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "wire dtypes"  # the same bytes for the same curves
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    reference = dtypes[0]
    for color, dtype in zip(("tab:blue", "tab:orange", "tab:green"), dtypes[1:], strict=False):
        for number, seed in enumerate(seeds):
            pairs = zip(curves[seed, dtype], curves[seed, reference], strict=True)
            gaps = [100 * (mine / theirs - 1) for mine, theirs in pairs]
            label = dtype if number == 0 else None
            axes.plot(range(1, len(gaps) + 1), gaps, color=color, linewidth=0.8, label=label)
    means = [
        statistics.mean(curves[seed, reference][at] for seed in seeds)
        for at in range(len(curves[seeds[0], reference]))
    ]
    for number, seed in enumerate(seeds):
        spread = [
            100 * (loss / mean - 1)
            for loss, mean in zip(curves[seed, reference], means, strict=True)
        ]
        label = f"{reference}, other seeds" if number == 0 else None
        axes.plot(range(1, len(spread) + 1), spread, color="0.8", zorder=0, label=label)
    axes.set_xlabel("iteration")
    axes.set_ylabel(f"loss over {reference}'s, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
