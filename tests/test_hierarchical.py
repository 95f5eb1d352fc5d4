"""The backend for several hosts, on hosts that are so by name only; exact rows, exact sums."""

import functools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron import Buffer, BufferConfig, DispatchHandle
from ep_megatron.backends import HOST_ID_VARIABLE, host_counts
from ep_megatron.backends.base import Routing
from ep_megatron.backends.host_plan import HostPlan
from ep_megatron.hosts import MANY_COUNTS, Hosts
from tests.ranks import run_on_ranks
from tests.routing import CASES, Case, expected_rows
from tests.test_dispatch import DTYPES, HANDLE_NUMBERS, HANDLE_TENSORS, bits, buffer_of, send
from tests.test_gradients import CASES as GRADIENT_CASES
from tests.test_gradients import check_gradients_of

# One letter per rank: its host. Even and uneven hosts, ranks in a row and interleaved.
LAYOUTS = {
    1: ["A"],
    2: ["AB", "AA"],
    3: ["ABB", "ABA", "ABC"],
    4: ["AABB", "ABBA", "AAAB"],
    5: ["AABBC"],
    8: ["AAAABBBB", "ABCABCAB"],
}


@functools.cache
def buffer_on(layout: str, is_exact: bool = False) -> Buffer:
    """One Buffer per rank process and layout of hosts."""
    assert dist.group.WORLD is not None
    config = BufferConfig(
        backend="hierarchical",
        timeout=30,
        host_id=layout[dist.get_rank()],
        float32_between_hosts=is_exact,
    )
    return Buffer(dist.group.WORLD, config=config)


def gather(tensor: Tensor) -> list[Tensor]:
    """Return every rank's tensor."""
    everyone: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(everyone, tensor)
    return everyone


def expected_sum(
    layout: str, handle: DispatchHandle, y: Tensor, biases: list[Tensor], wire: torch.dtype
) -> Tensor:
    return node_sums(layout, handle, gather(y), biases, wire)


def node_sums(
    layout: str, handle: DispatchHandle, rows: list[Tensor], biases: list[Tensor], wire: torch.dtype
) -> Tensor:
    """The sum by its definition: biases; per host its ranks' sums, rounded; rounded again.

    `handle` may be of any backend: what counts is where each token's rows are. `rows`: by rank.
    """
    y = rows[0]
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    nothing = torch.full((handle.num_tokens, y.shape[1]), -0.0, dtype=wide)
    total = nothing.clone()
    for bias in biases:
        total += bias.to(wide)
    for members in Hosts.from_ids(layout).members:
        of_host, in_host = nothing.clone(), torch.zeros(handle.num_tokens, dtype=torch.bool)
        for rank in members:
            of_rank, in_rank = nothing.clone(), torch.zeros(handle.num_tokens, dtype=torch.bool)
            for column in range(handle.num_topk):
                is_here = handle.route_rank[:, column] == rank
                places = handle.route_row[is_here, column].long()
                of_rank[is_here] += rows[rank][places].to(wide)
                in_rank |= is_here
            of_host[in_rank] += of_rank[in_rank]
            in_host |= in_rank
        total[in_host] += of_host[in_host].to(wire).to(wide)
    if not biases:
        total[handle.route_rank[:, 0] < 0] = 0
    return total.to(y.dtype)


def expected_weights(layout: str, handle: DispatchHandle, weights: Tensor) -> Tensor:
    return node_weights(layout, handle, gather(weights))


def node_weights(layout: str, handle: DispatchHandle, everyone: list[Tensor]) -> Tensor:
    """Sum weights, `[M, K]` or `[N]` per rank, host by host, by definition."""
    total = torch.zeros(handle.num_tokens, handle.num_topk, dtype=everyone[0].dtype)
    hosts = Hosts.from_ids(layout)
    for token in range(handle.num_tokens):
        by_host: dict[int, Tensor] = {}
        for rank, row, slot in handle.routes[:, token].T.tolist():
            if rank < 0:
                continue
            if handle.expand:
                total[token, slot] = everyone[rank][row]
                continue
            host, addend = hosts.host_of[rank], everyone[rank][row]
            by_host[host] = by_host[host] + addend if host in by_host else addend
        for number, host in enumerate(sorted(by_host)):
            total[token] = by_host[host] if number == 0 else total[token] + by_host[host]
    return total


