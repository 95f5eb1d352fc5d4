"""What a dispatch of DeepEP's second API leaves, under its names."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron.handle import AnyHandle, DispatchHandle


@dataclass(frozen=True, eq=False, kw_only=True)
class EPHandle:
    """What a dispatch leaves for `combine` and for later dispatches; a value.

    Counts are int32 tensors on the device of `topk_idx`. Without CPU sync they are filled once the
    dispatch's event is complete, like the rows, and zero before.

    Attributes:
        do_expand: whether rows are expert-major.
        num_experts: on all ranks.
        expert_alignment: rows of each expert's block, and counts, are rounded up to it.
        num_max_tokens_per_rank: as given.
        num_sms: as given, or the class-wide number of `Buffer`.
        topk_idx: `[T, K]`, a copy unless `do_handle_copy=False`.
        num_recv_tokens_per_expert_list: rows per local expert, rounded up; empty without CPU sync.
        recv_topk_idx: `[M, K]` local experts, as the first dispatch received them.
        inner: the handle of `Buffer`; a `CapacityHandle` without CPU sync.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    recv_topk_idx: Tensor | None
    inner: AnyHandle

    @property
    def num_recv_tokens(self) -> int | None:
        """Tokens received, each counted once; None without CPU sync."""
        known = isinstance(self.inner, DispatchHandle)
        return sum(self.inner.num_recv_tokens_per_rank) if known else None

    @property
    def num_expanded_tokens(self) -> int | None:
        """Rows per local expert in all, rounded up each; None without CPU sync."""
        known = isinstance(self.inner, DispatchHandle)
        return sum(self.inner.num_recv_tokens_per_expert) if known else None

    @property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Tensor:
        """`[R]` tokens from ranks 0 to r."""
        return self._ints(self.inner.num_recv_tokens_per_rank).cumsum(0, dtype=torch.int32)

    @property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """`[L]` inclusive sums of the rounded counts; expanded, the end of a block's valid rows."""
        aligned = self._ints(self.inner.num_recv_tokens_per_expert)
        ends = aligned.cumsum(0, dtype=torch.int32)
        if not self.do_expand:
            return ends
        return ends - aligned + self.num_unaligned_recv_tokens_per_expert

    @property
    def num_unaligned_recv_tokens_per_expert(self) -> Tensor:
        """`[L]` rows per local expert."""
        return self._ints(self.inner.num_valid_tokens_per_expert)

    def _ints(self, values: Tensor | tuple[int, ...]) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.topk_idx.device)
