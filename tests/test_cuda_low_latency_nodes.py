"""Low-latency calls over emulated GPUs of several nodes: the definition's bits, put and signalled.

The checks are those of one node. Emulated cards bring what kernels put at any time and in any
order, but each signal behind the data of its own put; see tests/cuda/nic.py.
"""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("ep_megatron._nvshmem", reason="built without NVSHMEM")

from ep_megatron import Buffer
from tests.cuda import buffers as buffers_of_nodes
from tests.cuda import nic, packed_graphs
from tests.cuda.buffers import NodeBuffers
from tests.cuda.far import LAYOUTS, run
from tests.cuda.nic import far_ptx
from tests.packed_cases import PackedCase, expected_combined
from tests.test_cuda_low_latency import (
    bad_handles,
    be_named,
    far_values,
    mask_by_hand,
    masks,
    no_report,
    step,
    two_zero_copies,
)
from tests.test_low_latency import (
    CASES,
    RECIPES,
    check_bad_input_of,
    check_cases,
    check_hooks_of,
    check_steps_of,
    experts_rows,
)

Meet = Callable[[], object]
TIMEOUT = 0.1  # seconds of the emulated clock, which counts instructions
CASES_OF = {
    "AB": [case for case in CASES.values() if case.num_ranks == 2],
    "ABA": [case for case in CASES.values() if case.num_ranks == 3],
    **{layout: [case] for layout, case in LAYOUTS.items()},
}


@pytest.mark.parametrize("layout", CASES_OF)
def test_rows_and_sums_are_those_of_the_definition(layout: str) -> None:
    buffers = NodeBuffers(layout)
    buffers.call(check_cases, CASES_OF[layout], list(RECIPES))
    no_report(buffers)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["race", "weak"])
def test_no_order_of_puts_races_or_changes_a_bit(mode: str, seed: int) -> None:
    run("AABB", mode, seed)


def test_many_steps_out_of_step() -> None:
    buffers = NodeBuffers("ABA", 4, "race")
    buffers.call(check_steps_of, 5)
    no_report(buffers)


@pytest.mark.parametrize("mode", ["race", "weak"])
def test_hooks_zero_copies_casts_and_what_is_refused(mode: str) -> None:
    buffers = NodeBuffers("AB", 6, mode)
    for function in (check_hooks_of, two_zero_copies, far_values, bad_handles):
        buffers.call(function)
    no_report(buffers)


def test_bad_input_raises_everywhere_and_the_next_call_works() -> None:
    buffers = NodeBuffers("AB")
    buffers.call(check_bad_input_of)
    no_report(buffers)


@pytest.mark.parametrize("layout", ["ABA", "AAB"])
def test_masks_by_hand(layout: str) -> None:
    buffers = NodeBuffers(layout, enable_shrink=True)
    found = buffers.call(mask_by_hand, threading.Barrier(3).wait)
    assert found == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    no_report(buffers)


@pytest.mark.parametrize(
    ("layout", "mode", "how"),
    [("AB", "weak", "hooks"), ("ABA", "race", "zero_copy"), ("AABB", "race", "odd")],
)
def test_calls_are_replayed_with_other_tokens(layout: str, mode: str, how: str) -> None:
    packed_graphs.run(NodeBuffers(layout, 3, mode), "bf16", how)


def test_masks_change_between_replays() -> None:
    packed_graphs.run_masked(NodeBuffers("ABA", 2, "race", enable_shrink=True))


def stay_away(rank: int, buffer: Buffer, all_meet: Meet, others_meet: Meet) -> list[int]:
    """Ranks begin their steps together: one that waits in vain makes the emulated clock run."""
    all_meet()
    step(buffer, rank, 0)
    if rank == 1:
        return []
    for number in range(1, 5):
        others_meet()
        step(buffer, rank, number, (1,))
    return masks(buffer)


@pytest.mark.parametrize("layout", ["ABA", "AAB"])
def test_a_rank_that_stays_away_costs_its_tokens_only(layout: str) -> None:
    buffers = NodeBuffers(layout, 3, "weak", timeout=TIMEOUT, enable_shrink=True)
    meetings = threading.Barrier(3).wait, threading.Barrier(2).wait
    assert buffers.call(stay_away, *meetings) == [[0, 1, 0], [], [0, 1, 0]]
    no_report(buffers)


def come_late(rank: int, buffer: Buffer, all_meet: Meet, others_meet: Meet) -> list[int]:
    all_meet()
    step(buffer, rank, 0)
    if rank != 1:
        for number in range(1, 3):
            others_meet()
            step(buffer, rank, number, (1,))
    all_meet()
    if rank == 1:
        step(buffer, rank, 1, (0, 2))  # it finds out that it was masked
    return masks(buffer)


