"""Whether anything notices when an instruction that synchronises our kernels is weakened or lost.

`python -m tests.cuda.mutants` judges every one and prints the score.
"""

import argparse
import functools
from collections.abc import Collection

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Backend, Routing, Rows
from ep_megatron.backends.cuda import CudaBackend
from ep_megatron.config import BufferConfig
from tests.cuda.emulated import Ranks, shipped_ptx
from tests.emulator.machine import Fault
from tests.emulator.mutate import Verdict, judge, table
from tests.routing import Case

KERNELS = ["ep_count_kernel", "ep_route_kernel", "ep_notify_kernel", "ep_arrive_kernel"]
SEEDS = range(2)
# Enough tokens for several steps of a warp and, with more SMs, several blocks.
CASE = Case("mutants", (70, 20, 3), num_topk=4, experts_per_rank=6, hidden=8, alignment=4)
_SLOTS = 2  # of a post, which must be written again


def failing_calls(backend: Backend) -> list[Tensor]:
    """Return what a rank hears of calls that all must refuse: a bad index, and two dtypes."""
    rank = backend.rank
    x, topk_idx = CASE.x(rank, torch.float32), CASE.topk_idx(rank)
    bad = topk_idx.clone()
    if rank == 1:
        bad[2, 1] = CASE.num_experts
    heard = []
    for idx, rows in ((bad, x), (topk_idx, x.double() if rank == 2 else x)):
        try:
            backend.dispatch(Rows(rows), Routing(idx, CASE.num_experts))
            heard.append("nothing")
        except ValueError as error:
            heard.append(str(error))
    return [torch.tensor(list(text.encode())) for text in heard]


def calls(backend: Backend, _reference: Backend) -> list[Tensor]:
    """Return what some calls give on one rank, memory having been written again in between."""
    results: list[Tensor] = []
    x = CASE.x(backend.rank, torch.float32)
    for expand in (True, False) * _SLOTS:
        routing = Routing(CASE.topk_idx(backend.rank), CASE.num_experts, expand, CASE.alignment)
        rows, handle = backend.dispatch(Rows(x), routing)
        summed, _ = backend.combine(rows, handle)
        results += [rows.x.clone(), handle.routes, summed]
    return results + failing_calls(backend)


def calls_without_arrival(backend: Backend, _reference: Backend) -> list[Tensor]:
    """Return what the host of a rank finds when rank 1 does not arrive."""
    assert isinstance(backend, CudaBackend)
    meeting, device = backend._meeting, backend._device
    meeting.meet("mutants", None, kind=_cuda.BAD_ARGUMENTS, error="only to meet")
    if backend.rank == 1:
        return []
    meeting.arrive(waits=True)
    device.wait_for_word(meeting._arrive_error, meeting.epoch, 0)
    epoch, seen = _cuda.read_arrive_error(meeting._arrive_error.read(), meeting.num_ranks)
    return [torch.tensor([epoch, *seen])]


def run(text: str, seed: int, mode: str, *, arrives: bool = True) -> set[str]:
    """Return what is noticed of a module in which one kernel was changed."""
    entry = next(name for name in KERNELS if f".entry {name}" in text)
    kernels = [text if f".entry {entry}" in ptx else ptx for ptx in shipped_ptx()]
    try:
        results, reports = _outcome(kernels, seed, mode, arrives)
    except (AssertionError, Fault, ValueError, RuntimeError) as error:
        return {"fault" if isinstance(error, Fault) else "error"}
    expected = _expected(arrives)
    is_same = all(
        len(mine) == len(other) and all(map(torch.equal, mine, other))
        for mine, other in zip(results, expected, strict=True)
    )
    return {kind for kind, _ in reports} | (set() if is_same else {"data"})


def verdicts(kernel: str, seeds: range = SEEDS, without: Collection[str] = ()) -> list[Verdict]:
    """Judge every mutant of a kernel, but for some changes."""
    ptx = next(ptx for ptx in shipped_ptx() if f".entry {kernel}" in ptx)

    def notice(text: str, seed: int, mode: str) -> set[str]:
        noticed = run(text, seed, mode)
        if not noticed and kernel == "ep_arrive_kernel":
            noticed = run(text, seed, mode, arrives=False)
        return noticed

    return judge(ptx, kernel, notice, seeds, without)


def _outcome(
    kernels: list[str], seed: int, mode: str, arrives: bool
) -> tuple[list[list[Tensor]], list[tuple[str, str]]]:
    if arrives:
        ranks = Ranks(3, seed, mode, BufferConfig(timeout=1e9, num_sms=2), kernels)
        return ranks.run(calls), ranks.machine.report()
    # The host reads the error from memory that outlives a trap; the machine would not.
    kernels = [ptx.replace("trap;", "exit;") for ptx in kernels]
    ranks = Ranks(3, seed, mode, BufferConfig(timeout=3.0, num_sms=2), kernels)
    return ranks.run(calls_without_arrival), ranks.machine.report()


@functools.cache
def _expected(arrives: bool) -> list[list[Tensor]]:
    return _outcome(shipped_ptx(), 0, "plain", arrives)[0]


def main() -> None:
    """Print a line per mutant and the score."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kernels", nargs="*", default=KERNELS, help="whose mutants; all of them")
    judged = [verdict for kernel in parser.parse_args().kernels for verdict in verdicts(kernel)]
    print(table(judged))


if __name__ == "__main__":
    main()
