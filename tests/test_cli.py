"""The command `ep-megatron`: help, errors, and processes that fail."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ep_megatron.cli import app

CI_CONFIG = Path(__file__).parents[1] / "examples" / "ci.yaml"


def test_all_keys_are_listed_with_their_meaning() -> None:
    result = CliRunner().invoke(app, ["pretrain", "--keys"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "moe-token-dispatcher" in result.output
    assert "Experts per token." in result.output


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--moe-router-topkk", "4"], ["'moe-router-topkk'", "4", "moe-router-topk"]),
        (["--moe-token-dispatcher", "x"], ["moe-token-dispatcher", "'deepep'", "'x'"]),
        (["--num-processes", "3"], ["num-processes", "multiple of 2", "3"]),
        (["stray"], ["'stray'"]),
    ],
    ids=["unknown key", "impossible value", "wrong number of processes", "stray word"],
)
def test_a_wrong_config_is_one_line_and_no_process(words: list[str], parts: list[str]) -> None:
    result = CliRunner().invoke(app, ["pretrain", "--config", str(CI_CONFIG), *words])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.output


def test_a_config_is_needed() -> None:
    result = CliRunner().invoke(app, ["pretrain"])
    assert result.exit_code == 2
    assert "--config" in result.output


def _launch(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    worker, launcher = tmp_path / "worker.py", tmp_path / "launcher.py"
    worker.write_text(script)
    launcher.write_text(
        "import sys\n"
        "from ep_megatron.train.launch import run_processes\n"
        f"sys.exit(run_processes(2, [{str(worker)!r}]))\n"
    )
    command = [sys.executable, str(launcher)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_one_failing_process_ends_all_with_its_message(tmp_path: Path) -> None:
    script = """
import os, sys, time
from ep_megatron.train.launch import run_recorded

def work():
    if os.environ["RANK"] == "1":
        raise KeyError("the cause")
    time.sleep(300)
    return 0

sys.exit(run_recorded(work))
"""
    result = _launch(script, tmp_path)
    assert result.returncode == 1
    assert "rank 1 of 2 failed" in result.stderr
    assert "KeyError: 'the cause'" in result.stderr
    assert "in work" in result.stderr  # its traceback


def test_processes_that_succeed_return_zero(tmp_path: Path) -> None:
    script = "import os\nprint('rank', os.environ['RANK'], os.environ['OMP_NUM_THREADS'])\n"
    result = _launch(script, tmp_path)
    assert result.returncode == 0
    assert {line.split()[1] for line in result.stdout.splitlines()} == {"0", "1"}
