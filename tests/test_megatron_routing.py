"""Routing maps to top-k slots, on the path for CPUs and on the one that never syncs the host."""

import pytest
import torch
from torch import Tensor

from ep_megatron.megatron import routing
from ep_megatron.megatron.routing import repeat_for_tensor_parallel, select_slots


def _routing(
    num_tokens: int, num_experts: int, num_topk: int, dropped: float
) -> tuple[Tensor, Tensor]:
    """A routing map and probabilities whose zeros are not where the map's are."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    top = logits.topk(num_topk, dim=1).indices
    routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter(1, top, True)
    routing_map &= torch.rand(routing_map.shape, generator=generator) >= dropped
    probs = logits.exp()
    probs[torch.rand(probs.shape, generator=generator) < 0.1] = 0
    return routing_map, probs


def _slots_one_by_one(routing_map: Tensor, probs: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    topk_idx = torch.full((len(routing_map), num_topk), -1)
    weights = torch.zeros(len(routing_map), num_topk)
    for token, row in enumerate(routing_map.tolist()):
        experts = [expert for expert, is_routed in enumerate(row) if is_routed]
        for slot, expert in enumerate(experts):
            topk_idx[token, slot] = expert
            weights[token, slot] = probs[token, expert]
    return topk_idx, weights


@pytest.fixture(params=["on a CPU", "without host sync"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without host sync":
        monkeypatch.setattr(routing, "_slots_on_cpu", routing._slots_without_sync)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_topk", "dropped"),
    [
        (50, 8, 2, 0.0),
        (50, 64, 8, 0.0),
        (50, 8, 3, 0.4),
        (7, 4, 4, 1.0),
        (0, 8, 2, 0.0),
        (9, 5, 1, 0.3),
    ],
)
def test_slots_are_the_maps_experts_in_ascending_order(
    num_tokens: int, num_experts: int, num_topk: int, dropped: float
) -> None:
    routing_map, probs = _routing(num_tokens, num_experts, num_topk, dropped)
    topk_idx, weights = select_slots(routing_map, probs, num_topk)
    expected_idx, expected_weights = _slots_one_by_one(routing_map, probs, num_topk)
    assert torch.equal(topk_idx, expected_idx)
    assert torch.equal(weights, expected_weights)
    assert topk_idx.dtype == torch.int64


def test_as_many_picks_as_slots_but_uneven_rows_are_not_mistaken_for_full_ones() -> None:
    routing_map = torch.tensor([[True, False, True, False], [False, False, False, True]])
    routing_map = torch.cat([routing_map, routing_map.flip(0)])
    topk_idx, _ = select_slots(routing_map, torch.ones(4, 4), 2)
    assert topk_idx.tolist() == [[0, 2], [3, -1], [3, -1], [0, 2]]
    uneven = torch.tensor([[True, True, True], [False, False, True]])
    with pytest.raises(ValueError, match=r"at most 2 \(moe_router_topk\).*got 3 for token 0"):
        select_slots(uneven, torch.ones(2, 3), 2)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_gradient_reaches_the_routed_probabilities_only(dropped: float) -> None:
    routing_map, probs = _routing(30, 8, 3, dropped)
    probs = probs.double().requires_grad_()
    grad = torch.randn(30, 3, dtype=torch.float64)
    topk_idx, weights = select_slots(routing_map, probs, 3)
    weights.backward(grad)
    is_used = topk_idx >= 0
    expected = torch.zeros(30, 9, dtype=torch.float64).scatter(
        1, torch.where(is_used, topk_idx, 8), torch.where(is_used, grad, 0)
    )
    assert probs.grad is not None
    assert torch.equal(probs.grad, expected[:, :8])


@pytest.mark.parametrize(
    ("given", "carried"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_carried_without_loss(given: torch.dtype, carried: torch.dtype) -> None:
    routing_map, probs = _routing(20, 8, 2, 0.0)
    probs = probs.to(given).requires_grad_()
    topk_idx, weights = select_slots(routing_map, probs, 2)
    assert weights.dtype == carried
    assert torch.equal(weights, probs.gather(1, topk_idx).to(carried))
    weights.sum().backward()
    assert probs.grad is not None
    assert probs.grad.dtype == given


def test_every_shard_of_an_expert_gets_its_slot() -> None:
    # Two experts a rank, two shards: ranks 0 and 1 hold experts 0 and 1, ranks 2 and 3 hold
    # experts 2 and 3. They count as experts 0 1 | 2 3 | 4 5 | 6 7 of the four ranks.
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]], requires_grad=True)
    topk_idx, repeated = repeat_for_tensor_parallel(torch.tensor([[1, 2], [3, -1]]), weights, 2, 2)
    assert topk_idx.tolist() == [[1, 3, 4, 6], [5, 7, -1, -1]]
    assert repeated.tolist() == [[0.25, 0.25, 0.75, 0.75], [1.0, 1.0, 0.0, 0.0]]
    repeated.backward(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
    assert weights.grad is not None
    assert weights.grad.tolist() == [[3, 7], [11, 15]]
