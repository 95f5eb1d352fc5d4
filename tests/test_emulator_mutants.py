"""Mutation and coverage on the sample kernels: the loss of what synchronises is noticed."""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.emulator.cases import Outcome, run_exchange, run_staging
from tests.emulator.coverage import Coverage
from tests.emulator.machine import Machine, sample
from tests.emulator.mutate import judge, mutants, table

# Changes that leave a kernel right: how many of them survive, with the reason.
HARMLESS = {
    # The barrier at the loop's end only keeps the warps from running ahead, which the mbarrier's
    # wait does as well.
    ("stage_rows", "drop barrier"): 1,
}


@pytest.mark.parametrize(
    ("module", "kernel", "run"),
    [("exchange", "exchange", run_exchange), ("staging", "stage_rows", run_staging)],
)
def test_every_mutant_is_noticed(
    module: str, kernel: str, run: Callable[[str, int, str, str], Outcome]
) -> None:
    def notice(text: str, seed: int, mode: str) -> set[str]:
        return run(kernel, seed, mode, text).kinds

    ptx = sample(module)
    assert not notice(ptx, 0, "race")
    verdicts = judge(ptx, kernel, notice, range(6))
    assert len(verdicts) >= 6
    survivors = Counter((kernel, v.mutant.change) for v in verdicts if not v.noticed)
    assert survivors == {at: n for at, n in HARMLESS.items() if at[0] == kernel}, table(verdicts)


def test_mutants_change_one_line_of_the_kernel_asked_for() -> None:
    ptx = sample("staging")
    for mutant in mutants(ptx, "stage_rows"):
        changed = [
            (a, b) for a, b in zip(ptx.split("\n"), mutant.text.split("\n"), strict=True) if a != b
        ]
        assert len(changed) == 1
        Machine(1).load(mutant.text)


def test_coverage_names_blocks_that_did_not_run() -> None:
    coverage = Coverage()
    for num_words in (0, 8):
        machine = Machine(1)
        machine.load(COUNTING)
        target = machine.allocate(0, 64)
        machine.launch(0, "count", 1, 32, 0, machine.pack("count", target, num_words))
        machine.run()
        coverage.add(machine)
        if num_words == 0:
            assert coverage.share("count") < 1
            assert coverage.missed("count")
    assert coverage.share("count") == 1
    assert not coverage.missed("count")
    assert "100.0 %" in coverage.table()


COUNTING = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry count(.param .u64 target, .param .u32 words) {
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
    .reg .b64 %rd<3>;
    ld.param.u32 %r0, [words];
    mov.u32 %r1, %tid.x;
    setp.ge.u32 %p0, %r1, %r0;
    @%p0 bra done;
    ld.param.u64 %rd0, [target];
    mad.wide.u32 %rd1, %r1, 4, %rd0;
    st.global.u32 [%rd1], %r1;
done:
    ret;
}
"""
