"""Whole runs through the real command: losses fall, interrupted runs resume exactly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from ep_megatron.scale_routing import read_routing

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 300

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text to train on; runs share its tokenised form."""
    made = tmp_path_factory.mktemp("pretrain")
    lines = (f"{i} times {i % 7} is {i * (i % 7)}; so it is.\n" for i in range(20_000))
    (made / "text.txt").write_text("".join(lines))
    return made


def _start(folder: Path, name: str, *words: str) -> "subprocess.Popen[str]":
    command = [
        *(sys.executable, "-m", "ep_megatron.cli", "pretrain"),
        *("--config", str(EXAMPLES / "ci.yaml"), "--run-dir", name),
        *("--text-path", "text.txt", "--data-cache-path", "data"),
        *words,
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: "subprocess.Popen[str]", expected: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        pytest.fail(f"no end within {TIMEOUT} s:\n{output}")
    assert process.returncode == expected, output
    return output


def _records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _exact(folder: Path, name: str) -> list[tuple[Any, ...]]:
    """Return all that must be the same in every bit between two runs."""
    keys = ("iteration", "loss", "validation-loss", "grad-norm", "learning-rate")
    return [tuple(record.get(key) for key in keys) for record in _records(folder, name)]


def _wait_for_iteration(folder: Path, name: str, iteration: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        path = folder / name / "losses.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= iteration:
            return
        time.sleep(0.02)
    pytest.fail(f"iteration {iteration} of {name} did not come within {TIMEOUT} s")


LONGER = ("--train-iters", "60", "--eval-interval", "20")


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    """Train 60 iterations without interruption and return what was printed."""
    return _finish(_start(folder, "whole", *LONGER, "--log-routing", "true"))


def test_the_routing_log_has_the_rows_of_every_dispatch(folder: Path, whole: str) -> None:
    lines = (folder / "whole/routing.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # 16 sequences of 32 tokens, 4 at a time on each of two ranks; two of 8 experts each.
    found = [(r["iteration"], r["layer"], r["micro-batch"]) for r in records]
    assert found == [(i, 2, m) for i in range(5, 61, 5) for m in range(2)]
    for record in records:
        rows = record["rows"]
        assert {size: len(counts) for size, counts in rows.items()} == {"2": 2, "4": 4, "8": 8}
        assert sum(rows["8"]) == 2 * 4 * 32 * 2
        assert 256 <= sum(rows["2"]) <= sum(rows["4"]) <= sum(rows["8"])
    found_ratios = read_routing(folder / "whole/routing.jsonl", first_iteration=30)
    assert [(one.num_ranks, len(one.ratios)) for one in found_ratios] == [(2, 14), (4, 14), (8, 14)]


def test_losses_fall_and_results_lie_where_the_run_says(folder: Path, whole: str) -> None:
    records = _records(folder, "whole")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 60
    assert losses[0] > 5.0  # near the log of 256
    assert sum(losses[-5:]) / 5 < 2.7
    validations = [r["validation-loss"] for r in records if "validation-loss" in r]
    assert len(validations) == 3
    assert validations[-1] < validations[0]
    run_dir = folder / "whole"
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert (run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "60"
    assert "expert-parallel group of ranks 0, 1" in whole
    assert "dispatch: mean milliseconds that a rank (row) waited for a rank (column)" in whole
    assert re.search(r"expert \d of 8 got [\d.]+ times the mean of \d+ rows", whole)
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for name in ("wait-ms-per-dispatch", "bytes-per-combine", "expert-load-max-over-mean"):
        assert [event.step for event in board.Scalars(name)] == list(range(5, 61, 5))
    assert all(event.value >= 1 for event in board.Scalars("expert-load-max-over-mean"))
    for part in ("unigram entropy", "loss.png", "losses.jsonl", "tensorboard --logdir", "next"):
        assert part in whole


@pytest.mark.usefixtures("whole")
def test_a_run_ended_by_a_signal_resumes_with_the_same_losses(folder: Path) -> None:
    process = _start(folder, "ended", *LONGER)
    _wait_for_iteration(folder, "ended", 5)
    process.send_signal(signal.SIGTERM)
    output = _finish(process, expected=128 + signal.SIGTERM)
    assert "stopped by SIGTERM" in output
    stopped = _records(folder, "ended")[-1]["iteration"]
    latest = folder / "ended/checkpoints/latest_checkpointed_iteration.txt"
    assert 5 <= stopped < 60
    assert latest.read_text() == str(stopped)
    _finish(_start(folder, "ended", *LONGER, "--resume"))
    assert _exact(folder, "ended") == _exact(folder, "whole")


def test_a_pipelined_run_in_bfloat16_resumes_with_the_same_losses(folder: Path) -> None:
    words = (
        *("--pipeline-model-parallel-size", "2", "--bf16", "--use-distributed-optimizer"),
        *("--num-layers", "4", "--moe-layer-freq", "[0]*1+[1]*3", "--hidden-dropout", "0.1"),
        *("--train-iters", "6", "--eval-interval", "3", "--save-interval", "4"),
    )
    _finish(_start(folder, "pipelined", *words))
    exact = _exact(folder, "pipelined")
    assert len(exact) == 8
    assert exact[-2][1] < exact[0][1]
    checkpoints = folder / "pipelined/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == [
        "iter_0000004",
        "iter_0000006",
    ]
    # As if the machine had died before the second checkpoint was named the latest.
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("4")
    output = _finish(_start(folder, "pipelined", *words, "--resume"))
    assert "resumed from pipelined/checkpoints/iter_0000004" in output
    assert _exact(folder, "pipelined") == exact


def test_megatrons_alltoall_gives_the_same_losses(folder: Path, whole: str) -> None:
    assert "dispatcher deepep" in whole
    _finish(_start(folder, "alltoall", *LONGER, "--moe-token-dispatcher", "alltoall"))
    ours, theirs = (
        [record["loss"] for record in _records(folder, name) if "loss" in record]
        for name in ("whole", "alltoall")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_an_error_on_the_ranks_is_told_once_and_plainly(folder: Path) -> None:
    output = _finish(_start(folder, "nothing", "--resume"), expected=1)
    # Both ranks raise it; either may be the first.
    expected = (
        r"error: rank [01] of 2 failed \(exit code 1\): resume: expected a checkpoint in .*\n"
    )
    assert re.fullmatch(expected, output)
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "words",
    [
        (
            *("--multi-latent-attention", "--kv-lora-rank", "16", "--q-lora-rank", "16"),
            *("--qk-head-dim", "16", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "8"),
            *("--rope-type", "rope", "--qk-layernorm", "--recompute-granularity", "selective"),
            *("--recompute-modules", "[layernorm, mla_up_proj]", "--mtp-num-layers", "1"),
        ),
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--moe-router-num-groups", "4", "--moe-router-group-topk", "2"),
            *("--moe-expert-capacity-factor", "1.0", "--recompute-granularity", "full"),
            *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ),
    ],
    ids=["multi-latent attention, MTP", "tensor and sequence parallel, groups, capacity"],
)
def test_other_models_train_too(words: tuple[str, ...], folder: Path) -> None:
    name = words[0].strip("-")
    _finish(_start(folder, name, *words, "--train-iters", "8"))
    losses = [record["loss"] for record in _records(folder, name) if "loss" in record]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", ["dispatch_combine.py", "pretrain.py"])
def test_example_scripts_run_under_torchrun(name: str, folder: Path) -> None:
    arguments = []
    if name == "pretrain.py":
        arguments = [str(EXAMPLES / "ci.yaml"), "--train-iters", "4", "--run-dir", "script"]
        arguments += ["--text-path", "text.txt", "--data-cache-path", "data"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = _finish(process)
    expected = "output and gradient correct" if name == "dispatch_combine.py" else "trained"
    assert expected in output


def test_fp8_on_the_wire_trains_in_a_band_of_bfloat16_and_repeats_itself(folder: Path) -> None:
    # 128 columns are one block; both the rows and the gradients that go back are cast.
    sizes = ("--hidden-size", "128", "--bf16", "--train-iters", "12", "--eval-iters", "0")
    words = ("--moe-dispatch-dtype", "fp8", "--moe-combine-grad-dtype", "fp8")
    runs = {"fp8": words, "fp8-again": words, "bf16": ()}
    for name, extra in runs.items():
        output = _finish(_start(folder, f"wire-{name}", *sizes, *extra))
        assert ("rows fp8, their gradients fp8" in output) == (name != "bf16")
    assert _exact(folder, "wire-fp8") == _exact(folder, "wire-fp8-again")
    losses = {name: [r["loss"] for r in _records(folder, f"wire-{name}")] for name in runs}
    assert losses["fp8"] != losses["bf16"]
    for mine, theirs in zip(losses["fp8"], losses["bf16"], strict=True):
        assert abs(mine - theirs) < 0.02 * theirs


def test_rows_as_mxfp8_train_in_a_band_of_bfloat16(folder: Path) -> None:
    script = EXAMPLES / "wire_dtype_losses.py"
    command = [sys.executable, str(script), "--config", str(EXAMPLES / "ci.yaml")]
    command += ["--seeds", "3", "--dtypes", "bf16,mxfp8", "--train-iters", "12"]
    command += ["--folder", "wire_dtypes", "--figure", "losses.svg", "--json", "losses.json"]
    command += ["--", "--hidden-size", "128", "--text-path", "text.txt", "--eval-iters", "1"]
    command += ["--data-cache-path", "data"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "mxfp8 - bf16: mean" in done.stdout
    assert (folder / "losses.svg").stat().st_size > 1000
    rows = json.loads((folder / "losses.json").read_text())
    assert [row["dtype"] for row in rows] == ["bf16", "mxfp8"]
    losses = [
        [r["loss"] for r in _records(folder, f"wire_dtypes/{dtype}-3") if "loss" in r]
        for dtype in ("bf16", "mxfp8")
    ]
    assert losses[0] != losses[1]
    for theirs, mine in zip(*losses, strict=True):
        assert abs(mine - theirs) < 0.02 * theirs
