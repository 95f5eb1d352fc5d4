"""What queued calls hide, measured where it cannot depend on how busy the machine is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ep_megatron.bench import overlap
from ep_megatron.bench.two_hosts import HostsUnavailableError, two_hosts
from tests.ranks import run_on_ranks


def check_late(rank: int) -> Any:
    return overlap.measure(overlap.LATE, "shared_memory", 0.6, 16, 1)


def test_a_late_ranks_time_is_given_back() -> None:
    """While it sleeps a core is free, so nearly all of the other's computation is hidden."""
    row, nothing = run_on_ranks(2, check_late)
    assert nothing is None
    assert row.communication > 500
    assert row.in_turn >= row.communication
    # The computation alone may be anything on a busy machine; hidden is what counts.
    assert row.overlapped < 0.9 * (row.communication + row.computation)


def test_a_slow_link_is_measured(tmp_path: Path) -> None:
    try:
        with two_hosts("100mbit"):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "ep_megatron.cli", "bench-overlap", "--link", "100mbit"]
    command += ["--late-ms", "0", "--num-tokens", "256", "--samples", "1"]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["backend"] for row in rows] == ["process_group", "hierarchical"]
    for row in rows:
        assert row["scenario"] == "100mbit"
        # There and back at 12.5 MB/s.
        assert row["communication"] > 1e3 * 2 * row["megabytes"] / 12.5 * 0.8
    assert "gain" in done.stdout
