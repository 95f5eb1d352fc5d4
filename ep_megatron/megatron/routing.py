"""From Megatron's routing map to the top-k slots that dispatch takes: local tensor math.

Shape letters: T tokens, E experts, K top-k.
"""

import numpy as np
import torch
from torch import Tensor


def select_slots(routing_map: Tensor, probs: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    """List each token's experts, ascending, with their probabilities.

    The map alone decides: an expert routed to with probability 0 keeps its slot, a token whose
    experts were dropped (capacity factor) has slots of -1 and weight 0. Not collective.
    Differentiable in `probs`; entries outside the map get gradient 0. On CUDA the host is not
    synchronised, so a token with more than K experts is not noticed there and keeps its first K.

    Args:
        routing_map: `[T, E]` bool, at most K experts per token.
        probs: `[T, E]` floating point.
        num_topk: K.

    Returns:
        topk_idx: `[T, K]` int64, ascending expert indices, then -1.
        topk_weights: `[T, K]` float64 for float64 `probs`, else float32.

    Raises:
        ValueError: on a CPU, if a token has more than K experts.
    """
    is_cpu = routing_map.device.type == "cpu"
    find_slots = _slots_on_cpu if is_cpu else _slots_without_sync
    topk_idx, are_all_used = find_slots(routing_map, num_topk)
    weight_dtype = torch.float64 if probs.dtype == torch.float64 else torch.float32
    if are_all_used:
        return topk_idx, probs.gather(1, topk_idx).to(weight_dtype)
    weights = probs.gather(1, topk_idx.clamp(min=0)).masked_fill(topk_idx < 0, 0)
    return topk_idx, weights.to(weight_dtype)


def _slots_on_cpu(routing_map: Tensor, num_topk: int) -> tuple[Tensor, bool]:
    # numpy scans a bool array for true entries three times faster than Tensor.nonzero and ten times
    # faster than torch.topk.
    num_tokens, num_experts = routing_map.shape
    picks = np.flatnonzero(routing_map.numpy())
    if picks.size == num_tokens * num_topk:
        topk_idx = picks.reshape(num_tokens, num_topk)
        topk_idx = topk_idx - np.arange(0, num_tokens * num_experts, num_experts)[:, None]
        if picks.size == 0 or (topk_idx.min() >= 0 and topk_idx.max() < num_experts):
            return torch.from_numpy(topk_idx), True
    tokens, experts = np.divmod(picks, num_experts)
    num_picks = np.bincount(tokens, minlength=num_tokens)
    if num_picks.max(initial=0) > num_topk:
        raise ValueError(
            f"select_slots: expected routing_map to have at most {num_topk} (moe_router_topk) "
            f"experts per token, got {num_picks.max()} for token {num_picks.argmax()}; "
            "give a router that picks no more"
        )
    slots = np.arange(picks.size) - (np.cumsum(num_picks) - num_picks)[tokens]
    ragged = np.full((num_tokens, num_topk), -1, dtype=np.int64)
    ragged[tokens, slots] = experts
    return torch.from_numpy(ragged), False


def _slots_without_sync(routing_map: Tensor, num_topk: int) -> tuple[Tensor, bool]:
    # A distinct key for every routed expert, larger for smaller indices, and 0 elsewhere: topk then
    # has no ties to break among the routed ones, whatever the device.
    num_experts = routing_map.shape[1]
    keys = num_experts - torch.arange(num_experts, dtype=torch.int32, device=routing_map.device)
    largest = torch.topk(torch.where(routing_map, keys, 0), num_topk, dim=1).values.long()
    return torch.where(largest > 0, num_experts - largest, -1), False


def repeat_for_tensor_parallel(
    topk_idx: Tensor, topk_weights: Tensor, num_local_experts: int, tp_size: int
) -> tuple[Tensor, Tensor]:
    """Send every slot to all ranks that hold a shard of its expert.

    In the tensor x expert parallel group, rank `ep_rank * tp_size + tp_rank` holds shard `tp_rank`
    of the experts of `ep_rank`, and expert e of that rank counts as expert
    `rank * num_local_experts + e % num_local_experts`. Not collective. Differentiable in
    `topk_weights`: the shards' gradients are summed.

    Args:
        topk_idx: `[T, K]` int64, -1 for unused slots.
        topk_weights: `[T, K]` floating point.
        num_local_experts: experts on each rank.
        tp_size: shards of each expert.

    Returns:
        topk_idx: `[T, K * tp_size]` int64, -1 for unused slots.
        topk_weights: `[T, K * tp_size]`, the dtype of the argument.
    """
    if tp_size == 1:
        return topk_idx, topk_weights
    ep_rank = torch.div(topk_idx, num_local_experts, rounding_mode="floor")
    first = topk_idx + ep_rank * ((tp_size - 1) * num_local_experts)
    shards = torch.arange(tp_size, device=topk_idx.device) * num_local_experts
    expanded = (first.unsqueeze(-1) + shards).masked_fill((topk_idx < 0).unsqueeze(-1), -1)
    weights = topk_weights.unsqueeze(-1).expand(-1, -1, tp_size)
    return expanded.flatten(1), weights.flatten(1)
