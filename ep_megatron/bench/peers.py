"""Peers and limits: gloo, MPI, and plain copies of the same bytes."""

import ctypes

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import _cpu
from ep_megatron.bench.case import Case, Step
from ep_megatron.layout import count_tokens

_CHUNK_BYTES = 1 << 20  # of the float32 reduction: what stays in the cache


class _PackedRows:
    """Buffers and index lists of one routing: a token once per destination rank, packed.

    Everything is allocated and touched once, as a careful user of `all_to_all_single` would.
    """

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.x, self.topk_idx = case, case.x(rank), case.topk_idx(rank)
        self.counts, self.order = self.count()
        received = torch.empty(case.num_ranks, dtype=torch.int32)
        dist.all_to_all_single(received, self.counts)
        self.send_splits, self.recv_splits = self.counts.tolist(), received.tolist()
        self.sent = torch.ones(len(self.order), case.hidden, dtype=torch.bfloat16)
        self.received = torch.ones(sum(self.recv_splits), case.hidden, dtype=torch.bfloat16)
        self.returned = torch.ones_like(self.sent)
        self.out = torch.ones_like(self.x)
        self.total = torch.ones(case.num_tokens, case.hidden)
        self.chunk = torch.ones(max(1, _CHUNK_BYTES // (4 * case.hidden)), case.hidden)

    def count(self) -> tuple[Tensor, Tensor]:
        """Return counts per rank, and tokens by destination rank."""
        counts = count_tokens(self.topk_idx, self.case.num_experts, self.case.num_ranks)
        return counts.num_tokens_per_rank, counts.is_token_in_rank.T.nonzero()[:, 1]

    def reduce(self) -> Tensor:
        """Sum what came back per token in float32, in ascending rank order; round once."""
        self.total.zero_()
        start = 0
        for count in self.send_splits:
            for first in range(start, start + count, len(self.chunk)):
                rows = slice(first, min(first + len(self.chunk), start + count))
                chunk = self.chunk[: rows.stop - rows.start].copy_(self.returned[rows])
                self.total.index_add_(0, self.order[rows], chunk)
            start += count
        return self.out.copy_(self.total)


def gloo(case: Case, rank: int) -> dict[str, Step]:
    """The full job over gloo's all_to_all_single, with reused buffers."""
    packed = _PackedRows(case, rank)
    received = torch.empty(case.num_ranks, dtype=torch.int32)

    def one_way_and_back(is_fresh: bool) -> Tensor:
        if is_fresh:
            packed.counts, packed.order = packed.count()
            dist.all_to_all_single(received, packed.counts)
            packed.recv_splits = received.tolist()
        torch.index_select(packed.x, 0, packed.order, out=packed.sent)
        dist.all_to_all_single(packed.received, packed.sent, packed.recv_splits, packed.send_splits)
        dist.all_to_all_single(
            packed.returned, packed.received, packed.send_splits, packed.recv_splits
        )
        return packed.reduce()

    def forward_backward() -> None:
        one_way_and_back(True)
        one_way_and_back(False)

    return {"forward": lambda: one_way_and_back(True), "forward_backward": forward_backward}


def mpi(case: Case, rank: int) -> dict[str, Step]:
    """MPI's bare Alltoallv there and back: rows come packed, nothing is counted or summed."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.Get_size() != case.num_ranks or world.Get_rank() != rank:
        raise RuntimeError("mpi: expected this process to be started by mpirun")
    packed = _PackedRows(case, rank)
    row = case.hidden * 2

    def message(tensor: Tensor, splits: list[int]) -> list[object]:
        counts = [split * row for split in splits]
        return [tensor.view(torch.uint8).numpy(), (counts, None), MPI.BYTE]

    sent = message(packed.sent, packed.send_splits)
    received = message(packed.received, packed.recv_splits)
    returned = message(packed.returned, packed.send_splits)

    def forward() -> None:
        world.Alltoallv(sent, received)
        world.Alltoallv(received, returned)

    def forward_backward() -> None:
        forward()
        forward()

    return {"forward": forward, "forward_backward": forward_backward}


def copies(case: Case, rank: int, is_streaming: bool) -> dict[str, Step]:
    """Copy as many bytes as this rank's payload, twice: what dispatch and combine must move."""
    num_bytes = case.payload_bytes() // case.num_ranks // 64 * 64
    source, target = _aligned(num_bytes), _aligned(num_bytes)
    isa = _cpu.row_kernel_names()[-1]

    def copy() -> None:
        if is_streaming:
            _cpu.copy_row(isa, target.data_ptr(), source.data_ptr(), num_bytes, True)
        else:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), num_bytes)

    def forward() -> None:
        copy()
        copy()

    def forward_backward() -> None:
        forward()
        forward()

    return {"forward": forward, "forward_backward": forward_backward}


def _aligned(num_bytes: int) -> Tensor:
    # Written, not zeroed: zeros that nobody wrote are one page that every address maps to.
    whole = torch.ones(num_bytes + 64, dtype=torch.uint8)
    return whole[-whole.data_ptr() % 64 :][:num_bytes]
