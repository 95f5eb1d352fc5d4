"""Arguments drawn by machine: all ranks raise alike or none, and the next call goes on."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_megatron import Buffer, BufferConfig
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import send

CASE = Case("fuzz", (5, 4), hidden=16)
HUGE = (-1, 0, 2, 7, 2**31 - 1, 2**31, 2**32 + 6, 2**62, 2**63 - 1)
DTYPES = (
    torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
VALUES = (-(2**63), -(2**31), -2, -1, 0, 5, 6, 2**31, 2**32, 2**63 - 1)


@dataclass(frozen=True)
class Spoilt:
    """One tensor, not as it should be."""

    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    strides: str = ""  # "transposed", "expanded" or "stepped"
    value: int | float | None = None  # of one element
    device: str = "cpu"

    def of(self, tensor: Tensor) -> Tensor:
        if self.shape is not None:
            tensor = torch.zeros(self.shape, dtype=tensor.dtype)
        if self.value is not None and tensor.numel():
            tensor = tensor.clone()
            if tensor.dtype.is_floating_point or isinstance(self.value, int):
                tensor.view(-1)[0] = self.value
        if self.dtype is not None:
            tensor = tensor.to(self.dtype)
        if self.strides == "transposed" and tensor.ndim == 2:
            tensor = tensor.t().contiguous().t()
        if self.strides == "expanded" and tensor.ndim == 2 and len(tensor):
            tensor = tensor[:1].expand(len(tensor), -1)
        if self.strides == "stepped" and tensor.ndim == 2:
            tensor = torch.cat([tensor, tensor], 1)[:, ::2]
        return tensor.to(self.device)


SHAPES = st.none() | st.lists(st.sampled_from([0, 1, 3, 4, 5, 16, 17, 4096]), max_size=3).map(tuple)
TENSORS = st.builds(
    Spoilt,
    dtype=st.none() | st.sampled_from(DTYPES),
    shape=SHAPES,
    strides=st.sampled_from(["", "transposed", "expanded", "stepped"]),
    value=st.none() | st.sampled_from(VALUES) | st.sampled_from([float("nan"), float("inf")]),
    device=st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "x": TENSORS,
        "topk_idx": TENSORS,
        "topk_weights": TENSORS,
        "num_experts": st.sampled_from(HUGE),
        "expert_alignment": st.sampled_from(HUGE),
        "num_worst_tokens": st.sampled_from(HUGE),
        "expand": st.booleans(),
    },
)
# What may be raised where the ranks agree and memory does not suffice for what they ask.
MEMORY = ("expected room for all rows", "rows on a rank", "not enough memory", "can't allocate")


def dispatch_spoilt(rank: int, backend: str, spoilt: list[dict[str, Any]]) -> tuple[str, str]:
    buffer = buffer_of(rank, backend)
    arguments: dict[str, Any] = {
        "x": CASE.x(rank, torch.float32),
        "topk_idx": CASE.topk_idx(rank),
        "topk_weights": CASE.weights(rank),
        "num_experts": CASE.num_experts,
    }
    for name, value in spoilt[rank].items():
        arguments[name] = value.of(arguments[name]) if isinstance(value, Spoilt) else value
    outcome = ("returned", "")
    try:
        recv_x, _, _, _, handle, _ = buffer.dispatch(**arguments)
        if isinstance(recv_x, Tensor) and recv_x.dtype == torch.float32:
            buffer.combine(recv_x, handle)
        else:
            buffer.dispatch(arguments["x"], handle=handle)
    except (ValueError, RuntimeError) as error:
        outcome = (type(error).__name__, str(error))
    send(buffer, CASE, rank, True, torch.float32)  # in step, whatever that was
    return outcome


_made: dict[str, Buffer] = {}


def buffer_of(rank: int, backend: str) -> Buffer:
    """One Buffer per process for all examples: what goes wrong in one must not reach the next."""
    if backend not in _made:
        config = BufferConfig(backend=backend, timeout=30, host_id=f"host {rank}")
        _made[backend] = Buffer(dist.group.WORLD, config=config)
    return _made[backend]


def forget_buffers(rank: int) -> None:
    _made.clear()


@pytest.mark.parametrize("backend", ["shared_memory", "process_group", "hierarchical"])
def test_all_ranks_raise_alike_and_go_on(backend: str) -> None:
    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(ARGUMENTS, ARGUMENTS, st.booleans())
    def check(first: dict[str, Any], second: dict[str, Any], are_equal: bool) -> None:
        answers = run_on_ranks(2, dispatch_spoilt, backend, [first, first if are_equal else second])
        kinds = {kind for kind, _ in answers}
        assert len(kinds) == 1, answers
        for kind, text in answers:
            if kind == "ValueError":
                assert "expected" in text or "no rank went on" in text, text
            elif kind == "RuntimeError":
                assert any(word in text for word in MEMORY), text

    try:
        check()
    finally:
        run_on_ranks(2, forget_buffers)
