"""`Buffer` and autograd over emulated GPUs: the bits of the process group, for all shapes.

More interleavings: `python -m tests.cuda.interleavings --seeds 20`.
"""

import pytest
from hypothesis import HealthCheck, given, settings

from ep_megatron.backends.base import Backend
from tests.programs import Program, programs
from tests.routing import Case
from tests.test_gradients import CASES as DENSE_CASES
from tests.test_gradients import check_gradients_of
from tests.test_programs import Run

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from tests.cuda.emulated import Ranks
from tests.cuda.layers import FORMS, SMALL, new_buffer, run, run_with_buffers

WEAK = [case for case in SMALL if case.name in ("two ranks", "three ranks", "unused slots")]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_layers_forwards_and_backwards_in_race_mode(case: Case) -> None:
    forms = FORMS[:1] + FORMS[3:] if case.num_ranks > 4 else FORMS
    assert run(case, 0, "race", forms) >= case.num_ranks * len(forms) * 6


@pytest.mark.parametrize("case", WEAK, ids=lambda case: case.name)
def test_layers_forwards_and_backwards_in_weak_mode(case: Case) -> None:
    run(case, 1, "weak")


def check_dense(backend: Backend, _reference: Backend, case: Case) -> None:
    check_gradients_of(backend.rank, new_buffer(backend), case)


@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case.name)
def test_gradients_equal_those_of_a_dense_layer(case: Case) -> None:
    ranks = Ranks(case.num_ranks)
    run_with_buffers(ranks, check_dense, case)
    assert ranks.machine.report() == []


def differences(backend: Backend, _reference: Backend, program: Program) -> list[str]:
    return Run(program, backend.rank, "cuda", new_buffer(backend)).differences()


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(program=programs())
def test_random_programs_give_the_bits_of_the_definition(program: Program) -> None:
    ranks = Ranks(program.num_ranks, mode="race")
    found = run_with_buffers(ranks, differences, program)
    assert not [line for lines in found for line in lines]
    assert ranks.machine.report() == []
