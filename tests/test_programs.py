"""Random programs of calls, on every backend bit for bit what the definition gives.

A fixed series of programs, so that the same runs everywhere. Rounding is part of the definition:
between hosts sums are rounded, inside one they are not.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from ep_megatron import Buffer, fp8
from ep_megatron.streams import EventOverlap
from tests.profiles import examples
from tests.programs import (
    Combine,
    Dispatch,
    DrawnCase,
    Payload,
    Program,
    Wait,
    biases_of,
    combined_rows,
    combined_weights,
    expected_sums,
    expected_weights_and_idx,
    expected_x,
    programs,
    rows_of,
    seed_of,
    sent_weights,
)
from tests.ranks import run_on_ranks
from tests.test_dispatch import BACKENDS, bits, buffer_of

Named = dict[str, tuple[Tensor | None, Tensor | None]]  # what came, and what must


@dataclass
class Result:
    """What a step gave."""

    outputs: tuple[Any, ...]
    event: EventOverlap
    handle: Any = None

    def wait(self) -> None:
        if self.event.event is not None:  # of a queued call
            self.event.current_stream_wait()


class Run:
    """One rank's run of a program on one backend."""

    def __init__(self, program: Program, rank: int, backend: str, buffer: Buffer) -> None:
        self.program, self.rank, self.backend, self.buffer = program, rank, backend, buffer
        ranks = range(program.num_ranks)
        self.hosts = [[rank] for rank in ranks]
        if backend == "hierarchical":  # as `buffer_of` names them
            self.hosts = [[rank for rank in ranks if rank % 2 == host] for host in (0, 1)]
        self.results: dict[int, Result] = {}

    def differences(self, spoil: bool = False) -> list[str]:
        """Run all steps; return where outputs are wrong, right after their call and at the end."""
        found = []
        for at, step in enumerate(self.program.steps):
            if isinstance(step, Wait):
                result = self.results.get(step.of % at)
                if result is not None:
                    result.wait()
                    found += self.wrong(step.of % at)
                continue
            self.results[at] = self.call(at, step)
            if not step.is_async:
                found += self.wrong(at)
        for at, result in self.results.items():
            result.wait()
            if spoil and result.outputs[0].numel():
                bits_of = result.outputs[0].view(torch.uint8)
                bits_of[-1, -1] ^= 1
            found += self.wrong(at)
        return found

    def call(self, at: int, step: Dispatch | Combine) -> Result:
        if isinstance(step, Combine):
            return self.combine(at, step)
        case, payload = self.program.case(at), step.payload
        x: Any = payload.rows(case.num_tokens[self.rank], seed_of(at, self.rank))
        options: dict[str, Any] = {"widen_to": payload.widen_to, "async_finish": step.is_async}
        if payload.is_cast_by_caller:
            x = fp8.quantize(x, payload.row_major)
        else:
            options["fp8"] = payload.recipe
        if step.weights is not None:
            options["topk_weights"] = sent_weights(self.program, at, self.rank)
        if step.is_cached:
            handle = self.results[self.program.maker(at)].handle
            outputs = self.buffer.dispatch(x, handle, **options)
            return Result(outputs, outputs[5], handle)
        outputs = self.buffer.dispatch(
            x,
            topk_idx=case.topk_idx(self.rank),
            num_experts=case.num_experts,
            expand=step.expand,
            expert_alignment=step.alignment,
            num_worst_tokens=self.num_worst_tokens(at),
            **options,
        )
        return Result(outputs, outputs[5], outputs[4])

    def num_worst_tokens(self, at: int) -> int:
        """Return the capacity of the handle of step `at`, or 0."""
        maker = self.program.steps[self.program.maker(at)]
        assert isinstance(maker, Dispatch)
        if maker.spare_rows is None:
            return 0
        case, expand = self.program.case(at), self.program.expand(at)
        most = max(len(rows_of(case, rank, expand)) for rank in range(case.num_ranks))
        return most + maker.spare_rows

    def combine(self, at: int, step: Combine) -> Result:
        maker = self.results[self.program.maker(at)]
        x = combined_rows(self.program, at, self.rank)
        biases = biases_of(self.program, at, self.rank, x)
        weights = combined_weights(self.program, at, self.rank)
        num_rows = self.num_worst_tokens(at) or len(x)
        if step.is_of_received and isinstance(maker.outputs[0], Tensor):
            received = maker.outputs[0]
            if received.dtype == x.dtype and received.shape[1] == x.shape[1]:
                x = received  # perhaps not filled yet; the rows behind those that came are noise
        x = padded(x, num_rows)
        if step.is_strided and not step.is_of_received:
            x = torch.stack([x, x], dim=2)[:, :, 0]
        outputs = self.buffer.combine(
            x,
            maker.handle,
            topk_weights=None if weights is None else padded(weights, num_rows),
            bias=tuple(biases) or None,
            previous_event=maker.event,
            async_finish=step.is_async,
        )
        return Result(outputs[:2], outputs[2])

    def wrong(self, at: int) -> list[str]:
        """Return the outputs of a complete step that are not what they must be."""
        step, outputs = self.program.steps[at], self.results[at].outputs
        named: Named
        if isinstance(step, Combine):
            is_rounded = self.backend == "hierarchical"
            sums = expected_sums(self.program, at, self.rank, self.hosts, is_rounded)
            named = {"combined_x": (outputs[0], sums[0]), "weights": (outputs[1], sums[1])}
        else:
            named = self.received(at, outputs)
        return [
            f"{self.backend}, rank {self.rank}, step {at}: {name} is wrong"
            for name, (ours, theirs) in named.items()
            if not same_bits(ours, theirs)
        ]

    def received(self, at: int, outputs: tuple[Any, ...]) -> Named:
        x, scales = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0], None)
        idx, weights = outputs[1:3]
        expected, expected_scales = expected_x(self.program, at, self.rank)
        expected_weights, expected_idx = expected_weights_and_idx(self.program, at, self.rank)
        capacity, num_rows = self.num_worst_tokens(at), len(expected)
        named: Named = {}
        if capacity:
            if len(x) != capacity:
                return {"the number of rows": (x, None)}
            x, scales = x[:num_rows], None if scales is None else scales[:num_rows]
            if idx is not None:
                named["recv_topk_idx behind the rows"] = (
                    idx[num_rows:],
                    torch.full_like(idx[num_rows:], -1),
                )
                idx = idx[:num_rows]
            if weights is not None:
                is_fresh = self.program.maker(at) == at
                behind = weights[num_rows:]
                if is_fresh:
                    named["weights behind the rows"] = (behind, torch.zeros_like(behind))
                weights = weights[:num_rows]
        return {
            "recv_x": (x, expected),
            "scales": (scales, expected_scales),
            "recv_topk_idx": (idx, expected_idx),
            "recv_topk_weights": (weights, expected_weights),
            **named,
        }


