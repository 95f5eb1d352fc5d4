"""Dispatch and combine over NVSHMEM give the bits of the `hierarchical` backend. See README.md.

On one machine the GPUs play two hosts: NVSHMEM then moves rows over NVLink, by the same calls.
`tests.gpu.two_nodes` does this on two machines.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.two_nodes import case_of, compare
from tests.ranks import run_on_ranks

NUM_RANKS = 4
HAS_GPUS = torch.cuda.device_count() >= NUM_RANKS


def check(rank: int, layout: str) -> None:
    torch.cuda.set_device(rank)
    compare(rank, case_of(NUM_RANKS), layout[rank])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPUS, reason="needs four CUDA GPUs")
@pytest.mark.skipif(
    importlib.util.find_spec("ep_megatron._nvshmem") is None, reason="built without NVSHMEM"
)
@pytest.mark.parametrize("layout", ["AABB", "ABBA"])
def test_rows_cross_by_nvshmem(layout: str) -> None:
    run_on_ranks(NUM_RANKS, check, layout)


@pytest.mark.parametrize("module", ["bench", "two_nodes"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs: nothing is missing")
def test_without_gpus_a_program_ends_with_the_reason(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.gpu.{module}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"{module}: needs a CUDA GPU and driver, found none"