@pytest.mark.parametrize("layout", ["ABA", "AAB"])
def test_a_late_rank_is_masked_and_knows(layout: str) -> None:
    buffers = NodeBuffers(layout, timeout=TIMEOUT, enable_shrink=True)
    meetings = threading.Barrier(3).wait, threading.Barrier(2).wait
    assert buffers.call(come_late, *meetings) == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


def mask_and_go_on(rank: int, buffer: Buffer, meet: Meet) -> None:
    """Ranks 0 and 2 give rank 1 up, which says no more: not that what it was sent has come, either.

    They use all places of a window again, with rows of other sizes.
    """
    for number in range(2):
        zero_copy_step(rank, buffer, number, ())
    meet()
    if rank == 1:
        return
    buffer.low_latency_update_mask_buffer(1, True)
    for number in range(4):
        step(buffer, rank, number, (1,))
        zero_copy_step(rank, buffer, number, (1,))


def zero_copy_step(rank: int, buffer: Buffer, number: int, masked: tuple[int, ...]) -> None:
    case = PackedCase((5, 6, 7), hidden=256, capacity=9)
    idx = case.topk_idx(rank, number)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        case.x(rank, number), idx, case.capacity, case.num_experts, use_fp8=False
    )
    assert isinstance(recv, torch.Tensor)
    place = buffer.get_next_low_latency_combine_buffer(handle)
    place.copy_(experts_rows(case, rank, recv))
    weights = case.weights(rank, number)
    out, _, _ = buffer.low_latency_combine(place, idx, weights, handle, zero_copy=True)
    assert torch.equal(out, expected_combined(case, rank, number, masked))


def test_what_a_masked_rank_was_sent_is_not_overwritten_on_its_way() -> None:
    buffers = NodeBuffers("ABA", 1, "race", enable_shrink=True)
    buffers.call(mask_and_go_on, threading.Barrier(3).wait)
    no_report(buffers)


def test_without_masks_a_rank_that_stays_away_is_named() -> None:
    buffers = NodeBuffers("ABA", timeout=TIMEOUT)
    assert buffers.call(be_named)[1] == ""
    no_report(buffers)


def test_what_crosses_is_what_has_to() -> None:
    """A put per expert of another node that gets rows, and a post per rank there."""
    buffers = NodeBuffers("AB")
    case = PackedCase((5, 0), num_topk=2, experts_per_rank=3, capacity=8, hidden=512)
    topk_idx = torch.tensor([[3, 0], [3, 4], [1, 2], [-1, 3], [0, 4]])

    def send(rank: int, buffer: Buffer) -> None:
        idx = topk_idx if rank == 0 else topk_idx[:0]
        buffer.low_latency_dispatch(case.x(rank), idx, 8, case.num_experts, use_fp8=False)

    buffers.call(send)
    counts = buffers.machine.counts()["nic_put"]
    rows, tags, signals = 5 * 1024, 16 + 16, 8
    posts = counts["peer_written"] - rows - tags - 6 * signals  # 2 of rows, 2 posts, 2 done
    assert counts["launches"] == 6
    assert 0 < posts < 2 * 1024


def test_our_kernels_and_nothing_of_nvshmem_is_emulated() -> None:
    (ptx,) = far_ptx()
    assert set(re.findall(r"\.extern \.func (\w+)", ptx)) == {"ep_put_signal", "ep_signal"}
    assert "nvshmem" not in re.sub(r"//.*|\.file.*", "", ptx).replace("nvshmem/", "")


# -- the emulated network -------------------------------------------------------------------------

CALL = re.compile(r"call\.uni\s+(ep_\w+),\s+\([^)]*\)\s*;")


def some_calls(rank: int, buffer: Buffer, all_meet: Meet) -> None:
    """Three steps; and masks, by which a rank is taken back."""
    for number in range(3):
        all_meet()
        step(buffer, rank, number)
    assert mask_by_hand(rank, buffer, all_meet) == [[0, 1, 0], [1, 0, 1], [0, 1, 0]][rank]


def test_no_call_of_the_network_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (ptx,) = far_ptx()
    calls = list(CALL.finditer(ptx))
    assert len(calls) == ptx.count("call.uni")
    unnoticed = []
    for call in calls:
        less = ptx[: call.start()] + ptx[call.end() :]
        monkeypatch.setattr(buffers_of_nodes, "far_ptx", lambda less=less: [less])
        nodes = NodeBuffers("ABA", timeout=TIMEOUT, enable_shrink=True)
        barrier = threading.Barrier(3)
        try:
            nodes.call(abort_after(barrier, some_calls), barrier.wait)
            unnoticed.append(call.start())
        except (AssertionError, RuntimeError):
            continue
    # That of `masked_by`: it spares a masked rank its own timeout. tell begins with it.
    in_tell = [call.start() for call in calls if call.start() > ptx.index("ep_packed_tell_kernel(")]
    assert unnoticed == in_tell[:1]


