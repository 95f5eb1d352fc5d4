"""The CUDA backend on real GPUs gives the bits of the process group on the CPU. See README.md."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig
from tests.ranks import run_on_ranks
from tests.routing import CASES, Case
from tests.test_dispatch import HANDLE_NUMBERS, bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and driver"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@functools.cache
def buffers(rank: int) -> tuple[Buffer, Buffer]:
    assert dist.group.WORLD is not None
    torch.cuda.set_device(rank % torch.cuda.device_count())
    config = BufferConfig(backend="cuda", timeout=30)
    return Buffer(dist.group.WORLD, config=config), Buffer(
        dist.group.WORLD, config=BufferConfig(backend="process_group", timeout=30)
    )


def same(mine: object, other: object) -> None:
    assert (mine is None) == (other is None)
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        assert torch.equal(bits(mine.cpu()), bits(other.cpu()))


def check(rank: int, case: Case, dtype: torch.dtype) -> None:
    ours, reference = buffers(rank)
    results = []
    for buffer, device in ((ours, "cuda"), (reference, "cpu")):
        for expand in (False, True):
            x, idx, weights, _, handle, _ = buffer.dispatch(
                case.x(rank, dtype).to(device),
                topk_idx=case.topk_idx(rank).to(device),
                topk_weights=case.weights(rank).to(device),
                num_experts=case.num_experts,
                expand=expand,
                expert_alignment=case.alignment,
            )
            assert handle is not None
            assert isinstance(x, Tensor)
            summed, summed_weights, _ = buffer.combine(x * 3, handle, topk_weights=weights)
            again = buffer.dispatch(case.x(rank, dtype).flip(0).to(device), handle)[0]
            numbers = [getattr(handle, name) for name in HANDLE_NUMBERS]
            results.append(
                ([x, idx, weights, handle.routes, summed, summed_weights, again], numbers)
            )
    for (mine, numbers), (other, expected) in zip(results[:2], results[2:], strict=True):
        assert numbers == expected
        for one, two in zip(mine, other, strict=True):
            same(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpus_give_the_bits_of_the_process_group(case: Case, dtype: torch.dtype) -> None:
    run_on_ranks(case.num_ranks, check, case, dtype)