def assert_same_bits(ours: object, theirs: object) -> None:
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_bits(mine, other)
        return
    assert (ours is None) == (theirs is None)
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(bits(ours), bits(theirs))


def check_bits(
    rank: int, layout: str, case: Case, dtype: torch.dtype, buffer: Buffer | None = None
) -> None:
    """Handles and rows are the process group's, sums the stated ones."""
    reference = buffer_of("process_group")
    buffer = buffer or buffer_on(layout)
    for expand in (False, True):
        ours = send(buffer, case, rank, expand, dtype)
        theirs = send(reference, case, rank, expand, dtype)
        assert_same_bits(ours[:3], theirs[:3])
        for name in HANDLE_TENSORS:
            assert torch.equal(getattr(ours[3], name), getattr(theirs[3], name)), name
        for name in HANDLE_NUMBERS:
            assert getattr(ours[3], name) == getattr(theirs[3], name), name
        sent = case.x(rank, dtype).flip(0)
        for weights in (None, case.weights(rank, torch.float64)):
            again = buffer.dispatch(sent, ours[3], topk_weights=weights)
            expected = reference.dispatch(sent, theirs[3], topk_weights=weights)
            assert_same_bits((again[0], again[2]), (expected[0], expected[2]))
        check_sums(layout, buffer, ours[3], case.x(rank, dtype))


def check_sums(layout: str, buffer: Buffer, handle: DispatchHandle, x: Tensor) -> None:
    rng = torch.Generator().manual_seed(handle.rank)
    shape = (handle.num_recv_rows, x.shape[1])
    y = torch.randn(shape, generator=rng, dtype=torch.float64).to(x.dtype)
    y.view(-1)[::7] = -0.0
    columns = shape[:1] if handle.expand else (shape[0], handle.num_topk)
    weights = torch.randn(columns, generator=rng)
    biases = [x + 1, x * 3]
    for bias in ([], biases[:1], biases):
        out, out_weights, _ = buffer.combine(
            y, handle, topk_weights=weights, bias=tuple(bias) or None
        )
        assert_same_bits(out, expected_sum(layout, handle, y, bias, y.dtype))
        assert_same_bits(out_weights, expected_weights(layout, handle, weights))


def check_large_group(rank: int, layout: str, case: Case) -> None:
    """Told only what concerns its host, a rank knows as much, and hears less."""
    everything = MANY_COUNTS
    with mock.patch.object(host_counts, "MANY_COUNTS", 0):
        check_bits(rank, layout, case, torch.bfloat16)
    plan = HostPlan(Hosts.from_ids(layout), rank, Routing(case.topk_idx(rank), case.num_experts))
    assert case.num_ranks + case.num_experts < everything
    for host, telling in zip(plan.hosts.host_of, host_counts.tellings(plan), strict=True):
        assert len(telling) == len(plan.counts)
        assert len(plan.telling(host)) < len(plan.counts)


def check_float32_between_hosts(rank: int, layout: str, case: Case) -> None:
    """The sums of hosts are not rounded: only the last addition is."""
    for dtype in (torch.bfloat16, torch.float16):
        for expand in (False, True):
            buffer = buffer_on(layout, True)
            *_, handle = send(buffer, case, rank, expand, dtype)
            rng = torch.Generator().manual_seed(rank)
            y = torch.randn(handle.num_recv_rows, case.hidden, generator=rng).to(dtype)
            bias = [case.x(rank, dtype)]
            ours = buffer.combine(y, handle, bias=bias[0])[0]
            assert_same_bits(ours, expected_sum(layout, handle, y, bias, torch.float32))


