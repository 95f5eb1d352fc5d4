"""What synchronises our kernels is needed: without it something is noticed."""

import pytest

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.mutants import kernels, verdicts
from tests.cuda.workloads import WORKLOADS
from tests.emulator.mutate import table


@pytest.mark.parametrize("kernel", ["ep_count_kernel", "ep_arrive_kernel"])
def test_a_lost_or_weakened_instruction_is_noticed(kernel: str) -> None:
    # A lost vote of arrive leaves a host waiting, which takes minutes to give up: not here.
    judged = verdicts(kernel, without=["drop barrier with vote"])
    assert len(judged) >= 3
    assert all(v.noticed for v in judged), table(judged)


def test_every_kernel_that_synchronises_is_judged_by_some_calls() -> None:
    assert not [name for name in kernels() if not name.startswith(tuple(WORKLOADS))]
