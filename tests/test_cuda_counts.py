"""What is counted of dispatch and combine is what the protocol says must move, to the byte."""

import pytest

from ep_megatron.config import BufferConfig
from tests.routing import Case

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.counts import Shape, combine, counted, dispatch, tables
from tests.cuda.emulated import Ranks

CASE = Case("counts", (9, 4, 7), num_topk=4, experts_per_rank=2, hidden=264, style="holes")


@pytest.mark.parametrize("expand", [False, True], ids=["by_rank", "by_expert"])
def test_rows_cross_nvlink_once_and_no_block_waits(expand: bool) -> None:
    ranks = Ranks(CASE.num_ranks, config=BufferConfig(timeout=1e9, num_sms=2))
    shape, num_tokens, row_bytes = Shape.of(CASE), sum(CASE.num_tokens), 2 * CASE.hidden
    sent, received = counted(ranks, dispatch, CASE, expand, None)
    back, _ = counted(ranks, combine, received)
    away = round((shape.ranks - shape.ranks_own) * num_tokens)
    slots_away = round((shape.slots - shape.slots_own) * num_tokens)
    # Weights and links; weights and expert ids.
    beside = slots_away * (4 + 8) if expand else away * CASE.num_topk * (8 + 4)
    assert sent.peer_bytes == away * row_bytes + beside
    assert back.peer_bytes == (slots_away if expand else away) * row_bytes
    assert (sent.launches, sent.waits, sent.barriers) == (6 if expand else 5, 2, 0)
    assert (back.launches, back.waits, back.barriers) == (3, 2, 0)


def test_reduced_rows_cross_once_per_rank() -> None:
    config = BufferConfig(timeout=1e9, num_sms=2, reduce_before_combine=True)
    ranks = Ranks(CASE.num_ranks, config=config)
    shape, num_tokens, row_bytes = Shape.of(CASE), sum(CASE.num_tokens), 2 * CASE.hidden
    _, received = counted(ranks, dispatch, CASE, True, None)
    back, _ = counted(ranks, combine, received)
    assert back.peer_bytes == round((shape.ranks - shape.ranks_own) * num_tokens) * row_bytes
    assert (back.launches, back.waits, back.barriers) == (4, 2, 0)


def test_the_tables_name_all_three() -> None:
    case = Case("table", (4, 4), num_topk=2, experts_per_rank=2, hidden=256)
    text = "\n".join(tables(case, num_sms=1))
    for name in ("ep_megatron", "DeepEP V1", "DeepEP V2"):
        assert text.count(f"| {name} |") == 6
