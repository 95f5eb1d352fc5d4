"""Training survives: ranks killed at any step, or in a checkpoint; damaged files are named."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("megatron.core")

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 300
ITERATIONS = 24

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("survives")
    lines = (f"{i} times {i % 7} is {i * (i % 7)}; so it is.\n" for i in range(5_000))
    (made / "text.txt").write_text("".join(lines))
    return made


def start(folder: Path, name: str, *words: str, restarts: int = 0) -> "subprocess.Popen[str]":
    """Start the example script under torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", str(restarts), "--monitor-interval", "0.1"),
        *(str(EXAMPLES / "pretrain.py"), str(EXAMPLES / "ci.yaml"), "--run-dir", name),
        *("--text-path", "text.txt", "--data-cache-path", "data"),
        *("--train-iters", str(ITERATIONS), "--save-interval", "4", "--eval-iters", "0"),
        *words,
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EP_TEST_RUN": name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail(f"no end within {TIMEOUT} s:\n{process.communicate()[0]}")
    return process.returncode, output


def losses(folder: Path, name: str) -> list[tuple[Any, ...]]:
    keys = ("iteration", "loss", "grad-norm", "learning-rate")
    lines = (folder / name / "losses.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple[Any, ...]]:
    """The losses of a run that nothing disturbs."""
    code, output = finish(start(folder, "whole"))
    assert code == 0, output
    exact = losses(folder, "whole")
    assert len(exact) == ITERATIONS
    return exact


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Return the ranks that run now, lowest first."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            found.append((int(child.environ()["RANK"]), child))
        except (psutil.Error, KeyError):
            continue
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def is_of_run(process: psutil.Process, name: str) -> bool:
    return (process.info["environ"] or {}).get("EP_TEST_RUN") == name


class Killer:
    """Kills ranks of a run, one after the other, each as soon as a condition is met."""

    def __init__(
        self, process: "subprocess.Popen[str]", moments: list[tuple[int, Callable[[], bool]]]
    ) -> None:
        self.num_killed = 0
        self._process, self._moments = process, moments
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for rank, is_time in self._moments:
            while not is_time():
                if self._process.poll() is not None:
                    return
                time.sleep(0.001)
            ranks = workers(self._process)
            if rank < len(ranks):
                ranks[rank].kill()
                self.num_killed += 1
                ranks[rank].wait()


def test_ranks_killed_at_random_and_in_a_checkpoint_end_with_the_same_losses(
    folder: Path, whole: list[tuple[Any, ...]]
) -> None:
    run = folder / "killed"

    def has_trained(iterations: int) -> Callable[[], bool]:
        path = run / "losses.jsonl"
        return lambda: path.exists() and f'"iteration": {iterations},' in path.read_text()

    rng = random.Random()
    at = [rng.randint(5, 10), rng.randint(17, 22)]
    moments = [
        (rng.randrange(2), has_trained(at[0])),
        (0, lambda: bool(list(run.glob("checkpoints/.iter_0000016/*")))),  # being written
        (rng.randrange(2), has_trained(at[1])),
    ]
    process = start(folder, "killed", restarts=3)
    killer = Killer(process, moments)
    code, output = finish(process)
    assert code == 0, output
    assert killer.num_killed == 3, (at, output)
    assert output.count("resumed from killed/checkpoints/iter_00000") == 3, output
    assert losses(folder, "killed") == whole, at
    # Nobody is left behind by the ranks that were killed, not even by the one that was saving.
    assert not [p for p in psutil.process_iter(["environ"]) if is_of_run(p, "killed")]


WHOLE = "to be a whole checkpoint of this model"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda save: cut(save / "iter_0000024/common.pt"),
            ["resume: expected", "iter_0000024", "whole"],
        ),
        (
            lambda save: scramble(save / "iter_0000024/.metadata"),
            ["resume: expected", "whole checkpoint"],
        ),
        (
            lambda save: cut(next((save / "iter_0000024").glob("*.distcp"))),
            ["resume: expected", "whole"],
        ),
    ],
    ids=["a cut file", "a scrambled index", "a cut shard"],
)
@pytest.mark.usefixtures("whole")
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[Path], None], words: list[str], folder: Path
) -> None:
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "damaged")
    damage(folder / "damaged/checkpoints")
    command = [
        *(sys.executable, "-m", "ep_megatron.cli", "pretrain", "--resume"),
        *("--config", str(EXAMPLES / "ci.yaml"), "--run-dir", "damaged"),
        *("--text-path", "text.txt", "--data-cache-path", "data"),
        *("--train-iters", "28", "--eval-iters", "0"),
    ]
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    # torch logs what it could not read before; the run itself ends with one line.
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: "), output
    for word in words:
        assert word in last, output
