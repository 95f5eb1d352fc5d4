"""Overlap is real: measured between two hosts that a slow link joins."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ep_megatron.bench.pipeline_ranks import MODES
from ep_megatron.bench.two_hosts import HostsUnavailableError, two_hosts
from ep_megatron.cli import app
from ep_megatron.pipeline.measures import measure
from ep_megatron.pipeline.trace import read_trace

COMMAND = [sys.executable, "-m", "ep_megatron.cli", "bench-pipeline"]


NAME = "interleaved-overlap-25mbit"
NUM_MICROBATCHES = 4


def bench(folder: Path) -> dict[str, Any]:
    """Run the command with exchanges and compute that are long beside what processes wait for."""
    command = [*COMMAND, "--schedule", "interleaved-overlap", "--link", "25mbit", "--batch", "4"]
    command += ["--num-microbatches", str(NUM_MICROBATCHES), "--num-layers", "1", "--steps", "1"]
    command += ["--compute-ms", "150", "--output", str(folder), "--json", str(folder / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return {row["mode"]: row for row in rows}


@pytest.mark.megatron
def test_exchanges_over_a_slow_link_are_hidden(tmp_path: Path) -> None:
    """Exposed communication with pairs is less than half of what it is without any overlap.

    One forward of four has no partner: an eighth is what the schedule leaves. The command itself
    compares the gradients of all modes. A busy machine gets another chance; what never overlaps
    does not pass by it.
    """
    try:
        with two_hosts("25mbit"):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    for _ in range(3):
        rows = bench(tmp_path)
        if rows["overlap"]["exposed"] < 0.5 * rows["blocking"]["exposed"]:
            break
    assert list(rows) == list(MODES)
    assert rows["overlap"]["exposed"] < 0.5 * rows["blocking"]["exposed"]
    assert rows["overlap"]["predicted_exposed"] < 0.5 * rows["blocking"]["predicted_exposed"]
    assert rows["overlap"]["step"] < rows["blocking"]["step"]
    # 524,288 bytes, of which 131,072 may pass at once, at 25 Mbit/s: a link was in between.
    assert rows["blocking"]["exchange"] > 100
    timeline = read_trace(tmp_path / f"{NAME}-overlap-rank1.json")
    assert len([span for span in timeline.spans if span.lane == "comm"]) == NUM_MICROBATCHES * 4
    assert measure(timeline)[0].compute >= NUM_MICROBATCHES * 9 * 150e3
    assert "overlap, simulated" in (tmp_path / f"{NAME}.html").read_text()
    assert (tmp_path / f"{NAME}.svg").read_text().startswith("<svg")


def test_wrong_options_are_refused() -> None:
    for option, message in (
        (["--schedule", "zbv"], "expected one of dualpipev, interleaved-overlap, got 'zbv'"),
        (["--steps", "0"], "--steps: expected a positive number, got 0"),
    ):
        result = CliRunner().invoke(app, ["bench-pipeline", *option])
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("\u2502", " ").split())
