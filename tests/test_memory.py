"""The arena: views live as long as their tensors, memory comes back, nothing is left behind."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.backends.shared_memory import SharedMemoryBackend
from ep_megatron.config import MIB
from tests.ranks import run_on_ranks
from tests.routing import Case
from tests.test_dispatch import send

CASE = Case("memory", (300, 200), num_topk=4, hidden=1024)


def make_buffer(**settings: object) -> tuple[Buffer, SharedMemoryBackend]:
    assert dist.group.WORLD is not None
    config = BufferConfig(backend="shared_memory", timeout=30, **settings)  # type: ignore[arg-type]
    buffer = Buffer(dist.group.WORLD, config=config)
    assert isinstance(buffer._backend, SharedMemoryBackend)
    return buffer, buffer._backend


def segments() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"ep_megatron.*.{os.getpid()}.*")]


def check_views_keep_their_rows(rank: int) -> None:
    """Tensors of many dispatches stay intact while others come, go and reuse memory."""
    buffer, backend = make_buffer(initial_bytes=0)
    kept = []
    rng = torch.Generator().manual_seed(0)  # the same choice on both ranks
    for step in range(40):
        case = Case(str(step), (50 + 7 * step, 30 + 5 * step), num_topk=3, hidden=256)
        recv_x, _, weights, handle = send(buffer, case, rank, step % 2 == 0, torch.bfloat16)
        kept.append((recv_x, recv_x.clone(), weights, weights.clone(), handle))
        combined, _, _ = buffer.combine(recv_x, handle)
        kept.append((combined, combined.clone(), combined, combined.clone(), handle))
        if torch.rand(1, generator=rng) < 0.5:
            del kept[int(torch.randint(len(kept), (1,), generator=rng))]
    for view, copy, weights, weights_copy, _ in kept:
        assert torch.equal(view, copy)
        assert torch.equal(weights, weights_copy)
    assert backend.num_bytes_in_use > 0
    kept.clear()
    del view, copy, recv_x, weights, weights_copy, combined
    gc.collect()
    check_everything_returned(rank, buffer, backend)


def check_everything_returned(rank: int, buffer: Buffer, backend: SharedMemoryBackend) -> None:
    # What a combine lends to its peers is taken back once they have posted the next call.
    small = Case("small", (2, 2), hidden=16)
    recv_x, _, weights, handle = send(buffer, small, rank, True, torch.bfloat16)
    buffer.combine(recv_x, handle)
    del recv_x, weights
    dist.barrier()
    buffer.dispatch(small.x(rank, torch.float32), topk_idx=small.topk_idx(rank), num_experts=6)
    assert backend.num_bytes_in_use == 0


def check_arena_does_not_grow(rank: int) -> None:
    """The same step again and again settles on one amount of memory."""
    buffer, backend = make_buffer(initial_bytes=0)
    committed = []
    for _ in range(12):
        recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.bfloat16)
        y = recv_x * 2  # ordinary memory: combine copies it into the arena
        combined, _, _ = buffer.combine(y, handle)
        grad, *_ = buffer.dispatch(combined, handle)
        assert isinstance(grad, torch.Tensor)
        buffer.combine(grad, handle)
        committed.append(backend.num_bytes_committed)
    assert committed[5] == committed[-1]


def check_copies_when_full(rank: int) -> None:
    """Beyond max_view_bytes rows come as ordinary tensors, and are the same rows."""
    buffer, backend = make_buffer(max_view_bytes=MIB)
    first = send(buffer, CASE, rank, True, torch.bfloat16)
    in_use = backend.num_bytes_in_use
    assert in_use == 0  # 1.6 MB or more were received
    views, _ = make_buffer()
    expected = send(views, CASE, rank, True, torch.bfloat16)
    assert torch.equal(first[0], expected[0])
    assert torch.equal(first[2], expected[2])
    combined, _, _ = buffer.combine(first[0], first[3])
    assert torch.equal(combined, views.combine(expected[0], expected[3])[0])


def check_input_is_free(rank: int) -> None:
    """Inputs may be changed, and their storage dropped, as soon as a call returns."""
    buffer, _ = make_buffer()
    expected: list[torch.Tensor] = []
    for _ in range(20):
        x, topk_idx, weights = CASE.x(rank, torch.float32), CASE.topk_idx(rank), CASE.weights(rank)
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, num_experts=CASE.num_experts, expand=True
        )
        for tensor in (x, topk_idx, weights):
            tensor.fill_(-1)
            tensor.untyped_storage().resize_(0)
        assert handle is not None
        assert isinstance(recv_x, torch.Tensor)
        combined, _, _ = buffer.combine(recv_x, handle)
        recv_x.fill_(float("nan"))  # a view of the arena: peers must have read it by now
        expected.append(combined)
        assert torch.equal(combined, expected[0])


def check_close(rank: int) -> None:
    """destroy() leaves received tensors valid; the Buffer says that it is gone."""
    buffer, _ = make_buffer()
    recv_x, _, _, handle = send(buffer, CASE, rank, True, torch.bfloat16)
    copy = recv_x.clone()
    dist.barrier()
    buffer.destroy()
    buffer.destroy()
    del buffer
    gc.collect()
    assert torch.equal(recv_x, copy)
    again, _ = make_buffer()
    *_, same = send(again, CASE, rank, True, torch.bfloat16)
    assert torch.equal(again.combine(recv_x, same)[0], again.combine(copy, same)[0])
    again.destroy()
    with pytest.raises(RuntimeError, match="got one that broke down \\(it was destroyed\\)"):
        again.combine(recv_x, handle)


def check_no_segment(rank: int) -> None:
    """The name is gone as soon as the Buffer exists, and its file is private."""
    buffer, _ = make_buffer()
    assert segments() == []
    send(buffer, CASE, rank, True, torch.bfloat16)
    assert segments() == []


def check_threads(rank: int) -> None:
    """More threads than one give the same bits."""
    results = []
    for num_threads in (1, 3):
        buffer, _ = make_buffer(num_threads=num_threads)
        recv_x, _, weights, handle = send(buffer, CASE, rank, True, torch.bfloat16)
        combined = buffer.combine(recv_x * 3, handle)[0]
        results.append((recv_x.clone(), weights.clone(), combined.clone()))
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


CHECKS = [
    check_views_keep_their_rows,
    check_arena_does_not_grow,
    check_copies_when_full,
    check_input_is_free,
    check_close,
    check_no_segment,
    check_threads,
]


@pytest.mark.parametrize("check", CHECKS, ids=[c.__name__.removeprefix("check_") for c in CHECKS])
def test_memory(check: object) -> None:
    run_on_ranks(2, check)  # type: ignore[arg-type]
