"""What a run shows and leaves: progress bar, log lines, TensorBoard, losses.jsonl, loss.png."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ep_megatron.train.config import Config
from ep_megatron.train.step import StepResult


class Reporter:
    """The one voice of a run; lives on the first rank of the last pipeline stage."""

    def __init__(self, config: Config, first_iteration: int, unigram_entropy: float) -> None:
        """Open the files of a run that goes on after `first_iteration`.

        Args:
            config: the run's config, with its folders filled in.
            first_iteration: iterations already trained; later lines of losses.jsonl are dropped.
            unigram_entropy: of the text, nats per token.
        """
        from torch.utils.tensorboard import SummaryWriter

        assert config.run_dir is not None
        self.config = config
        self.entropy = unigram_entropy
        self.console = Console(highlight=False)
        self.losses_path = config.run_dir / "losses.jsonl"
        self.curve_path = config.run_dir / "loss.png"
        self.records = records_until(self.losses_path, first_iteration)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        rewritten = self.losses_path.with_suffix(".new")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        rewritten.replace(self.losses_path)
        self._losses = self.losses_path.open("a")
        self._board = SummaryWriter(str(config.tensorboard_dir), purge_step=first_iteration + 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=config.train_iters, completed=first_iteration, numbers=""
        )
        self._progress.start()
        self._start, self._trained = time.perf_counter(), 0

    @property
    def tokens_per_second(self) -> float:
        """Mean over this process's life, validations and checkpoints included."""
        tokens = self._trained * self.config.global_batch_size * self.config.seq_length
        return tokens / (time.perf_counter() - self._start)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._progress.console.print(text, soft_wrap=True, markup=False)

    def step(self, iteration: int, result: StepResult, seconds: float) -> None:
        """Report one iteration."""
        speed = self.config.global_batch_size * self.config.seq_length / seconds
        assert result.loss is not None
        record = {
            "iteration": iteration,
            "loss": result.loss,
            "learning-rate": result.learning_rate,
            "grad-norm": result.grad_norm,
            "tokens-per-second": round(speed, 1),
        }
        self._write(record)
        self._trained += 1
        numbers = f"loss {result.loss:.4f}  {speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=iteration, numbers=numbers)
        if iteration % self.config.log_interval == 0 or iteration == self.config.train_iters:
            left = (self.config.train_iters - iteration) * (
                (time.perf_counter() - self._start) / self._trained
            )
            self.say(
                f"iteration {iteration:>6}/{self.config.train_iters}  {numbers}  "
                f"lr {result.learning_rate:.2e}  grad norm {result.grad_norm:.2f}  "
                f"{left:.0f} s left"
            )

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Add more figures of an iteration to TensorBoard."""
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)

    def validation(self, iteration: int, loss: float) -> None:
        """Report a validation."""
        self._write({"iteration": iteration, "validation-loss": loss})
        self.say(
            f"iteration {iteration:>6}  validation loss {loss:.4f} nats/token "
            f"(unigram entropy of the text {self.entropy:.4f})"
        )

    def close(self) -> None:
        """Stop the bar, close the files, draw the curve."""
        self._progress.stop()
        self._losses.close()
        self._board.close()
        if self.records:
            draw_losses(self.records, self.entropy, self.curve_path)

    def last(self, key: str) -> float | None:
        """Return the latest value of `key` in losses.jsonl."""
        values = [record[key] for record in self.records if key in record]
        return values[-1] if values else None

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._losses.write(json.dumps(record) + "\n")
        self._losses.flush()
        for name, value in record.items():
            if name != "iteration":
                self._board.add_scalar(name, value, record["iteration"])


def records_until(path: Path, iteration: int) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file of a run that goes on after `iteration`."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the machine died while it was written: nothing that was saved lies behind it
        if record["iteration"] <= iteration:
            records.append(record)
    return records


def draw_losses(records: list[dict[str, Any]], entropy: float, path: Path) -> None:
    """Draw training and validation losses and the line of the unigram entropy as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, style, label in (
        ("loss", {"linewidth": 0.8}, "training"),
        ("validation-loss", {"marker": "o", "linewidth": 1.5}, "validation"),
    ):
        points = [(record["iteration"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.axhline(entropy, linestyle="--", color="grey", label="unigram entropy of the text")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
