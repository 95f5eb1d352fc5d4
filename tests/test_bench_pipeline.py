"""Overlap is real: measured between two hosts that a slow link joins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ep_megatron.bench.pipeline_ranks import MODES
from ep_megatron.bench.two_hosts import HostsUnavailableError, two_hosts
from ep_megatron.pipeline.measures import measure
from ep_megatron.pipeline.trace import read_trace

COMMAND = [sys.executable, "-m", "ep_megatron.cli", "bench-pipeline"]


@pytest.mark.megatron
def test_exchanges_over_a_slow_link_are_hidden(tmp_path: Path) -> None:
    """Exposed communication with pairs is less than half of what it is without any overlap.

    One micro-batch of six has no partner, so an eighth or so is what the schedule leaves. The
    command itself compares the gradients of all modes.
    """
    try:
        with two_hosts("100mbit"):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    command = [*COMMAND, "--schedule", "interleaved-overlap", "--link", "100mbit", "--batch", "4"]
    command += ["--num-microbatches", "6", "--num-layers", "1", "--steps", "1"]
    command += ["--output", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["mode"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(rows) == list(MODES)
    assert rows["overlap"]["exposed"] < 0.5 * rows["blocking"]["exposed"]
    assert rows["overlap"]["predicted_exposed"] < 0.5 * rows["blocking"]["predicted_exposed"]
    assert rows["overlap"]["step"] < rows["blocking"]["step"]
    # A link that takes 42 ms for an exchange's rows was really in between.
    assert rows["blocking"]["exchange"] > 40
    name = "interleaved-overlap-100mbit"
    timeline = read_trace(tmp_path / f"{name}-overlap-rank1.json")
    assert len([span for span in timeline.spans if span.lane == "comm"]) == 6 * 4
    assert measure(timeline)[0].compute >= 6 * 9 * 40e3
    assert "overlap, simulated" in (tmp_path / f"{name}.html").read_text()
    assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")


def test_wrong_options_are_refused() -> None:
    for option, message in (
        (["--schedule", "zbv"], "expected one of dualpipev, interleaved-overlap, got 'zbv'"),
        (["--steps", "0"], "--steps: expected a positive number, got 0"),
    ):
        done = subprocess.run(
            [*COMMAND, *option], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2
        words = " ".join(done.stderr.replace("\u2502", " ").split())
        assert message in words