def abort_after(barrier: threading.Barrier, function: Callable[..., None]) -> Callable[..., None]:
    """Let a rank's failure end the others' meetings."""

    def run_one(rank: int, buffer: Buffer, meet: Meet) -> None:
        try:
            function(rank, buffer, meet)
        except BaseException:
            barrier.abort()
            raise

    return run_one


COPY, SIGNAL = nic._CARD.index("copy:"), "    st.release.sys.global.u64 [%rd5], %rd9;\n"


def test_a_card_that_signals_before_its_data_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one order that is relied on is relied on."""
    card = nic._CARD[:COPY] + SIGNAL + nic._CARD[COPY:].replace(SIGNAL, "")
    assert card.count(SIGNAL) == 1
    monkeypatch.setattr(nic, "_CARD", card)
    with pytest.raises(AssertionError, match="race"):
        run("AABB", "race", 0)


LITMUS = """.version 8.0
.target sm_90
.address_size 64
.extern .func ep_put_signal(.param .b64 a, .param .b64 b, .param .b64 c, .param .b64 d,
    .param .b64 e, .param .b32 f);
.visible .entry two_puts(.param .u64 base) {
    .reg .b64 %rd<9>;
    .reg .b32 %r<2>;
    ld.param.u64 %rd1, [base];
    mov.u64 %rd2, 7;
    st.global.u64 [%rd1], %rd2;
    st.global.u64 [%rd1+16], %rd2;
    add.s64 %rd3, %rd1, 16;
    add.s64 %rd4, %rd1, 128;
    add.s64 %rd5, %rd1, 144;
    add.s64 %rd6, %rd1, 256;
    add.s64 %rd7, %rd1, 264;
    mov.u64 %rd8, 16;
    mov.u32 %r1, 1;
    { .param .b64 p0; st.param.b64 [p0+0], %rd4; .param .b64 p1; st.param.b64 [p1+0], %rd1;
      .param .b64 p2; st.param.b64 [p2+0], %rd8; .param .b64 p3; st.param.b64 [p3+0], %rd6;
      .param .b64 p4; st.param.b64 [p4+0], %rd2; .param .b32 p5; st.param.b32 [p5+0], %r1;
      call.uni ep_put_signal, (p0, p1, p2, p3, p4, p5); }
    { .param .b64 p0; st.param.b64 [p0+0], %rd5; .param .b64 p1; st.param.b64 [p1+0], %rd3;
      .param .b64 p2; st.param.b64 [p2+0], %rd8; .param .b64 p3; st.param.b64 [p3+0], %rd7;
      .param .b64 p4; st.param.b64 [p4+0], %rd2; .param .b32 p5; st.param.b32 [p5+0], %r1;
      call.uni ep_put_signal, (p0, p1, p2, p3, p4, p5); }
    ret;
}
.visible .entry wait_and_read(.param .u64 base, .param .u32 signal, .param .u32 data) {
    .reg .b64 %rd<6>;
    .reg .b32 %r<3>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [base];
    ld.param.u32 %r1, [signal];
    ld.param.u32 %r2, [data];
    cvt.u64.u32 %rd2, %r1;
    add.s64 %rd2, %rd1, %rd2;
    cvt.u64.u32 %rd3, %r2;
    add.s64 %rd3, %rd1, %rd3;
look:
    ld.acquire.sys.global.u64 %rd4, [%rd2];
    setp.eq.u64 %p1, %rd4, 0;
    @%p1 bra look;
    ld.global.u64 %rd5, [%rd3];
    st.global.u64 [%rd1+512], %rd5;
    ret;
}
"""


def read_behind_a_signal(seed: int, mode: str, signal: int, data: int) -> tuple[int, bool]:
    """Return what is read of the second of two puts, behind a signal, and whether it races."""
    nodes: Any = NodeBuffers("AB", seed, mode)
    machine = nodes.machine
    machine.load(LITMUS)
    bases = nodes.call(lambda rank, _: nodes.backends[rank].network.allocate(1024))
    machine.launch(0, "two_puts", 1, 1, 0, machine.pack("two_puts", bases[0]))
    params = machine.pack("wait_and_read", bases[1], signal, data)
    machine.launch(1, "wait_and_read", 1, 1, 0, params)
    machine.run()
    found = int.from_bytes(machine.read(1, bases[1] + 512, 8), "little")
    return found, any(kind == "race" for kind, _ in machine.report())


def test_a_signal_follows_the_data_of_its_own_put_and_no_other() -> None:
    for mode in ("race", "weak"):
        own = {read_behind_a_signal(seed, mode, 264, 144) for seed in range(4)}
        assert own == {(7, False)}
    others = [read_behind_a_signal(seed, "race", 264, 128) for seed in range(4)]
    values, races = zip(*others, strict=True)
    assert any(races)
    assert set(values) <= {0, 7}
