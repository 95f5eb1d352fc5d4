"""The experts of one rank as a grouped SwiGLU MLP over expert-major rows.

For users without Megatron, and for tests: the dense reference of the whole layer is here too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ep_megatron.autograd import fused_combine, fused_dispatch
from ep_megatron.buffer import Buffer


class GroupedExperts(nn.Module):
    """L SwiGLU experts: `down(silu(gate(x)) * up(x))`, each over its own block of rows.

    Args:
        num_local_experts: L.
        hidden: H, columns of the rows.
        ffn_hidden: columns inside an expert.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        ffn_hidden: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(
            torch.empty(num_local_experts, hidden, 2 * ffn_hidden, dtype=dtype)
        )
        self.down = nn.Parameter(torch.empty(num_local_experts, ffn_hidden, hidden, dtype=dtype))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(
        self, x: Tensor, num_tokens_per_expert: Sequence[int], weights: Tensor | None = None
    ) -> Tensor:
        """Run each expert over its rows.

        Args:
            x: `[N, H]` rows grouped by expert.
            num_tokens_per_expert: L numbers that sum to N.
            weights: `[N]`, multiplied to the rows before the down projection (as Megatron does, so
                that combine need not weight); None for no weighting.

        Returns:
            `[N, H]`, dtype of `x`.

        Raises:
            ValueError: if the numbers do not match the rows or the experts.
        """
        if len(num_tokens_per_expert) != len(self.down) or sum(num_tokens_per_expert) != len(x):
            raise ValueError(
                f"GroupedExperts: expected {len(self.down)} numbers with sum {len(x)}, got "
                f"{list(num_tokens_per_expert)}"
            )
        outputs = []
        start = 0
        for expert, num_rows in enumerate(num_tokens_per_expert):
            rows = slice(start, start + num_rows)
            start += num_rows
            gate, up = (x[rows] @ self.gate_up[expert]).chunk(2, dim=-1)
            inner = functional.silu(gate) * up
            if weights is not None:
                inner = inner * weights[rows, None].to(inner.dtype)
            outputs.append(inner @ self.down[expert])
        return torch.cat(outputs)


def moe_forward(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, experts: GroupedExperts, buffer: Buffer
) -> Tensor:
    """Dispatch, run the local experts, combine: a mixture-of-experts layer without its router.

    Collective; differentiable once in `x`, `topk_weights` and the experts' parameters.

    Args:
        x: `[T, H]`.
        topk_idx: `[T, K]` in `[0, ranks x L)`, -1 where a slot is unused.
        topk_weights: `[T, K]` float32 or float64.
        experts: this rank's L.
        buffer: of the expert-parallel group.

    Returns:
        `[T, H]`: each token's weighted sum over its experts.
    """
    num_experts = len(experts.down) * buffer.group_size
    rows, _, weights, handle = fused_dispatch(
        x, topk_idx, topk_weights, num_experts, buffer, expand=True
    )
    return fused_combine(experts(rows, handle.num_recv_tokens_per_expert, weights), handle, buffer)


def moe_reference(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, experts: GroupedExperts
) -> Tensor:
    """Compute the same layer with all experts here and no dispatch: the reference.

    Args: as in `moe_forward`; `experts` holds those of all ranks.
    """
    total = torch.zeros_like(x)
    for expert in range(len(experts.down)):
        counts = [len(x) if e == expert else 0 for e in range(len(experts.down))]
        for slot in range(topk_idx.shape[1]):
            weights = torch.where(topk_idx[:, slot] == expert, topk_weights[:, slot], 0)
            total = total + experts(x, counts, weights)
    return total
