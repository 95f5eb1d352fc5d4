"""Low-latency calls in graphs of emulated GPUs: replayed with other tokens, and what goes wrong."""

from collections.abc import Callable

import pytest
import torch

from ep_megatron import Buffer

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.buffers import Buffers
from tests.cuda.emulated import EmulatedDevice, shipped_ptx
from tests.cuda.packed_graphs import Step, calls, captured, give_bad_indices, run, run_masked
from tests.cuda.packed_workloads import Gate
from tests.test_cuda_low_latency import MASKS, TIMEOUT, no_report, step

Devices = list[EmulatedDevice]


@pytest.mark.parametrize(
    ("num_ranks", "mode", "kind", "how"),
    [
        (2, "race", "fp8", "plain"),
        (2, "weak", "ue8m0", "hooks"),
        (3, "race", "bf16", "zero_copy"),
        (3, "weak", "bf16", "odd"),
        (3, "race", "bf16", "hooks"),
        (4, "race", "round", "odd"),
        (8, "race", "bf16", "plain"),
    ],
)
def test_calls_are_replayed_with_other_tokens(
    num_ranks: int, mode: str, kind: str, how: str
) -> None:
    run(Buffers(num_ranks, 3, mode), kind, how)


@pytest.mark.parametrize("mode", ["race", "weak"])
def test_masks_change_between_replays(mode: str) -> None:
    run_masked(Buffers(3, 2, mode, enable_shrink=True))


def test_numbers_of_replayed_calls_go_on_where_32_bits_end() -> None:
    buffers = Buffers(2, mode="race")
    buffers.come_after((1 << 32) - 3)
    run(buffers, "bf16", "odd")


# -- what goes wrong in a replay ------------------------------------------------------------------


def test_a_replay_that_ranks_refuse_gives_nothing_and_the_next_one_works() -> None:
    buffers = Buffers(3, 4, "race")
    buffers.call(give_bad_indices, buffers.devices)
    no_report(buffers)


def stay_away(rank: int, buffer: Buffer, devices: Devices, shrinks: bool) -> None:
    one, graph, given = captured(rank, buffer, devices[rank])
    graph.replay()
    one.check(given, 0)
    if rank == 1:
        return
    one.load(1)
    graph.replay()
    if shrinks:
        one.check(given, 1, (1,))
        buffer.low_latency_check()
        return
    assert not given[1].any()
    with pytest.raises(RuntimeError, match=r"of a CUDA graph: rank .*no answer from rank 1"):
        buffer.low_latency_check()
    with pytest.raises(RuntimeError, match="expected a working Buffer"):
        step(buffer, rank, 1)


@pytest.mark.parametrize("shrinks", [False, True], ids=["error", "masked"])
def test_a_rank_that_stays_away_from_a_replay(shrinks: bool) -> None:
    buffers = Buffers(3, timeout=TIMEOUT, enable_shrink=shrinks)
    buffers.call(stay_away, buffers.devices, shrinks)
    no_report(buffers)


def test_a_rank_that_is_masked_while_it_reads_hears_of_it() -> None:
    gate = Gate(1)
    gated = Gate.put(shipped_ptx(), "ep_packed_finish_kernel", "masked_by")
    buffers = Buffers(3, enable_shrink=True, kernels=gated)
    buffers.machine.on_call("ep_gate", gate)

    def check(rank: int, buffer: Buffer) -> None:
        one = Step.of(MASKS, rank, "bf16")
        with buffers.devices[rank].capture() as graph:
            given = [one.dispatch(buffer, False)[:3]]
        graph.replay()
        if rank == 2:
            assert gate.has_come.wait(120)
            buffer.low_latency_update_mask_buffer(1, True)
            gate.open()
        if rank == 1:
            with pytest.raises(RuntimeError, match=r"rank 1 while it read, got a mask by .*rank 2"):
                buffer.low_latency_check()
        one.load(1)
        graph.replay()
        one.check(given, 1, {0: (), 1: (2,), 2: (1,)}[rank])
        buffer.low_latency_check()

    buffers.call(check)


# -- what a graph may not hold --------------------------------------------------------------------


def capture_too_much(rank: int, buffer: Buffer, devices: Devices) -> None:
    device, one = devices[rank], Step.of(MASKS, rank, "bf16")
    waited = torch.zeros(3, dtype=torch.int64)
    sizes = MASKS.capacity, MASKS.num_experts
    refused: dict[str, Callable[[], object]] = {
        r"wait statistics to be None": lambda: buffer.low_latency_dispatch(
            one.x, one.topk_idx, *sizes, dispatch_wait_recv_cost_stats=waited
        ),
        r"clean.* a CUDA graph is captured": lambda: buffer.clean_low_latency_buffer(
            MASKS.capacity, MASKS.hidden, MASKS.num_experts
        ),
        r"update_mask.* a CUDA graph is captured": lambda: buffer.low_latency_update_mask_buffer(
            (rank + 1) % 3, True
        ),
        r"low_latency_check.* a CUDA graph is captured": buffer.low_latency_check,
        r"num_rdma_bytes": lambda: buffer.low_latency_dispatch(
            one.x, one.topk_idx, 4096, MASKS.num_experts, use_fp8=False
        ),
    }
    for says, call in refused.items():
        with device.capture(), pytest.raises((RuntimeError, ValueError), match=says):
            call()
        step(buffer, rank, 0)  # nothing has happened


def test_what_waits_on_the_host_is_refused_in_a_capture() -> None:
    buffers = Buffers(3, enable_shrink=True)
    buffers.call(capture_too_much, buffers.devices)
    no_report(buffers)


ELSEWHERE = r"expected both halves .* in one CUDA graph or in none"


def capture_halves(rank: int, buffer: Buffer, devices: Devices) -> None:
    """A sending half alone is noticed by the next call; a hook runs where its call was made."""
    device, one = devices[rank], Step.of(MASKS, rank, "bf16")
    with device.capture():
        *_, hook = one.dispatch(buffer, True)
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        hook()
    with pytest.raises(RuntimeError, match="got a captured call whose hook was not"):
        one.dispatch(buffer, False)
    step(buffer, rank, 0)
    *_, hook = one.dispatch(buffer, True)
    with (
        device.capture(),
        pytest.raises(RuntimeError, match=ELSEWHERE),
    ):
        hook()


def test_a_graph_holds_both_halves_of_a_call() -> None:
    buffers = Buffers(3)
    buffers.call(capture_halves, buffers.devices)
    no_report(buffers)


def mix_buffers(rank: int, buffer: Buffer, devices: Devices) -> None:
    """Who writes into a buffer must have waited for its readers, in each replay again."""
    device, one = devices[rank], Step.of(MASKS, rank, "bf16")
    _, _, handle, *_ = one.dispatch(buffer, False)
    rows = buffer.get_next_low_latency_combine_buffer(handle)
    says = "its buffer to be asked for where the combine is made"
    with device.capture(), pytest.raises(ValueError, match=says):
        one.combine(buffer, rows, handle, zero_copy=True)
    with device.capture() as graph:
        given = calls(one, buffer, device, "zero_copy")
    for number in range(3):
        one.load(number)
        graph.replay()
        one.check(given, number)
    with device.capture():
        rows = buffer.get_next_low_latency_combine_buffer(handle)
    with pytest.raises(ValueError, match=says):
        one.combine(buffer, rows, handle, zero_copy=True)
    one.check(calls(one, buffer, device, "zero_copy"), number)


def test_a_graph_asks_for_the_buffers_of_its_combines() -> None:
    buffers = Buffers(3, 1, "race")
    buffers.call(mix_buffers, buffers.devices)
    no_report(buffers)
