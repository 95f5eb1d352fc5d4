"""What synchronises our kernels is needed: without it something is noticed."""

import pytest

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.mutants import verdicts
from tests.emulator.mutate import table

# The emulated host is a thread of its rank's GPU, so that a release to the GPU reaches it too.
SURVIVORS = {"ep_count_kernel": 0, "ep_arrive_kernel": 1}


@pytest.mark.parametrize("kernel", SURVIVORS)
def test_a_lost_or_weakened_instruction_is_noticed(kernel: str) -> None:
    # A lost vote of arrive leaves a host waiting, which takes minutes to give up: not here.
    judged = verdicts(kernel, without=["drop barrier with vote"])
    survivors = [v for v in judged if not v.noticed]
    assert len(judged) >= 3
    assert len(survivors) <= SURVIVORS[kernel], table(judged)
    assert all(v.mutant.change == "sys to gpu" for v in survivors), table(judged)
