"""The plan as tensor math: worked examples, counts, and events."""

import pytest
import torch

from ep_megatron import Buffer, EventHandle, EventOverlap, _cpu
from ep_megatron.backends.base import MAX_EXPERTS
from ep_megatron.layout import (
    count_tokens,
    deduplicated_routes,
    expanded_routes,
    expert_starts,
    index_within,
)
from tests.ranks import run_on_ranks
from tests.test_dispatch import buffer_of

# Two ranks, four experts: experts 0 and 1 on rank 0, 2 and 3 on rank 1.
RANK_0 = torch.tensor([[0, 2], [1, 0], [3, 2]])
RANK_1 = torch.tensor([[2, -1], [-1, 0]])


def test_counts_by_hand() -> None:
    counts = count_tokens(RANK_0, 4, 2)
    assert counts.num_tokens_per_rank.tolist() == [2, 2]  # tokens 0 and 1; tokens 0 and 2
    assert counts.num_tokens_per_expert.tolist() == [2, 1, 2, 1]
    assert counts.is_token_in_rank.tolist() == [[True, True], [True, False], [False, True]]
    counts = count_tokens(RANK_1, 4, 2)
    assert counts.num_tokens_per_rank.tolist() == [1, 1]
    assert counts.num_tokens_per_expert.tolist() == [1, 0, 1, 0]


def test_expanded_rows_by_hand() -> None:
    per_expert = torch.tensor([[2, 1, 2, 1], [1, 0, 1, 0]])
    # Blocks: expert 0 has 3 rows (padded to 4), expert 1 has 1 (4); rank 1: 3 (4) and 1 (4).
    assert expert_starts(per_expert, 2, alignment=4).tolist() == [0, 4, 0, 4]
    routes = expanded_routes(RANK_0, 0, per_expert, alignment=4)
    assert routes.rank.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert routes.row.tolist() == [[0, 0], [4, 1], [4, 1]]
    assert routes.slot.tolist() == [[0, 1], [0, 1], [0, 1]]
    routes = expanded_routes(RANK_1, 1, per_expert, alignment=4)
    assert routes.rank.tolist() == [[1, -1], [0, -1]]
    assert routes.row.tolist() == [[2, -1], [2, -1]]  # behind rank 0's rows of the same expert
    assert routes.slot.tolist() == [[0, -1], [1, -1]]


def test_deduplicated_rows_by_hand() -> None:
    matrix = torch.tensor([[2, 2], [1, 1]])
    routes = deduplicated_routes(RANK_0, 0, count_tokens(RANK_0, 4, 2), matrix)
    assert routes.rank.tolist() == [[0, 1], [0, -1], [1, -1]]
    assert routes.row.tolist() == [[0, 0], [1, -1], [1, -1]]
    routes = deduplicated_routes(RANK_1, 1, count_tokens(RANK_1, 4, 2), matrix)
    assert routes.rank.tolist() == [[1, -1], [0, -1]]
    assert routes.row.tolist() == [[2, -1], [2, -1]]


def test_index_within_counts_equal_ones_before() -> None:
    keys = torch.tensor([2, 0, 2, -1, 2, 0, -1])
    assert index_within(keys, 3).tolist() == [0, 0, 1, -1, 2, 1, -1]
    assert index_within(keys[:0], 3).tolist() == []


def test_python_admits_what_the_compiled_part_has_room_for() -> None:
    assert MAX_EXPERTS == _cpu.MAX_EXPERTS


def check_layout(rank: int) -> None:
    buffer = buffer_of("shared_memory")
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        RANK_0, 4, previous_event=Buffer.capture(), async_finish=True
    )
    event.current_stream_wait()
    expected = count_tokens(RANK_0, 4, 2)
    assert per_node is None
    assert torch.equal(per_rank, expected.num_tokens_per_rank)
    assert torch.equal(per_expert, expected.num_tokens_per_expert)
    assert torch.equal(in_rank, expected.is_token_in_rank)
    # As DeepEP's callers do: the layout's four results and its event go on to dispatch.
    x = torch.randn(3, 16)
    weights = torch.rand(3, 2)
    recv_x, _, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=RANK_0,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    assert handle is not None
    assert counts == [4, 2]  # both ranks send the same
    with event:
        pass
    assert isinstance(recv_x, torch.Tensor)
    combined, combined_weights, event = buffer.combine(
        recv_x, handle, topk_weights=recv_weights, previous_event=EventOverlap(None)
    )
    assert event.event is None
    assert combined_weights is not None
    assert torch.equal(combined_weights, weights)
    assert torch.equal(combined, x * torch.tensor([[2.0], [1.0], [1.0]]))


def test_layout_then_dispatch_as_deepep_is_called() -> None:
    run_on_ranks(2, check_layout)


def test_an_event_is_waited_for_or_refused() -> None:
    EventOverlap(EventHandle()).current_stream_wait()
    with EventOverlap():
        pass
    with pytest.raises(ValueError, match="expected an event, got none"):
        EventOverlap().current_stream_wait()
