"""Debugging: a row that comes changed is named with its source and its token."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.backends.checked import CheckedBackend, hash_rows
from tests.ranks import run_on_ranks
from tests.routing import Case, expected_rows
from tests.test_dispatch import send

CASE = Case("checked", (40, 30, 20), hidden=64, alignment=4)


def make_buffer(rank: int, backend: str) -> Buffer:
    config = BufferConfig(backend=backend, timeout=60, host_id=f"host {rank % 2}", check_rows=True)
    return Buffer(dist.group.WORLD, config=config)


def pass_whole_rows(rank: int, backend: str) -> None:
    buffer = make_buffer(rank, backend)
    for expand in (True, False):
        for dtype in (torch.bfloat16, torch.float64):
            recv_x, _, _, handle = send(buffer, CASE, rank, expand, dtype)
            again = buffer.dispatch(CASE.x(rank, dtype), handle=handle, async_finish=True)
            again[5].current_stream_wait()
            assert torch.equal(recv_x, again[0])  # type: ignore[arg-type]
            used = (CASE.topk_idx(rank) >= 0).sum(1, keepdim=True)
            if dtype == torch.float64 and expand:
                combined = buffer.combine(recv_x, handle)[0]
                torch.testing.assert_close(combined, CASE.x(rank, dtype) * used)
    quantised = torch.ones(CASE.num_tokens[rank], 64, dtype=torch.float8_e4m3fn)
    scales = torch.rand(CASE.num_tokens[rank], 1)
    pair = buffer.dispatch(
        (quantised, scales), topk_idx=CASE.topk_idx(rank), num_experts=CASE.num_experts
    )[0]
    assert isinstance(pair, tuple)


def change_a_row(rank: int, backend: str) -> str:
    """One bit of row 7 on rank 2 flips on its way; the other ranks see nothing."""
    buffer = make_buffer(rank, backend)
    checked: Any = buffer._backend
    assert isinstance(checked, CheckedBackend)
    inner: Any = checked._inner
    if rank == 2:
        dispatch = inner.dispatch

        def spoil(*arguments: Any) -> Any:
            received, handle = dispatch(*arguments)
            x = received.x.clone()
            x.view(torch.uint8)[7, 5] ^= 1
            return replace(received, x=x), handle

        inner.dispatch = spoil
    try:
        send(buffer, CASE, rank, True, torch.float32)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("backend", ["shared_memory", "process_group", "hierarchical"])
def test_whole_rows_pass(backend: str) -> None:
    run_on_ranks(3, pass_whole_rows, backend)


@pytest.mark.parametrize("backend", ["shared_memory", "process_group", "hierarchical"])
def test_a_changed_row_is_named(backend: str) -> None:
    answers = run_on_ranks(3, change_a_row, backend)
    assert answers[:2] == ["", ""]
    row = expected_rows(CASE, 2, True).rows[7]
    assert row is not None
    found = re.search(r"row 7 on rank 2 to be as rank (\d) sent it \(token (\d+)\)", answers[2])
    assert found is not None, answers[2]
    assert (int(found[1]), int(found[2])) == row[:2]
    assert "1 of " in answers[2]


def test_any_changed_bit_changes_the_hash() -> None:
    x = torch.randn(1, 24)
    whole = hash_rows(x)
    for bit in range(24 * 32):
        changed = x.clone()
        changed.view(torch.uint8)[0, bit // 8] ^= 1 << bit % 8
        assert hash_rows(changed) != whole
