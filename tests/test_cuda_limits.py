"""The limits of the kernels: 72 ranks, rows of 16384 numbers, offsets beyond 4 GiB."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ep_megatron.config import BufferConfig
from tests.routing import Case

pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")

from ep_megatron import _cuda
from tests.cuda.calls import Drawn, check
from tests.cuda.emulated import Ranks, shipped_ptx
from tests.emulator.machine import Machine

PARAMETER_BYTES = 4096  # that a kernel of any CUDA version takes
GIB = 1 << 30
HIDDEN = 16384
ROW_BYTES = 2 * HIDDEN
FAR = 140_000  # rows of that many bytes are 4.27 GiB


def machine_of() -> Machine:
    machine = Machine(1, patience=100_000_000)  # many tokens go nowhere
    for ptx in shipped_ptx():
        machine.load(ptx)
    return machine


def launch(machine: Machine, planned: Any) -> None:
    machine.launch(
        0, planned.kernel, planned.grid, planned.block, planned.shared_bytes, planned.params
    )
    machine.run()


def test_the_addresses_of_72_peers_fit_into_what_a_kernel_takes() -> None:
    machine = machine_of()
    tables = [[(1 + table) << 40 | rank << 8 for rank in range(72)] for table in range(5)]
    args = _cuda.DispatchArgs(
        route_plane=128,
        num_tokens=4,
        num_topk=32,
        row_bytes=ROW_BYTES,
        out_row_bytes=ROW_BYTES,
        alignment=1,
        experts_per_rank=14,
        rank=71,
        to_x=tables[0],
        to_scales=tables[1],
        to_weights=tables[2],
        to_idx=tables[3],
        to_links=tables[4],
    )
    planned = [
        _cuda.plan_dispatch(args, 8),
        _cuda.plan_arrive(_cuda.ArriveArgs(control=tables[0], rank=71, num_ranks=72)),
        _cuda.plan_notify(_cuda.NotifyArgs(control=tables[0], rank=71, num_ranks=72, ticket=1)),
        _cuda.plan_combine(
            _cuda.CombineArgs(
                route_plane=128,
                num_tokens=4,
                num_topk=32,
                row_bytes=ROW_BYTES,
                from_x=tables[0],
                from_weights=tables[1],
            ),
            _cuda.DType.bfloat16,
            8,
        ),
    ]
    for one in planned:
        assert len(one.params) <= PARAMETER_BYTES, one.kernel
        assert len(one.params) == sum(
            num_bytes for _, _, num_bytes in machine.parameters[one.kernel]
        )
    addresses = b"".join(np.array(table, np.uint64).tobytes() for table in tables)
    assert addresses in planned[0].params
    assert addresses[: 2 * 72 * 8] in planned[3].params
    with pytest.raises(ValueError, match="to_x: expected at most 72 values, got 73"):
        _cuda.DispatchArgs(to_x=[*tables[0], 1])


def test_72_ranks() -> None:
    tokens = [0] * 72
    tokens[3], tokens[71] = 2, 1
    case = Case("72 ranks", tuple(tokens), num_topk=32, experts_per_rank=14, hidden=8)
    ranks = Ranks(72, config=BufferConfig(timeout=1e9, num_sms=1))
    dtype = torch.bfloat16
    for expand in (False, True):
        ranks.run(check, Drawn(case, dtype, dtype, expand, torch.float32, None, False, False, 1))
    assert ranks.machine.report() == []


def test_rows_of_the_largest_hidden() -> None:
    case = Case("widest", (3, 2), num_topk=32, experts_per_rank=512, hidden=HIDDEN, alignment=4)
    ranks = Ranks(2)
    for dtype in (torch.bfloat16, torch.float64):
        drawn = Drawn(case, dtype, dtype, False, torch.float64, None, False, True, 0)
        ranks.run(check, drawn)
    ranks.run(check, replace(drawn, case=replace(case, num_topk=2), expand=True))
    assert ranks.machine.report() == []


def test_a_row_beyond_4_gib_is_dispatched_and_combined() -> None:
    machine = machine_of()
    row = np.random.default_rng(0).integers(0, 1 << 16, HIDDEN, np.uint16)
    row &= 0xBFFF  # numbers
    x = machine.place(0, row)
    routes = machine.place(0, np.array([0, FAR, 0], np.int32))
    topk_idx = machine.place(0, np.array([0], np.int64))
    weights = machine.place(0, np.array([0.5], np.float32))
    arena = machine.allocate(0, (FAR + 1) * ROW_BYTES, name="arena")
    to_weights = machine.allocate(0, (FAR + 1) * 4)
    assert FAR * ROW_BYTES > 4 * GIB
    args = _cuda.DispatchArgs(
        x=x,
        routes=routes,
        topk_idx=topk_idx,
        weights=weights,
        route_plane=1,
        num_tokens=1,
        num_topk=1,
        row_bytes=ROW_BYTES,
        out_row_bytes=ROW_BYTES,
        weight_bytes=4,
        alignment=1,
        is_int64=True,
        experts_per_rank=1,
        to_x=[arena],
        to_weights=[to_weights],
    )
    launch(machine, _cuda.plan_dispatch(args, 1))
    assert np.array_equal(machine.fetch(0, arena + FAR * ROW_BYTES, HIDDEN, np.uint16), row)
    out, out_weights = machine.allocate(0, ROW_BYTES), machine.allocate(0, 16)
    back = _cuda.CombineArgs(
        routes=routes,
        route_plane=1,
        num_tokens=1,
        num_topk=1,
        row_bytes=ROW_BYTES,
        weight_bytes=4,
        out=out,
        out_weights=out_weights,
        from_x=[arena],
        from_weights=[to_weights],
    )
    launch(machine, _cuda.plan_combine(back, _cuda.DType.bfloat16, 1))
    assert np.array_equal(machine.fetch(0, out, HIDDEN, np.uint16), row)
    assert machine.fetch(0, out_weights, 1, np.float32)[0] == 0.5
    assert machine.report() == []


def test_a_token_beyond_4_gib_is_sent() -> None:
    machine = machine_of()
    row = np.arange(HIDDEN, dtype=np.uint16)
    routes = np.full((3, FAR + 1), -1, np.int32)
    routes[:, FAR] = 0
    x = machine.allocate(0, (FAR + 1) * ROW_BYTES, name="tokens")
    machine.write(0, x + FAR * ROW_BYTES, row)
    to_x = machine.allocate(0, ROW_BYTES)
    args = _cuda.DispatchArgs(
        x=x,
        routes=machine.place(0, routes),
        route_plane=FAR + 1,
        num_tokens=FAR + 1,
        num_topk=1,
        row_bytes=ROW_BYTES,
        out_row_bytes=ROW_BYTES,
        alignment=1,
        expand=True,
        experts_per_rank=1,
        to_x=[to_x],
    )
    launch(machine, _cuda.plan_dispatch(args, 1))
    assert np.array_equal(machine.fetch(0, to_x, HIDDEN, np.uint16), row)
    assert machine.report() == []


def test_a_row_beyond_4_gib_is_copied_to_and_summed() -> None:
    machine = machine_of()
    row = np.arange(HIDDEN, dtype=np.uint16) % 256 + 0x3F80  # numbers; twice them is exact
    links = np.full((FAR + 1, 2), -1, np.int32)
    links[0], links[FAR] = (0, FAR), (0, -1)
    arena = machine.allocate(0, (FAR + 1) * ROW_BYTES, name="arena")
    machine.write(0, arena, row)
    to_rows = machine.allocate(0, ROW_BYTES)
    where = {
        "links": machine.place(0, links),
        "num_rows": FAR + 1,
        "row_bytes": ROW_BYTES,
    }
    launch(machine, _cuda.plan_expand(_cuda.ExpandArgs(x=arena, **where), 1))
    assert np.array_equal(machine.fetch(0, arena + FAR * ROW_BYTES, HIDDEN, np.uint16), row)
    stage = _cuda.StageArgs(rows=arena, to_rows=to_rows, num_row_bytes=(FAR + 1) * ROW_BYTES)
    reduce = _cuda.ReduceArgs(stage=stage, **where)
    launch(machine, _cuda.plan_reduce(reduce, _cuda.DType.bfloat16, 1))
    assert np.array_equal(machine.fetch(0, to_rows, HIDDEN, np.uint16), row + 0x80)
    assert machine.report() == []
