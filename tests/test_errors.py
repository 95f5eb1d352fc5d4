"""Bad input raises the same way on every rank, at once, and the Buffer goes on."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.config import MIB
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import BACKENDS, buffer_of, send

CASE = Case("errors", (6, 5), hidden=64)


def arguments(rank: int) -> dict[str, Any]:
    return {
        "x": CASE.x(rank, torch.bfloat16),
        "topk_idx": CASE.topk_idx(rank),
        "topk_weights": CASE.weights(rank),
        "num_experts": CASE.num_experts,
    }


def out_of_range(a: dict[str, Any]) -> None:
    a["topk_idx"][2, 1] = 99


def below_range(a: dict[str, Any]) -> None:
    a["topk_idx"][2, 1] = -2


def wrong_idx_dtype(a: dict[str, Any]) -> None:
    a["topk_idx"] = a["topk_idx"].float()


def wrong_length(a: dict[str, Any]) -> None:
    a["topk_idx"] = a["topk_idx"][:-1]


def wrong_weights_shape(a: dict[str, Any]) -> None:
    a["topk_weights"] = a["topk_weights"][:, :-1]


def wrong_weights_dtype(a: dict[str, Any]) -> None:
    a["topk_weights"] = a["topk_weights"].bfloat16()


def wrong_device(a: dict[str, Any]) -> None:
    a["topk_weights"] = a["topk_weights"].to("meta")


def three_dimensions(a: dict[str, Any]) -> None:
    a["x"] = a["x"][None]


def odd_row(a: dict[str, Any]) -> None:
    a["x"] = a["x"][:, :3]


def no_tensor(a: dict[str, Any]) -> None:
    a["x"] = [1, 2, 3]


def no_routing(a: dict[str, Any]) -> None:
    a["topk_idx"] = None


def uneven_experts(a: dict[str, Any]) -> None:
    a["num_experts"] = 7


def no_alignment(a: dict[str, Any]) -> None:
    a["expert_alignment"] = 0


ONE_RANK_WRONG = [
    (out_of_range, r"expected topk_idx to be in \[0, 6\), or -1 .* got 99"),
    (below_range, r"expected topk_idx to be in \[0, 6\), or -1 .* got -2"),
    (wrong_idx_dtype, "expected topk_idx to be int64 or int32, got float32"),
    (wrong_length, r"expected x to be \[4, hidden\], got \[5, 64\]"),
    (wrong_weights_shape, r"expected topk_weights to be \[5, 3\], got \[5, 2\]"),
    (wrong_weights_dtype, "expected topk_weights to be float32 or float64, got bfloat16"),
    (wrong_device, "expected topk_weights to be on cpu like x, got meta"),
    (three_dimensions, r"expected x to be \[5, hidden\], got \[1, 5, 64\]"),
    (odd_row, "expected the row size of x to be a multiple of 16 bytes, got 3 x 2 bytes"),
    (no_tensor, "expected x to be a tensor, got list"),
    (no_routing, "expected topk_idx or a handle, got None"),
    (uneven_experts, "expected num_experts to be a multiple of 2 .* got 7"),
    (no_alignment, "expected expert_alignment to be from 1 to 1048576, got 0"),
]


def other_hidden(a: dict[str, Any]) -> None:
    a["x"] = a["x"][:, :32]


def other_dtype(a: dict[str, Any]) -> None:
    a["x"] = a["x"].float()


def other_experts(a: dict[str, Any]) -> None:
    a["num_experts"] = 8


def other_idx_dtype(a: dict[str, Any]) -> None:
    a["topk_idx"] = a["topk_idx"].int()


def other_order(a: dict[str, Any]) -> None:
    a["expand"] = True


def no_weights(a: dict[str, Any]) -> None:
    a["topk_weights"] = None


RANKS_DISAGREE = [
    (other_hidden, "expected hidden to be the same on all ranks, got 64 on rank 0 and 32 on"),
    (other_dtype, "the dtype of x to be the same on all ranks, got bfloat16 on rank 0 and float32"),
    (other_experts, "num_experts to be the same on all ranks, got 6 on rank 0 and 8 on rank 1"),
    (other_idx_dtype, "the dtype of topk_idx .* got int64 on rank 0 and int32 on rank 1"),
    (other_order, "expected expand to be the same on all ranks, got False on rank 0 and True"),
    (no_weights, "the dtype of topk_weights .* got float32 on rank 0 and None on rank 1"),
]


def check_goes_on(rank: int, buffer: Buffer) -> None:
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.float32)
    used = (CASE.topk_idx(rank) >= 0).sum(1, keepdim=True)
    combined = buffer.combine(recv_x, handle)[0]
    torch.testing.assert_close(combined, CASE.x(rank, torch.float32) * used)


def check_one_rank_wrong(
    rank: int, backend: str, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    buffer = buffer_of(backend)
    wanted = arguments(rank)
    if rank == 1:
        spoil(wanted)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as raised:
        buffer.dispatch(**wanted)
    assert time.monotonic() - start < 10
    assert rank == 1 or "rank 1: " in str(raised.value)
    check_goes_on(rank, buffer)


def check_ranks_disagree(
    rank: int, backend: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    buffer = buffer_of(backend)
    wanted = arguments(rank)
    if rank == 1:
        change(wanted)
    with pytest.raises(ValueError, match=message):
        buffer.dispatch(**wanted)
    check_goes_on(rank, buffer)


def check_handles(rank: int, backend: str) -> None:
    """Handles of other routings, rows of other shapes, other operations."""
    buffer = buffer_of(backend)
    first_x, _, _, first = send(buffer, CASE, rank, True, torch.float32)
    other_case = Case("other", (9, 2), hidden=64)
    _, _, _, second = send(buffer, other_case, rank, True, torch.float32)
    with pytest.raises(ValueError, match=r"expected the handle \(number of the dispatch"):
        buffer.combine(
            first_x if rank == 0 else torch.zeros(second.num_recv_rows, 64),
            first if rank == 0 else second,
        )
    with pytest.raises(ValueError, match=r"expected x to be \[\d+, hidden\]|no rank went on"):
        buffer.combine(first_x if rank == 0 else first_x[:-1], first)
    with pytest.raises(ValueError, match=r"expected x to be one of bfloat16, .* got int32"):
        buffer.combine(first_x.int(), first)
    with pytest.raises(ValueError, match="expected handle to be a DispatchHandle, got NoneType"):
        buffer.combine(first_x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected bias to be float32"):
        buffer.combine(first_x, first, bias=torch.zeros(first.num_tokens, 32))
    with pytest.raises(ValueError, match="expected topk_idx to be None"):
        buffer.dispatch(CASE.x(rank, torch.float32), first, topk_idx=CASE.topk_idx(rank))
    x = CASE.x(rank, torch.float32)
    with pytest.raises(ValueError, match=r"the operation .* got combine on rank 0 and cached"):
        buffer.combine(first_x, first) if rank == 0 else buffer.dispatch(x, first)
    check_goes_on(rank, buffer)


def check_not_there(rank: int) -> None:
    buffer = buffer_of("shared_memory")
    with pytest.raises(NotImplementedError, match="get_local_buffer_tensor"):
        buffer.get_local_buffer_tensor(torch.uint8)
    with pytest.raises(ValueError, match="low_latency_mode=True"):
        buffer.clean_low_latency_buffer(8, 128, 4)


def check_arena_is_full(rank: int) -> None:
    """A rank whose memory does not suffice says so on every rank, and smaller calls go on."""
    assert dist.group.WORLD is not None
    config = BufferConfig(backend="shared_memory", timeout=30, initial_bytes=0, max_bytes=4 * MIB)
    buffer = Buffer(dist.group.WORLD, config=config)
    case = Case("large", (2000, 1500), hidden=1024, style="first_rank", experts_per_rank=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="dispatch: expected room for all rows, got rank 0"):
            send(buffer, case, rank, False, torch.float32)
        check_goes_on(rank, buffer)
    small = Case("small", (200, 150), hidden=1024, style="first_rank", experts_per_rank=2)
    recv_x, _, _, handle = send(buffer, small, rank, False, torch.float32)
    rows = torch.ones(handle.num_recv_rows, 1024, dtype=torch.float64)
    assert recv_x.shape == rows.shape
    with pytest.raises(RuntimeError, match="combine: expected room for all rows, got rank 0"):
        buffer.combine(rows, handle)
    del recv_x
    check_goes_on(rank, buffer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("spoil", "message"), ONE_RANK_WRONG, ids=[s.__name__ for s, _ in ONE_RANK_WRONG]
)
def test_one_wrong_rank_raises_on_all(backend: str, spoil: Any, message: str) -> None:
    run_on_ranks(2, check_one_rank_wrong, backend, spoil, message)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"), RANKS_DISAGREE, ids=[c.__name__ for c, _ in RANKS_DISAGREE]
)
def test_disagreeing_ranks_are_named(backend: str, change: Any, message: str) -> None:
    run_on_ranks(2, check_ranks_disagree, backend, change, message)


@pytest.mark.parametrize("backend", BACKENDS)
def test_handles_and_rows_are_checked(backend: str) -> None:
    run_on_ranks(2, check_handles, backend)


def test_what_is_not_there_says_so() -> None:
    run_on_ranks(2, check_not_there)


def test_a_full_arena_is_an_error_on_every_rank() -> None:
    run_on_ranks(2, check_arena_is_full)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "nccl"}, "expected backend to be one of auto, .* got 'nccl'"),
        ({"timeout": 0}, "expected timeout to be a positive"),
        ({"num_threads": 0}, "expected num_threads to be at least 1, got 0"),
        ({"max_bytes": -1}, "expected max_bytes to be a number of bytes >= 0, got -1"),
        ({"shm_dir": "/nowhere"}, "expected shm_dir to be an existing folder"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_config_is_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BufferConfig(**wrong)
