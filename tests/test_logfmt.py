"""LogFMT: its definition, the compiled kernels bit for bit, and combines that send it."""

import math

import pytest
import torch
from torch import Tensor

from ep_megatron import Buffer, _cpu, casts, fp8, logfmt
from ep_megatron.logfmt import LogRows
from ep_megatron.packed_arguments import check_logfmt
from tests.packed_cases import PackedCase, as_logfmt, expected_combined
from tests.ranks import run_on_ranks
from tests.test_low_latency import BACKENDS, buffer_of, experts_rows
from tests.test_row_kernels import ISAS, Output

EVERY = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def shuffled(values: Tensor, seed: int, hidden: int) -> Tensor:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return values[order][: len(values) // hidden * hidden].view(-1, hidden)


def rows_of(kind: str) -> Tensor:
    random = torch.Generator().manual_seed(1)
    normal = torch.randn(32, 1024, generator=random)
    if kind == "every number":
        return shuffled(EVERY, 1, 512)
    if kind == "every number below one":
        return shuffled(EVERY[EVERY.abs() < 1], 2, 256)
    if kind == "neighbours":  # blocks of every size, each within a factor of two
        return EVERY[: len(EVERY) // 2].flip(0).view(-1, 128)
    if kind == "as experts give":
        return (normal * 0.1).bfloat16()
    scale = torch.logspace(0, -130, 32, base=2)[:, None]
    return (normal.clamp(-2, 2) * scale).bfloat16()


KINDS = ("every number", "every number below one", "neighbours", "as experts give", "all sizes")


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_the_bits_of_the_definition(kind: str) -> None:
    x = rows_of(kind)
    expected = logfmt.encode(x)
    numbers = logfmt.decode(expected)
    for isa in ISAS:
        extremes, data = Output(2 * expected.extremes.numel()), Output(len(expected.data))
        used = _cpu.encode_logfmt(isa, extremes.address, data.address, x.data_ptr(), *x.shape)
        assert used == len(expected.data)
        assert torch.equal(extremes.read(torch.uint8), bits(expected.extremes)), isa
        assert torch.equal(data.read(torch.uint8), expected.data), isa
        out = Output(4 * x.numel())
        _cpu.decode_logfmt(isa, out.address, extremes.address, data.address, *x.shape)
        assert torch.equal(out.read(torch.uint8), bits(numbers)), isa
    rows = casts.encode_logfmt(x)
    assert torch.equal(rows.data, expected.data)
    assert torch.equal(bits(casts.decode_logfmt(rows)), bits(numbers))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_stay_within_half_a_step(kind: str) -> None:
    x = rows_of(kind)
    got, bound = logfmt.decode(logfmt.encode(x)), logfmt.error_bound(x)
    is_plain = bound == 0
    assert torch.equal(bits(got[is_plain]), bits(x[is_plain].float()))
    error = (got - x.float()).abs()
    assert (error[~is_plain] <= bound[~is_plain]).all()
    # The coarsest steps there are: 2^(32 / 510).
    assert (bound[~is_plain] <= 0.0225 * x[~is_plain].float().abs() + 2.0**-31.9).all()
    keeps_sign = (got == 0) | is_plain | (got.signbit() == x.signbit())
    assert keeps_sign.all()


def test_errors_of_normal_rows_are_an_eighth_of_those_of_fp8() -> None:
    x = rows_of("as experts give")
    wide = x.float()
    coded = logfmt.decode(logfmt.encode(x))
    cast = fp8.dequantize(*fp8.quantize(x), torch.float32)
    errors = [float((y - wide).norm() / wide.norm()) for y in (coded, cast)]
    assert 0.003 < errors[0] < 0.004
    assert errors[0] < errors[1] / 7


def test_levels_are_those_of_the_definition() -> None:
    """By loops in float64, for a block whose levels are far apart."""
    x = torch.full((1, 128), 0.75)
    x[0, 1] = 2.0**-40  # more than 2^32 below: the smallest level is 0.75 * 2^-32
    x[0, 2:] = 0.75 * 2.0 ** -torch.linspace(0, 33, 126, dtype=torch.float64)
    x = x.bfloat16()
    step = 32 / 510
    levels = [0.0, *(0.75 * 2 ** -((511 - n) * step) for n in range(1, 512))]
    got = logfmt.decode(logfmt.encode(x))[0].tolist()
    for value, decoded in zip(x[0].tolist(), got, strict=True):
        below = 0.75 * 2**-32 * (1 + 2**-step) / 2
        near = min(levels[1:], key=lambda level: abs(level - value)) if value >= below else 0.0
        assert math.isclose(decoded, near, rel_tol=1e-5), value


def test_blocks_that_are_not_ordinary() -> None:
    x = torch.tensor([0.3, 0.0, -0.0, 1e-40, 1.0, torch.inf, torch.nan]).bfloat16()
    x = x[:, None].repeat(1, 128)
    x[0, ::2] *= -1
    x = torch.cat([x, x[:1]])
    x[7, 5] = torch.nan  # one NaN keeps its block from being coded
    rows = logfmt.encode(x)
    got = logfmt.decode(rows)
    assert logfmt.is_coded(rows.extremes)[:, 0].tolist() == [True] * 4 + [False] * 4
    assert len(rows.data) == 4 * 160 + 4 * 256
    assert torch.equal(bits(got[:3]), bits(x[:3].float()))  # equal magnitudes stay, and signs
    assert not got[3].any()  # no normal bfloat16
    assert torch.equal(bits(got[4:]), bits(x[4:].float()))


def test_no_rows_are_no_error() -> None:
    rows = logfmt.encode(torch.empty(0, 256, dtype=torch.bfloat16))
    assert rows.extremes.shape == (0, 2, 2)
    assert len(rows.data) == 0
    assert logfmt.decode(rows).shape == (0, 256)


def test_rows_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        casts.encode_logfmt(torch.zeros(2, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16"):
        logfmt.encode(torch.zeros(2, 128))
    rows = logfmt.encode(torch.zeros(2, 128, dtype=torch.bfloat16))
    for decode in (logfmt.decode, casts.decode_logfmt):
        with pytest.raises(ValueError, match="320 bytes, as the extremes say, got 319"):
            decode(LogRows(rows.extremes, rows.data[:-1]))
    with pytest.raises(ValueError, match="use_logfmt to be False on a GPU"):
        check_logfmt("low_latency_combine", True, False, "cuda")


# Experts' rows are below one, so all blocks are coded.
CASE = PackedCase((8, 5, 0, 7), num_topk=4, hidden=384, scale=1 / 16)


def check_combines(rank: int, backend: str) -> tuple[int, int, int]:
    """Compare sums with the definition; return rows and bytes read, plain and as LogFMT."""
    buffer, idx, weights = buffer_of(backend), CASE.topk_idx(rank), CASE.weights(rank)
    read = []
    for use_logfmt, with_hook in ((False, False), (True, False), (True, True)):
        recv, _, handle, _, _ = buffer.low_latency_dispatch(
            CASE.x(rank), idx, CASE.capacity, CASE.num_experts, use_fp8=False
        )
        assert isinstance(recv, Tensor)
        before = bytes_read(buffer)
        out, _, hook = buffer.low_latency_combine(
            experts_rows(CASE, rank, recv),
            idx,
            weights,
            handle,
            use_logfmt=use_logfmt,
            return_recv_hook=with_hook,
        )
        if hook is not None:
            hook()
        read.append(bytes_read(buffer) - before)
        expected = expected_combined(CASE, rank, as_sent=as_logfmt if use_logfmt else Tensor.float)
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), use_logfmt
    assert read[1] == read[2]
    return int((idx >= 0).sum()), read[0], read[1]


def bytes_read(buffer: Buffer) -> int:
    combine = buffer.statistics().operations["low_latency_combine"]
    return sum(peer.num_bytes for peer in combine.peers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_combines_sum_what_logfmt_makes_of_rows_and_read_fewer_bytes(backend: str) -> None:
    for num_rows, plain, coded in run_on_ranks(4, check_combines, backend):
        assert plain == num_rows * 2 * CASE.hidden
        assert coded == num_rows * (CASE.hidden // 128) * (160 + 4)
