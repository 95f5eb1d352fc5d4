"""Debugging: a row that comes changed is named with its source and its token.

One bit flips in what a backend brings, or is given to bring, under the checks.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig
from ep_megatron.backends.base import Rows
from ep_megatron.backends.checked import CheckedBackend
from ep_megatron.backends.checked_packed import CheckedPacked
from ep_megatron.backends.row_hashes import hash_rows
from ep_megatron.fp8 import FP8, MXFP8, Fp8Recipe
from tests.packed_cases import PackedCase, check_packed, expected_combined, expert_output
from tests.ranks import run_on_ranks
from tests.routing import Case, expected_rows
from tests.test_dispatch import bits, send

BACKENDS = ["shared_memory", "process_group", "hierarchical"]
CASE = Case("checked", (40, 30, 20), hidden=128, alignment=4)
PACKED = PackedCase((6, 7, 8))
COLUMNS = Fp8Recipe(layout="column_major")


def make_buffer(rank: int, backend: str, *, check_rows: bool = True) -> Buffer:
    config = BufferConfig(
        backend=backend, timeout=60, host_id=f"host {rank % 2}", check_rows=check_rows
    )
    return Buffer(dist.group.WORLD, low_latency_mode=True, config=config)


def dispatch(buffer: Buffer, rank: int, expand: bool, dtype: torch.dtype, **how: Any) -> Any:
    return buffer.dispatch(
        CASE.x(rank, dtype),
        topk_idx=CASE.topk_idx(rank),
        topk_weights=CASE.weights(rank),
        num_experts=CASE.num_experts,
        expand=expand,
        expert_alignment=CASE.alignment if expand else 1,
        **how,
    )


# -- what is as it should be ----------------------------------------------------------------------


def pass_whole_rows(rank: int, backend: str) -> None:
    """Every kind of call gives the same bits as without checks."""
    checked, plain = make_buffer(rank, backend), make_buffer(rank, backend, check_rows=False)
    for expand in (True, False):
        for dtype in (torch.bfloat16, torch.float64):
            recv_x, _, weights, _, handle, _ = dispatch(checked, rank, expand, dtype)
            again = checked.dispatch(CASE.x(rank, dtype), handle=handle, async_finish=True)
            again[5].current_stream_wait()
            assert torch.equal(recv_x, again[0])  # type: ignore[arg-type]
            other = dispatch(plain, rank, expand, dtype)
            outputs = torch.randn(recv_x.shape).to(dtype)
            bias = torch.randn(CASE.num_tokens[rank], CASE.hidden).to(dtype)
            sums = checked.combine(outputs, handle, weights, bias=bias)
            expected = plain.combine(outputs, other[4], weights, bias=bias)
            for got, other_got in zip(sums[:2], expected[:2], strict=True):
                assert torch.equal(bits(got), bits(other_got))  # type: ignore[arg-type]
            checked.combine(outputs, handle, async_finish=True)[2].current_stream_wait()
        for recipe in (FP8, MXFP8, COLUMNS):
            recv_x = dispatch(checked, rank, expand, torch.float32, fp8=recipe)[0]
            assert isinstance(recv_x, tuple)
            dispatch(checked, rank, expand, torch.bfloat16, fp8=recipe, widen_to=torch.float32)
    quantised = torch.ones(CASE.num_tokens[rank], 128, dtype=torch.float8_e4m3fn)
    pair = quantised, torch.rand(CASE.num_tokens[rank], 1)
    checked.dispatch(pair, topk_idx=CASE.topk_idx(rank), num_experts=CASE.num_experts)


def pass_odd_numbers(rank: int, backend: str) -> None:
    """NaNs, infinities and zeros of both signs are no changes."""
    buffer = make_buffer(rank, backend)
    x = torch.zeros(CASE.num_tokens[rank], 128)
    for column, number in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-40)):
        x[:, column] = number
    weights = torch.full(CASE.topk_idx(rank).shape, torch.nan)
    for expand in (True, False):
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=CASE.topk_idx(rank), topk_weights=weights, num_experts=CASE.num_experts,
            expand=expand,
        )  # fmt: skip
        assert isinstance(recv_x, Tensor)
        buffer.combine(recv_x, handle)


def pass_packed_rows(rank: int, backend: str, pending: bool) -> None:
    buffer = make_buffer(rank, backend)
    for fp8 in (False, True):
        for step in (0, 1):
            idx, x = PACKED.topk_idx(rank, step), PACKED.x(rank, step)
            args = x, idx, PACKED.capacity, PACKED.num_experts
            calls = [
                buffer.low_latency_dispatch(*args, use_fp8=fp8, return_recv_hook=pending)
                for _ in range(2)
            ]
            for call in calls:
                if call[4] is not None:
                    call[4]()
            recv, _, handle, _, _ = calls[1]
            check_packed(PACKED, rank, recv, calls[1][1], handle, FP8 if fp8 else None, step)
            if fp8:
                continue
            outputs = _outputs(rank, recv)
            combined, _, hook = buffer.low_latency_combine(
                outputs, idx, PACKED.weights(rank, step), handle, return_recv_hook=pending
            )
            if hook is not None:
                hook()
            expected = expected_combined(PACKED, rank, step)
            assert torch.equal(bits(combined), bits(expected))
            buffer.low_latency_combine(
                outputs / 64, idx, PACKED.weights(rank, step), handle, use_logfmt=True
            )


def _outputs(rank: int, recv: Any) -> Tensor:
    first = rank * len(recv)
    return torch.stack([expert_output(x, first + local) for local, x in enumerate(recv)])


def disagree(rank: int, backend: str) -> None:
    """Bad arguments on one rank are an error on all, and the Buffer goes on."""
    buffer = make_buffer(rank, backend)
    for _ in range(2):
        idx = PACKED.topk_idx(rank)
        bad = torch.full_like(idx, PACKED.num_experts) if rank == 1 else idx
        with pytest.raises(ValueError, match="topk_idx"):
            buffer.low_latency_dispatch(
                PACKED.x(rank), bad, PACKED.capacity, PACKED.num_experts, use_fp8=False
            )
        with pytest.raises(ValueError, match="num_max_dispatch_tokens_per_rank"):
            buffer.low_latency_dispatch(
                PACKED.x(rank), idx, PACKED.capacity + rank, PACKED.num_experts, use_fp8=False
            )
    buffer.low_latency_dispatch(PACKED.x(rank), idx, PACKED.capacity, PACKED.num_experts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_rows_pass(backend: str) -> None:
    run_on_ranks(3, pass_whole_rows, backend)
    run_on_ranks(3, pass_odd_numbers, backend)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_whole_packed_rows_pass(backend: str) -> None:
    run_on_ranks(3, pass_packed_rows, backend, True)
    run_on_ranks(3, pass_packed_rows, backend, False)
    run_on_ranks(3, disagree, backend)


# -- what is not ----------------------------------------------------------------------------------


def flip(tensor: Tensor, row: int, byte: int = 5) -> Tensor:
    """Return a copy with one bit of row `row` flipped."""
    changed = tensor.clone()
    changed.view(torch.uint8)[row, byte] ^= 1
    return changed


def said(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def inner_of(buffer: Buffer) -> Any:
    checked: Any = buffer._backend
    assert isinstance(checked, CheckedBackend)
    return checked._inner


CHANGES = {
    "bytes": lambda rows: replace(rows, x=flip(rows.x, 7)),
    "scales": lambda rows: replace(rows, scales=flip(rows.scales, 7, 1)),
    "weights": lambda rows: replace(rows, topk_weights=rows.topk_weights * 1.001),
    "expert ids": lambda rows: replace(rows, topk_idx=rows.topk_idx.roll(1, 1)),
}


def change_what_comes(rank: int, backend: str, what: str, expand: bool, how: Any) -> str:
    """Row 7 comes changed to rank 2; the other ranks see nothing."""
    buffer = make_buffer(rank, backend)
    inner = inner_of(buffer)
    if rank == 2:
        whole = inner.dispatch

        def spoil(*arguments: Any) -> Any:
            received, handle = whole(*arguments)
            return CHANGES[what](received), handle

        inner.dispatch = spoil
    return said(lambda: dispatch(buffer, rank, expand, torch.float32, **how))


def check_named(answers: list[str], what: str, expand: bool) -> None:
    assert answers[:2] == ["", ""]
    found = re.search(
        r"row (\d+) on rank 2 to be as rank (\d) sent it \(token (\d+)\), got other (.+);",
        answers[2],
    )
    assert found is not None, answers[2]
    row = expected_rows(CASE, 2, expand).rows[int(found[1])]
    assert row is not None
    assert row[:2] == (int(found[2]), int(found[3]))
    assert what in found[4]
    if what in ("bytes", "scales"):
        assert found[1] == "7"
        assert "; 1 of " in answers[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("what", "expand", "how"),
    [
        ("bytes", True, {}),
        ("bytes", False, {}),
        ("bytes", True, {"fp8": FP8}),
        ("bytes", False, {"fp8": FP8, "widen_to": torch.bfloat16}),
        ("scales", True, {"fp8": FP8}),
        ("scales", False, {"fp8": MXFP8}),
        ("weights", True, {}),
        ("weights", False, {}),
        ("expert ids", False, {}),
    ],
)
def test_a_changed_row_is_named(backend: str, what: str, expand: bool, how: Any) -> None:
    check_named(run_on_ranks(3, change_what_comes, backend, what, expand, how), what, expand)


def change_what_goes_back(rank: int, backend: str, expand: bool) -> str:
    """Row 7 of rank 2 changes as it goes back, in every call that brings it."""
    buffer = make_buffer(rank, backend)
    inner = inner_of(buffer)
    recv_x, _, _, handle = send(buffer, CASE, rank, expand, torch.bfloat16)
    whole = inner.combine

    def spoil(rows: Rows, *arguments: Any) -> Any:
        if rank == 2 and rows.x.dtype == torch.bfloat16:
            rows = replace(rows, x=flip(rows.x, 7))
        return whole(rows, *arguments)

    inner.combine = spoil
    return said(lambda: buffer.combine(recv_x + 1, handle))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expand", [True, False])
def test_a_row_that_goes_back_changed_is_named(backend: str, expand: bool) -> None:
    answers = run_on_ranks(3, change_what_goes_back, backend, expand)
    row = expected_rows(CASE, 2, expand).rows[7]
    assert row is not None
    source, token = row[:2]
    assert [rank for rank, answer in enumerate(answers) if answer] == [source]
    expected = f"row 7 of rank 2 to come to rank {source} (token {token}) as it was sent"
    assert expected in answers[source]
    assert "; 1 of " in answers[source]


def change_a_sum(rank: int, backend: str) -> str:
    buffer = make_buffer(rank, backend)
    inner = inner_of(buffer)
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.bfloat16)
    whole = inner.combine

    def spoil(rows: Rows, *arguments: Any) -> Any:
        out, weights = whole(rows, *arguments)
        return (flip(out, 4) if len(arguments) > 1 and rank == 1 else out), weights

    inner.combine = spoil
    return said(lambda: buffer.combine(recv_x + 1, handle))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_sum_is_named(backend: str) -> None:
    answers = run_on_ranks(3, change_a_sum, backend)
    assert answers[::2] == ["", ""]
    assert re.search(r"token 4 on rank 1 to be the sum of its rows from rank \d", answers[1])
    assert "; 1 of 30 sums are wrong" in answers[1]


def change_packed(rank: int, backend: str, what: str) -> str:
    """A row comes changed to rank 2: of a dispatch, or of what experts send back."""
    buffer = make_buffer(rank, backend)
    checked: Any = buffer._low_latency
    assert isinstance(checked, CheckedPacked)
    inner, beside = checked._inner, checked._beside
    idx = PACKED.topk_idx(rank)

    def after(backend: Any, name: str, change: Callable[..., None]) -> None:
        whole = getattr(backend, name)

        def spoiled(*arguments: Any) -> None:
            whole(*arguments)
            change(*arguments)

        if rank == 2:
            setattr(backend, name, spoiled)

    def flip_first(_number: int, _call: Any, packed: Any) -> None:
        expert = int((packed.count > 0).nonzero()[0, 0])
        if what == "scales":
            packed.scales[expert, 0] *= 1.001
        else:
            packed.x[expert, :1] = flip(packed.x[expert, :1], 0)

    def flip_sum(*arguments: Any) -> None:
        out = arguments[4]
        out[3:4] = flip(out[3:4], 0)

    if what in ("bytes", "scales"):
        after(inner, "receive_dispatch", flip_first)
    fp8 = what == "scales"
    args = PACKED.x(rank), idx, PACKED.capacity, PACKED.num_experts
    if what in ("bytes", "scales"):
        return said(lambda: buffer.low_latency_dispatch(*args, use_fp8=fp8))
    recv, _, handle, _, _ = buffer.low_latency_dispatch(*args, use_fp8=fp8)
    after(*((beside, "receive_dispatch", flip_first) if what == "row back" else
            (inner, "receive_combine", flip_sum)))  # fmt: skip
    weights = PACKED.weights(rank)
    return said(lambda: buffer.low_latency_combine(_outputs(rank, recv), idx, weights, handle))


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("bytes", r"row 0 of local expert \d on rank 2 to be as rank \d sent it \(token \d\), "
         "got other bytes; 1 of "),
        ("scales", r"row 0 of local expert \d on rank 2 to be as rank \d sent it \(token \d\), "
         "got other scales; 1 of "),
        ("row back", r"the row of expert \d for token \d on rank 2 to come as rank \d sent it, "
         "got other bytes; 1 of "),
        ("sum", "token 3 on rank 2 to be the sum of its rows, got other bytes; 1 of 8 sums"),
    ],
    ids=["bytes", "scales", "row back", "sum"],
)  # fmt: skip
def test_a_changed_packed_row_is_named(backend: str, what: str, text: str) -> None:
    answers = run_on_ranks(3, change_packed, backend, what)
    assert answers[:2] == ["", ""]
    assert re.search(text, answers[2]), answers[2]


def test_any_changed_bit_changes_the_hash() -> None:
    x = torch.randn(1, 24)
    whole = hash_rows(x)
    for bit in range(24 * 32):
        changed = x.clone()
        changed.view(torch.uint8)[0, bit // 8] ^= 1 << bit % 8
        assert hash_rows(changed) != whole