def check_groups_apart(rank: int) -> None:
    """Two groups of two ranks, on two hosts each, at the same time."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    host_id = "A" if rank < 2 else "B"
    config = BufferConfig(backend="hierarchical", timeout=30, host_id=host_id)
    buffer = Buffer(groups[rank % 2], config=config)
    case, index = Case("apart", (9 + rank % 2, 5)), rank // 2
    for expand in (False, True):
        recv_x, _, _, handle = send(buffer, case, index, expand, torch.float64)
        rows = expected_rows(case, index, expand).rows
        assert len(rows) == len(recv_x)
        for at, row in enumerate(rows):
            assert row is not None
            assert torch.equal(recv_x[at], case.x(row[0], torch.float64)[row[1]])
        if expand:
            num_used = (case.topk_idx(index) >= 0).sum(1, keepdim=True)
            combined = buffer.combine(recv_x, handle)[0]
            torch.testing.assert_close(combined, case.x(index, torch.float64) * num_used)


def check_choice(rank: int, layout: str, expected: str) -> None:
    assert dist.group.WORLD is not None
    buffer = Buffer(dist.group.WORLD, config=BufferConfig(timeout=30, host_id=layout[rank]))
    assert buffer.backend == expected
    # The environment says the same where the config says nothing.
    os.environ[HOST_ID_VARIABLE] = layout[rank]
    try:
        again = Buffer(dist.group.WORLD, config=BufferConfig(timeout=30))
    finally:
        del os.environ[HOST_ID_VARIABLE]
    assert again.backend == expected
    dist.barrier()  # a Buffer that is dropped cuts off ranks that are still setting theirs up


def check_gradients_on(rank: int, layout: str, case: Case) -> None:
    check_gradients_of(rank, buffer_on(layout), case)


def pairs(cases: list[Case]) -> list[object]:
    return [
        pytest.param(layout, case, id=f"{layout}-{case.name}")
        for case in cases
        for layout in LAYOUTS[case.num_ranks]
    ]


@pytest.mark.parametrize(("layout", "case"), pairs(CASES[:-1]))
def test_rows_and_sums_are_exact(layout: str, case: Case) -> None:
    for dtype in DTYPES:
        run_on_ranks(case.num_ranks, check_bits, layout, case, dtype)


@pytest.mark.parametrize(("layout", "case"), pairs([CASES[2], CASES[4], CASES[5]]))
def test_large_groups_are_exact(layout: str, case: Case) -> None:
    run_on_ranks(case.num_ranks, check_large_group, layout, case)


def test_rows_that_stream_are_exact() -> None:
    run_on_ranks(2, check_bits, "AB", CASES[-1], torch.bfloat16)


@pytest.mark.parametrize(("layout", "case"), pairs([CASES[2], CASES[5]]))
def test_sums_may_travel_unrounded(layout: str, case: Case) -> None:
    run_on_ranks(case.num_ranks, check_float32_between_hosts, layout, case)


@pytest.mark.parametrize(("layout", "case"), pairs(GRADIENT_CASES))
def test_gradients_are_those_of_a_dense_layer(layout: str, case: Case) -> None:
    run_on_ranks(case.num_ranks, check_gradients_on, layout, case)


@pytest.mark.parametrize(
    ("layout", "backend"),
    [("AAA", "shared_memory"), ("ABB", "hierarchical"), ("ABC", "process_group")],
)
def test_auto_takes_what_fits_the_hosts(layout: str, backend: str) -> None:
    run_on_ranks(3, check_choice, layout, backend)


def test_groups_of_some_ranks_do_not_meet() -> None:
    run_on_ranks(4, check_groups_apart)


def test_every_rank_has_one_gateway_on_every_other_host() -> None:
    for layouts in LAYOUTS.values():
        for layout in layouts:
            hosts = Hosts.from_ids(layout)
            for rank in range(len(layout)):
                for source in hosts.served_by(rank):
                    assert hosts.gateway(source, hosts.host_of[rank]) == rank
            num_pairs = sum(len(hosts.served_by(rank)) for rank in range(len(layout)))
            assert num_pairs == len(layout) * (hosts.num_hosts - 1)
