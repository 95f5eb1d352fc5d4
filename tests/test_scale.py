"""The plans for large groups: rows are those of drawn routings, the document is the command's."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ep_megatron.cli import app
from ep_megatron.scale import (
    FABRICS,
    ROW_BYTES,
    SLOT_BYTES,
    Fabric,
    Layer,
    expected_groups,
    plan,
    plans,
)
from ep_megatron.scale_routing import read_routing

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
SIZES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
SMALL = Fabric("small", 4, 1e9, 1e9)


@pytest.mark.parametrize(("items", "groups", "drawn"), [(6, 3, 2), (8, 4, 3), (8, 2, 5), (5, 5, 5)])
def test_expected_groups_are_the_mean_over_all_draws(items: int, groups: int, drawn: int) -> None:
    size = items // groups
    draws = [{i // size for i in draw} for draw in itertools.combinations(range(items), drawn)]
    mean = sum(map(len, draws)) / len(draws)
    assert expected_groups(items, groups, drawn) == pytest.approx(mean)


@pytest.mark.parametrize("max_nodes", [0, 2])
def test_bytes_are_those_of_drawn_routings(max_nodes: int) -> None:
    """Copies to other nodes, and rows that a gateway forwards, counted token by token."""
    layer = Layer(4000, 256, 3, 32, max_nodes)
    found = plan(16, layer, SMALL)
    rng = torch.Generator().manual_seed(0)
    crossing, forwarded = 0, 0
    for source in range(16):
        scores = torch.rand(4000, 32, generator=rng)
        if max_nodes:
            chosen = torch.rand(4000, 4, generator=rng).topk(max_nodes).indices
            open_nodes = torch.zeros(4000, 4).scatter_(1, chosen, 1.0)
            scores *= open_nodes.repeat_interleave(8, 1)
        ranks = torch.zeros(4000, 16).scatter_(1, scores.topk(3).indices // 2, 1.0)
        nodes = ranks.view(4000, 4, 4).amax(2)
        crossing += int(nodes.sum() - nodes[:, source // 4].sum())
        forwarded += int(ranks.sum() - ranks.view(4000, 4, 4)[:, :, source % 4].sum())
    assert found.network[0] == pytest.approx(crossing / 16 * (264 + 3 * SLOT_BYTES), rel=0.01)
    # Of the rows that the experts get, those that their own gateway has are not forwarded.
    beside = 3 * ROW_BYTES / found.ranks_per_token
    assert found.nvlink[0] == pytest.approx(forwarded / 16 * (264 + beside), rel=0.01)
    assert found.network[1] == pytest.approx(crossing / 16 * 512, rel=0.01)


def test_one_node_sends_nothing_over_the_network() -> None:
    found = plan(4, Layer(), SMALL)
    assert (found.network, found.messages, found.num_nodes) == ((0, 0), 0, 1)


@pytest.mark.parametrize("fabric", FABRICS.values(), ids=list(FABRICS))
def test_growing_groups(fabric: Fabric) -> None:
    rows = plans(SIZES, Layer(), fabric)
    for smaller, larger in itertools.pairwise(rows):
        assert larger.network[0] >= smaller.network[0]
        assert larger.ranks_per_token >= smaller.ranks_per_token
    for found in rows:
        assert found.ranks_per_token <= 8
        assert found.nodes_per_token <= min(4, found.num_nodes) + 1e-9
        assert 0 < found.dispatch[0] < found.dispatch[1]
    # They grow with the group, and no more with its square.
    assert max(found.counts_share for found in rows) < 0.01
    assert rows[-1].counts < 2.1 * rows[-2].counts
    assert rows[-1].counts < rows[-1].counts_to_all / 10


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks to be a multiple of 8, got 12"):
        plan(12, Layer(), FABRICS["h100"])
    result = CliRunner().invoke(app, ["scale", "--num-topk", "0"])
    assert result.exit_code == 1
    assert "error: scale: expected num_topk to be at least 1" in result.output


def test_a_routing_log_says_how_uneven_ranks_are(tmp_path: Path) -> None:
    log = tmp_path / "routing.jsonl"
    rows = [{"2": [3, 1], "4": [4, 0, 0, 0]}, {"2": [2, 2], "4": [1, 1, 1, 1]}, {"2": [0, 0]}]
    log.write_text(
        "".join(json.dumps({"iteration": i, "rows": r}) + "\n" for i, r in enumerate(rows))
    )
    two, four = read_routing(log)
    assert (two.num_ranks, list(two.ratios)) == (2, [1.0, 1.5])
    assert (four.num_ranks, list(four.ratios)) == (4, [1.0, 4.0])
    assert [two.quantile(share) for share in (0.5, 0.9, 1.0)] == [1.0, 1.5, 1.5]
    assert list(read_routing(log, 1)[1].ratios) == [1.0]
    with pytest.raises(ValueError, match="rows of iteration 2 or later, got none"):
        read_routing(log, 2)
    arguments = ["scale", "--routing", str(log), "--num-ranks", "8", "--fabric", "h100"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "| 4 | 2 | 1.00 | 4.00 | 4.00 | 4.00 |" in result.output
    log.write_text("[1]\n")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "error: scale: expected line 1 of" in result.output


def test_the_document_has_the_tables_of_the_command(tmp_path: Path) -> None:
    picture = tmp_path / "scale.png"
    result = CliRunner().invoke(app, ["scale", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
    text = DOCUMENT.read_text()
    tables = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(tables) == 3 * (len(SIZES) + 2)
    missing = [line for line in tables if line not in text]
    assert not missing
