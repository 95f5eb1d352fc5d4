"""Sample kernels on the emulator: right ones run without a report, planted bugs are found."""

import numpy as np
import pytest

from tests.emulator.cases import Outcome, run_exchange, run_staging
from tests.emulator.machine import Fault, Machine, ParseError, sample

MODES = ("plain", "race", "weak", "race+weak")


def outcomes(kernel: str, mode: str, seeds: int) -> list[Outcome]:
    run = run_exchange if f".entry {kernel}(" in sample("exchange") else run_staging
    return [run(kernel, seed, mode) for seed in range(seeds)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["exchange", "stage_rows"])
def test_right_kernels_have_no_report(kernel: str, mode: str) -> None:
    for outcome in outcomes(kernel, mode, 12):
        assert outcome.is_right, outcome.fault
        assert not outcome.reports


# kernel -> {mode: what must be found there in some seed}
PLANTED = {
    "no_sync_before_release": {"race": "race", "weak": "data"},
    "relaxed_flag": {"race": "race", "weak": "data"},
    "relaxed_poll": {"race": "race"},
    "freed_too_early": {"race": "race"},
    "release_within_gpu": {"race": "race", "weak": "data"},
    "shuffle_for_sync": {"race": "race"},
    "wrong_slot": {"plain": "fault"},
    "never_freed": {"plain": "hang", "race": "hang"},
    "waits_for_dead_lane": {"plain": "fault"},
    "no_wait": {"plain": "uninitialised", "race": "race"},
    "no_proxy_fence": {"race": "proxy", "weak": "data"},
    "no_read_wait": {"plain": "data", "race": "race"},
    "no_barrier": {"race": "race"},
    "read_wait_at_end": {"race": "race", "plain": "uninitialised"},
    "too_few_bytes": {"plain": "hang"},
}


@pytest.mark.parametrize(
    ("kernel", "mode", "kind"),
    [(kernel, mode, kind) for kernel, found in PLANTED.items() for mode, kind in found.items()],
)
def test_planted_bugs_are_found(kernel: str, mode: str, kind: str) -> None:
    found = [outcome.kinds for outcome in outcomes(kernel, mode, 8)]
    assert any(kind in kinds for kinds in found), found


def test_race_reports_name_both_places_in_the_source() -> None:
    reports = run_exchange("relaxed_flag", 1, "race").reports
    assert any(
        kind == "race" and "exchange.cu:" in text and " and " in text and "'window'" in text
        for kind, text in reports
    ), reports


def test_a_hang_names_every_waiting_group() -> None:
    fault = run_exchange("never_freed", 0, "plain").fault
    for rank in (0, 1):
        assert f"rank {rank} block 0 warp 0 mask" in fault
    assert "ld.acquire.sys" in fault or "bar.warp.sync" in fault
    assert "exchange.cu:" in fault


def test_the_same_seed_runs_the_same_way() -> None:
    steps = []
    for seed in (3, 3, 4):
        machine = Machine(1, seed)
        machine.load(sample("staging"))
        rows = machine.place(0, np.arange(256, dtype=np.uint32))
        target, flag = machine.allocate(0, 1024), machine.place(0, np.zeros(1, np.int32))
        packed = machine.pack("stage_rows", rows, target, flag, 256, 4)
        machine.launch(0, "stage_rows", 1, 64, 256, packed)
        machine.run()
        steps.append(machine.steps)
    assert steps[0] == steps[1]
    assert steps[0] != steps[2]


def test_private_memory_of_a_peer_is_a_fault() -> None:
    machine = Machine(2)
    machine.load(sample("staging"))
    rows = machine.place(0, np.arange(64, dtype=np.uint32))
    target = machine.allocate(1, 256, symmetric=False, name="private")
    flag = machine.place(0, np.zeros(1, np.int32))
    packed = machine.pack("stage_rows", rows, target, flag, 256, 1)
    machine.launch(0, "stage_rows", 1, 64, 256, packed)
    with pytest.raises(Fault, match="private memory 'private'"):
        machine.run()


def test_bad_launches_are_refused() -> None:
    machine = Machine(1)
    machine.load(sample("staging"))
    with pytest.raises(ValueError, match="expected the name of a loaded kernel, got 'absent'"):
        machine.launch(0, "absent", 1, 32, 0, b"")
    with pytest.raises(ValueError, match="bytes of parameters for 'check_rows', got 1"):
        machine.launch(0, "check_rows", 1, 32, 0, b"x")
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        machine.launch(0, "check_rows", 1, 2048, 0, bytes(32))
    with pytest.raises(ValueError, match="rank to be in"):
        machine.launch(1, "check_rows", 1, 32, 0, bytes(32))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate.b32 %r0, %r1;", "unsupported instruction 'frobnicate.b32'"),
        ("add.rq.f32 %r0, %r1, %r1;", "unsupported instruction 'add.rq.f32'"),
        ("ld.global.v3.u32 %r0, [%rd0];", "unsupported instruction 'ld.global.v3.u32'"),
        ("mov.u32 %r0, %nothing;", "unknown name '%nothing'"),
        ("bra nowhere;", "unknown label 'nowhere'"),
        ("mov.u32 %r0, 12x;", "expected a number, got '12x'"),
        ("add.s32 %r0, %r1;", "expected 3 operands"),
    ],
)
def test_what_is_not_on_the_list_is_an_error(line: str, message: str) -> None:
    text = f""".version 9.0
.target sm_90a
.address_size 64
.entry k() {{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    {line}
    ret;
}}"""
    with pytest.raises(ParseError, match=message):
        Machine(1).load(text)