def padded(rows: Tensor, num_rows: int) -> Tensor:
    """Return `rows` with NaN behind them."""
    if len(rows) >= num_rows:
        return rows
    return torch.cat([rows, rows.new_full((num_rows - len(rows), *rows.shape[1:]), torch.nan)])


def same_bits(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    is_alike = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return is_alike and (not ours.numel() or torch.equal(bits(ours), bits(theirs)))


def check(rank: int, program: Program, spoil: bool = False) -> list[str]:
    """Return differences, rather than raise, so that the ranks stay together."""
    found = []
    for backend in BACKENDS:
        found += Run(program, rank, backend, buffer_of(backend)).differences(spoil)
    return found


@pytest.mark.slow
@examples(60)
@given(program=programs())
def test_every_backend_gives_the_bits_of_the_definition(program: Program) -> None:
    found = [line for lines in run_on_ranks(program.num_ranks, check, program) for line in lines]
    assert not found


def test_one_wrong_bit_is_found() -> None:
    case = DrawnCase("two ranks", (1, 2), 2, 1, slots=(((0, 1),), ((1, -1), (0, 1))))
    steps = (
        Dispatch(0, False, Payload(16), weights=torch.float32),
        Combine(0, 16, torch.bfloat16, is_async=True),
    )
    program = Program(2, (case,), steps)
    assert run_on_ranks(2, check, program) == [[], []]
    for rank, lines in enumerate(run_on_ranks(2, check, program, True)):
        expected = [
            f"{backend}, rank {rank}, step {at}: {name} is wrong"
            for backend in BACKENDS
            for at, name in enumerate(("recv_x", "combined_x"))
        ]
        assert lines == expected


def test_strided_rows_of_a_rank_that_received_none() -> None:
    case = DrawnCase("two ranks", (0, 2), 1, 1, slots=((), ((1,), (1,))))
    steps = (
        Dispatch(0, False, Payload(16)),
        Combine(0, 16, torch.bfloat16, weights=torch.float32, is_strided=True),
    )
    assert run_on_ranks(2, check, Program(2, (case,), steps)) == [[], []]
