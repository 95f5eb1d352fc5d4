"""Two real hosts, as far as programs can tell: network, host name and /dev/shm of their own."""

import json
from collections.abc import Iterator

import pytest

from ep_megatron.bench.two_hosts import Host, HostsUnavailableError, run_ranks, two_hosts
from tests.two_hosts_ranks import BYTES_CASE, NUM_CALLS

TIMEOUT = 240


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as pair:
            yield pair
    except HostsUnavailableError as error:
        pytest.skip(str(error))


def run(hosts: tuple[Host, Host], layout: str, *roles: str) -> list[str]:
    ranks_per_host = [layout.count("A"), layout.count("B")]
    environment = {"EP_TEST_LAYOUT": layout}
    arguments = ["-m", "tests.two_hosts_ranks", *roles]
    return run_ranks(hosts, ranks_per_host, arguments, environment, TIMEOUT)


def num_rows(per_host: bool) -> list[int]:
    """Count rows from each host to the other, once per token and host, or token and rank."""
    rows = [0, 0]
    for rank in range(4):
        host = rank // 2
        for experts in BYTES_CASE.topk_idx(rank).tolist():
            ranks = {e // BYTES_CASE.experts_per_rank for e in experts if e >= 0}
            there = {r for r in ranks if r // 2 != host}
            rows[host] += bool(there) if per_host else len(there)
    return rows


def test_what_crosses_is_one_copy_per_token_and_host(hosts: tuple[Host, Host]) -> None:
    """Counted by the interfaces: rows there and back, the stated numbers beside them, headers."""
    outputs = run(hosts, "AABB", "exact", "count_bytes")
    row_bytes = 2 * BYTES_CASE.hidden
    sent = {}
    for host, output in enumerate(outputs):
        (line,) = [text for text in output.splitlines() if text.startswith("SENT")]
        sent[host] = json.loads(line.removeprefix("SENT "))
    for host in (0, 1):
        there, back = num_rows(True)[host], num_rows(True)[1 - host]
        payload = NUM_CALLS * (there + back) * row_bytes
        # Expert ids of 2 bytes and weights of 4 beside each row; what every two ranks tell each
        # other in each call, under 300 bytes here; statuses of 512 bytes.
        beside = NUM_CALLS * (there * BYTES_CASE.num_topk * 6 + 2 * 4 * 300 + 2 * 512)
        assert payload < sent[host]["hierarchical"] < 1.15 * (payload + beside) + 20_000
        copies = sum(num_rows(False)) / sum(num_rows(True))
        ratio = sent[host]["process_group"] / sent[host]["hierarchical"]
        assert copies > 1.3
        assert ratio > 0.9 * copies


def test_uneven_hosts_are_exact_and_name_a_lost_rank_on_both(hosts: tuple[Host, Host]) -> None:
    outputs = run(hosts, "ABB", "exact", "lose_a_rank")
    assert "NAMED 0" in outputs[0]
    assert "NAMED 1" in outputs[1]
