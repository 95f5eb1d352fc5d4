"""The wrapper around Megatron-LM's training scripts, each in processes of its own."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not importlib.util.find_spec("megatron"), reason="needs megatron-core"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA"),
]
ROOT = Path(__file__).parent.parent
WRAPPER = ["-m", "ep_megatron.megatron.pretrain_gpt"]
SCRIPT = ROOT / "tests/megatron_lm_script.py"
TRAINING = (
    importlib.util.find_spec("megatron.training") if importlib.util.find_spec("megatron") else None
)
needs_training = pytest.mark.skipif(
    TRAINING is None,
    reason="needs megatron.training: megatron-core 0.19, which needs Python 3.12",
)


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=240,
    )


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the two names of megatron.training that the wrapper touches."""
    _write(
        tmp_path / "megatron/training/training.py",
        "def initialize_megatron(allow_no_cuda=False):\n    return allow_no_cuda\n",
    )
    return tmp_path


@pytest.mark.skipif(TRAINING is not None, reason="megatron.training is installed")
def test_script_runs_as_main_with_its_own_flags_folder_and_plugin(checkout: Path) -> None:
    _write(checkout / "beside.py", "NAME = 'beside'\n")
    script = _write(
        checkout / "script.py",
        """
import argparse, sys
import beside
import megatron.training.training as training
import torch
import torch.distributed as dist
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--moe-token-dispatcher-type", choices=["allgather", "alltoall", "flex"])
    parser.add_argument("--rest", nargs="*")
    options = parser.parse_args()
    dist.init_process_group("nccl", init_method="file://" + sys.argv[0] + ".store", rank=0,
                            world_size=1, device_id=torch.device("cuda:0"))
    dist.barrier(device_ids=[0])
    print("RESULT", beside.NAME, options.moe_token_dispatcher_type, options.rest, sys.argv[0],
          training.initialize_megatron(), dist.get_backend(), torch.cuda.device_count())
""",
    )
    flags = ["--moe-token-dispatcher-type", "deepep", "--rest", "a", "b"]
    done = _run(*WRAPPER, script, *flags, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert f"RESULT beside deepep ['a', 'b'] {script} True gloo 1" in done.stdout
    assert "no CUDA device: training on the CPU, over gloo" in done.stderr


@pytest.mark.skipif(TRAINING is not None, reason="megatron.training is installed")
def test_a_spawned_process_does_not_train_again(checkout: Path) -> None:
    script = _write(
        checkout / "script.py",
        """
import multiprocessing, os
print("IMPORTED", __name__, flush=True)
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Manager() as manager:
        print("MANAGED", manager.list([1, 2]), flush=True)
""",
    )
    done = _run(*WRAPPER, script, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("IMPORTED __main__") == 1
    assert done.stdout.count("MANAGED [1, 2]") == 1


@pytest.mark.skipif(TRAINING is not None, reason="megatron.training is installed")
def test_a_missing_megatron_training_is_said(tmp_path: Path) -> None:
    done = _run(*WRAPPER, _write(tmp_path / "script.py", ""), cwd=tmp_path)
    assert done.returncode == 1
    assert "expected megatron.training beside the script or installed" in done.stderr


def test_a_missing_script_is_said(tmp_path: Path) -> None:
    done = _run(*WRAPPER, "nowhere.py", "--num-layers", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "expected script to be a file, got nowhere.py" in done.stderr


FLAGS = shlex.split("""
--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 4
--lr 1e-3 --min-lr 1e-4 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 48
--expert-model-parallel-size 2 --swiglu --normalization RMSNorm --disable-bias-linear
--untie-embeddings-and-output-weights --position-embedding-type rope
--tokenizer-type NullTokenizer --vocab-size 127 --mock-data --log-interval 1
--eval-iters 0 --eval-interval 1000 --distributed-backend gloo --transformer-impl local
--use-cpu-initialization --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
--rerun-mode disabled --no-check-for-nan-in-loss-and-grad --num-workers 0
""")


@needs_training
def test_megatrons_parser_refuses_deepep_without_the_wrapper(tmp_path: Path) -> None:
    done = _run(SCRIPT, *FLAGS, "--moe-token-dispatcher-type", "deepep", cwd=tmp_path)
    assert done.returncode == 2
    assert "argument --moe-token-dispatcher-type: invalid choice: 'deepep'" in done.stderr


@needs_training
def test_megatrons_training_loop_prints_the_losses_of_alltoall(tmp_path: Path) -> None:
    losses = []
    for dispatcher in ("deepep", "alltoall"):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script: list[str | Path] = [*WRAPPER, "--ep-backend", "process_group", SCRIPT, *FLAGS]
        saving: list[str | Path] = [
            "--save",
            tmp_path / dispatcher,
            "--save-interval",
            "2",
            "--ckpt-format",
            "torch_dist",
        ]
        done = _run(
            *launch, *script, *saving, "--moe-token-dispatcher-type", dispatcher, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(re.findall(r"lm loss: (\S+)", done.stdout))
        assert (tmp_path / dispatcher / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert float(losses[0][-1]) < float(losses[0][0])
