"""The extension holds the PTX that nvcc makes of the sources, and kernels take what they should."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import resources
from tests.cuda.fatbin import embedded_ptx

_cuda = pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")
PINNED = "V13.0.88"


def nvcc_or_skip() -> str:
    nvcc = resources.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on PATH, and none from requirements-cuda.txt")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    if PINNED not in version.stdout:
        pytest.skip(f"the table is that of nvcc {PINNED}")
    return nvcc


def without_comments(ptx: str) -> list[str]:
    """Return the words of PTX; the linker keeps no comments and other blanks."""
    return re.sub(r"//.*", "", ptx).split()


def test_the_extension_holds_the_ptx_of_the_sources() -> None:
    nvcc = nvcc_or_skip()
    embedded, sources = embedded_ptx(Path(_cuda.__file__)), resources.sources()
    if find_spec("ep_megatron._nvshmem") is None:
        sources = [source for source in sources if source.parent.name == "cuda"]
    else:
        from tests.cuda.nic import cross_ptx, far_ptx, post_ptx

        embedded += [*far_ptx(), *post_ptx(), *cross_ptx()]
    made = [resources.compile_to_ptx(nvcc, source) for source in sources]
    assert sorted(map(without_comments, embedded)) == sorted(map(without_comments, made))


def test_every_kernel_can_be_launched() -> None:
    texts = embedded_ptx(Path(_cuda.__file__))
    entries = [name for ptx in texts for name in re.findall(r"\.entry (\w+)", ptx)]
    assert sorted(entries) == _cuda.kernel_names()


def test_kernels_take_what_the_table_says() -> None:
    assert resources.table(nvcc_or_skip()) == resources.TABLE.read_text()


def test_no_kernel_spills_and_every_launch_fits() -> None:
    rows = [line.split() for line in resources.TABLE.read_text().split("\n\n")[0].splitlines()[1:]]
    assert {row[1] for row in rows} == set(resources.ARCHITECTURES)
    for kernel, _, registers, shared, stack, spills in rows:
        threads = 1024 if re.search("notify|post|meet", kernel) else 512
        assert (stack, spills) == ("0", "0"), kernel
        assert int(registers) * threads <= 65536, kernel
        assert int(shared) + 8 * 4 * (_cuda.MAX_EXPERTS + _cuda.MAX_RANKS) <= 48 * 1024, kernel


def test_rows_move_in_accesses_of_16_bytes() -> None:
    text = resources.TABLE.read_text().split("\n\n")[1]
    counts = dict(re.findall(r"^(\w+): (.*)$", text, re.MULTILINE))
    for kernel, accesses in counts.items():
        assert "other" not in accesses, kernel  # generic, local or atomic
        if re.search("dispatch|expand|combine|reduce|stage|push|take|sum", kernel):
            assert "ld.global.16" in accesses, kernel
            assert "st.global.16" in accesses, kernel


def test_importing_needs_no_driver_and_a_device_says_what_is_missing() -> None:
    code = (
        "from ep_megatron import _cuda\n"
        "try:\n    print(_cuda.count_devices())\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit() or "expected a CUDA driver and a GPU" in done.stdout


PLANS = {
    "hidden": lambda: _cuda.plan_dispatch(dispatch_args(row_bytes=16400 * 8), 8),
    "the columns of topk_idx": lambda: _cuda.plan_dispatch(dispatch_args(num_topk=33), 8),
    "the bytes of a row": lambda: _cuda.plan_dispatch(
        dispatch_args(row_bytes=24, out_row_bytes=24), 8
    ),
    "the plane of the routes": lambda: _cuda.plan_dispatch(dispatch_args(route_plane=15), 8),
    "the bytes of a link": lambda: _cuda.plan_dispatch(dispatch_args(link_bytes=4), 8),
    "the bytes of a link by expert": lambda: _cuda.plan_dispatch(dispatch_args(expand=True), 8),
    "the address of the links": lambda: _cuda.plan_expand(
        _cuda.ExpandArgs(num_rows=1, row_bytes=16, links=4), 8
    ),
    "the bytes of the rows": lambda: _cuda.plan_reduce(
        _cuda.ReduceArgs(num_rows=2, row_bytes=16), _cuda.DType.float32, 8
    ),
    "the address of x": lambda: _cuda.plan_dispatch(dispatch_args(x=8), 8),
    "num_experts": lambda: _cuda.plan_count(
        _cuda.ScanArgs(num_tokens=1, num_topk=1, num_experts=1025, num_ranks=1), 8
    ),
    "the number of ranks": lambda: _cuda.plan_arrive(_cuda.ArriveArgs(num_ranks=73)),
    "the slots of topk_idx": lambda: _cuda.plan_dispatch(dispatch_args(num_tokens=1 << 30), 8),
}


def packed_args(**changes: int) -> Any:
    fields = {
        "num_ranks": 2,
        "num_experts": 4,
        "max_tokens": 8,
        "hidden": 256,
        "num_tokens": 8,
        "num_topk": 4,
        "x_bytes": 512,
        "slot_bytes": 512,
        "block_bytes": 8 * 516,
        "place_bytes": 4 * 8 * 516,
        "part_bytes": 2 * 8 * 516,
        "window_bytes": 2 * 4 * 8 * 516,
    }
    return _cuda.PackedArgs(**{**fields, **changes})


def packed_plan(**changes: int) -> Any:
    return _cuda.plan_packed(_cuda.PackedStep.push, packed_args(**changes), 4)


PLANS |= {
    "hidden": lambda: packed_plan(hidden=200),
    "num_tokens": lambda: packed_plan(num_tokens=9),
    "where slots end": lambda: packed_plan(slots=16),
    "the bytes of slots": lambda: packed_plan(place_bytes=4 * 8 * 512),
    "where outgoing rows end": lambda: packed_plan(outbox=16),
    "a rank's part of outgoing rows": lambda: packed_plan(part_bytes=2 * 8 * 514),
    "where the call's number is": lambda: packed_plan(call=-1),
    "the bytes of a block of slots": lambda: packed_plan(block_bytes=8 * 512),
    "where incoming rows end": lambda: _cuda.plan_packed(
        _cuda.PackedStep.sum, packed_args(inbox=16), 4
    ),
    "the bytes of a slot": lambda: packed_plan(slot_bytes=528),
    "the bytes of a row's scales": lambda: packed_plan(x_bytes=256, scale_bytes=6),
    "the rank to mask": lambda: _cuda.plan_packed(
        _cuda.PackedStep.mask, packed_args(mask_rank=2), 4
    ),
    "where rows end": lambda: _cuda.plan_packed(
        _cuda.PackedStep.stage, packed_args(window_bytes=4 * 8 * 511), 4
    ),
}


def dispatch_args(**changes: int) -> Any:
    fields = {
        "route_plane": 40_000,
        "num_tokens": 4,
        "num_topk": 4,
        "row_bytes": 16384,
        "out_row_bytes": 16384,
        "alignment": 1,
        "experts_per_rank": 8,
    }
    return _cuda.DispatchArgs(**{**fields, **changes})


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_refuses_what_the_kernels_are_not_made_for(what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"expected {what} to be")):
        PLANS[what]()


def test_a_plan_says_all_of_a_launch() -> None:
    launch = _cuda.plan_dispatch(dispatch_args(num_tokens=100), 8)
    assert (launch.kernel, launch.grid, launch.block) == ("ep_dispatch_kernel", 7, 512)
    assert _cuda.plan_dispatch(dispatch_args(num_tokens=10_000), 8).grid == 8
    assert int.from_bytes(launch.params[64:72], "little") == 100
