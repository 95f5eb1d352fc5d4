"""The row kernels against torch in the same order, bit for bit, on every instruction set."""

import itertools

import pytest
import torch

from ep_megatron import _cpu

ISAS = _cpu.row_kernel_names()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CANARY = 0xA5
GUARD = 128  # bytes kept around every output

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_store = pytest.mark.parametrize("streaming", [False, True], ids=["plain", "streaming"])

# Row sizes in bytes: below and around each vector width and unrolled step, ends of all lengths.
ROW_BYTES = [16, 32, 48, 64, 80, 112, 128, 176, 240, 256, 272, 496, 512, 2000, 2048, 14336]

# Rows of each group: none, one, two, many, one per group, several, empty groups at all places.
GROUPS = [
    [], [0], [0, 0, 0], [1], [2], [3], [32], [1, 1], [1] * 8, [2, 1], [1, 2], [4, 4],
    [0, 1, 1], [0, 0, 2, 0, 3, 0], [1, 0, 1], [5, 1, 3, 2, 4, 1, 6, 2], [0, 1, 0],
]  # fmt: skip


class Output:
    """A row in the middle of canary bytes, poisoned before use."""

    def __init__(self, num_bytes: int, misalignment: int = 0) -> None:
        self.memory = torch.full((num_bytes + 2 * GUARD + 64,), CANARY, dtype=torch.uint8)
        self.start = GUARD + (-(self.memory.data_ptr() + GUARD)) % 64 + misalignment
        self.stop = self.start + num_bytes
        self.address = self.memory.data_ptr() + self.start

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        assert (self.memory[: self.start] == CANARY).all()
        assert (self.memory[self.stop :] == CANARY).all()
        return self.memory[self.start : self.stop].clone().view(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGERS[x.element_size()])


def normal_rows(num_rows: int, hidden: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, hidden, generator=generator, dtype=torch.float64)
    return list(rows.to(dtype))


def wild_rows(num_rows: int, hidden: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Random bits, and in every fourth column a value from the edges of the format."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, hidden * dtype.itemsize)
    rows = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)
    info = torch.finfo(dtype)
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, info.eps]
    edges += [info.smallest_normal / 2, -info.smallest_normal / 4, 1.0, 1 + info.eps]
    choice = torch.randint(0, len(edges), (num_rows, (hidden + 3) // 4), generator=generator)
    rows[:, ::4] = torch.tensor(edges, dtype=torch.float64).to(dtype)[choice]
    return list(rows)


def reference_sum(
    rows: list[torch.Tensor], groups: list[int], biases: list[torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    if len(rows) + len(biases) == 0:
        return torch.zeros_like(like)
    remaining = iter(rows)
    parts = [[bias.to(wide) for bias in biases]]
    parts += [[row.to(wide) for row in itertools.islice(remaining, size)] for size in groups]
    sums = [sum(part[1:], start=part[0]) for part in parts if part]
    return sum(sums[1:], start=sums[0]).to(like.dtype)


def kernel_sum(
    isa: str,
    rows: list[torch.Tensor],
    groups: list[int],
    biases: list[torch.Tensor],
    like: torch.Tensor,
    streaming: bool = False,
    misalignment: int = 0,
) -> torch.Tensor:
    out = Output(like.numel() * like.element_size(), misalignment)
    _cpu.reduce_rows(
        isa,
        str(like.dtype)[6:],
        out.address,
        [row.data_ptr() for row in rows],
        list(itertools.accumulate(groups)),
        [bias.data_ptr() for bias in biases],
        like.numel(),
        streaming,
    )
    return out.read(like.dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; a NaN for a NaN."""
    is_nan = expected.isnan()
    assert torch.equal(actual.isnan(), is_nan)
    assert torch.equal(bits(actual)[~is_nan], bits(expected)[~is_nan])


@each_isa
@each_dtype
@each_store
def test_sum_of_groups_is_torch_in_the_same_order(
    isa: str, dtype: torch.dtype, streaming: bool
) -> None:
    for seed, (groups, num_biases) in enumerate(itertools.product(GROUPS, [0, 1, 2])):
        hidden = ROW_BYTES[seed % len(ROW_BYTES)] // dtype.itemsize
        for make_rows in (normal_rows, wild_rows):
            rows = make_rows(sum(groups), hidden, dtype, seed)
            biases = make_rows(num_biases, hidden, dtype, seed + 1000)
            like = torch.empty(hidden, dtype=dtype)
            expected = reference_sum(rows, groups, biases, like)
            assert_same(kernel_sum(isa, rows, groups, biases, like, streaming), expected)


@each_isa
@each_dtype
@each_store
def test_every_row_size_and_alignment_stays_inside_its_row(
    isa: str, dtype: torch.dtype, streaming: bool
) -> None:
    for num_bytes, misalignment in itertools.product(ROW_BYTES[:-1], [0, 2, 16, 32, 48]):
        rows = normal_rows(5, num_bytes // dtype.itemsize, dtype, num_bytes)
        for groups in ([2, 3], [5]):
            actual = kernel_sum(isa, rows, groups, [], rows[0], streaming, misalignment)
            assert_same(actual, reference_sum(rows, groups, [], rows[0]))


@each_dtype
def test_all_instruction_sets_give_the_same_bits_nan_included(dtype: torch.dtype) -> None:
    if len(ISAS) == 1:
        pytest.skip(f"this CPU runs one build of the kernels only: {ISAS[0]}")
    for seed, groups in enumerate(GROUPS):
        rows = wild_rows(sum(groups), 4096, dtype, seed)
        biases = wild_rows(seed % 3, 4096, dtype, seed + 1000)
        like = torch.empty(4096, dtype=dtype)
        first, *others = [bits(kernel_sum(isa, rows, groups, biases, like)) for isa in ISAS]
        for other in others:
            assert torch.equal(first, other)


@each_isa
@each_dtype
@each_store
def test_the_sum_of_one_row_is_a_copy_of_its_bits(
    isa: str, dtype: torch.dtype, streaming: bool
) -> None:
    (row,) = wild_rows(1, 2000, dtype, seed=1)
    for groups, rows, biases in ([1], [row], []), ([0, 1], [row], []), ([0], [], [row]):
        actual = kernel_sum(isa, rows, groups, biases, row, streaming)
        assert torch.equal(bits(actual), bits(row))


@each_isa
@each_dtype
def test_a_nan_sum_is_the_positive_quiet_nan(isa: str, dtype: torch.dtype) -> None:
    canonical = bits(torch.tensor([torch.nan], dtype=dtype))
    negative = bits(torch.full((64,), -torch.inf, dtype=dtype)) | 1  # signalling, with a payload
    zeros = torch.zeros(64, dtype=dtype)
    for rows in ([negative.view(dtype), zeros], [zeros + torch.inf, zeros - torch.inf]):
        actual = kernel_sum(isa, rows, [2], [], zeros)
        assert torch.equal(bits(actual), canonical.expand(64))


@each_isa
def test_bfloat16_rounds_once_and_to_even(isa: str) -> None:
    # 1 + 2^-8 lies between 1 and 1 + 2^-7: the tie goes to even. 2^-9 twice is lost if each sum is
    # rounded, and makes the same tie if only the last is; a third one decides it upwards.
    one, small = (
        torch.ones(8, dtype=torch.bfloat16),
        torch.full((8,), 2.0**-9, dtype=torch.bfloat16),
    )
    assert torch.equal(kernel_sum(isa, [one, small, small], [3], [], one), one)
    expected = torch.full((8,), 1 + 2.0**-7, dtype=torch.bfloat16)
    assert torch.equal(kernel_sum(isa, [one, small, small, small], [4], [], one), expected)


@each_isa
def test_groups_are_added_inside_first(isa: str) -> None:
    # In float32 (1e8 + 1) - 1e8 = 0, and 1e8 + (1 - 1e8) = 0 too, but (1e8 - 1e8) + 1 = 1.
    big, one = torch.full((4,), 1e8), torch.ones(4)
    assert torch.equal(kernel_sum(isa, [big, -big, one], [3], [], one), one)
    assert torch.equal(kernel_sum(isa, [one, big, -big], [1, 2], [], one), one)
    assert torch.equal(kernel_sum(isa, [one, big, -big], [3], [], one), torch.zeros(4))
    assert torch.equal(kernel_sum(isa, [-big, one], [1, 1], [big], one), one)
    assert torch.equal(kernel_sum(isa, [one, -big], [1, 1], [big], one), torch.zeros(4))


@each_isa
@each_dtype
@each_store
def test_the_output_may_be_one_of_the_rows(isa: str, dtype: torch.dtype, streaming: bool) -> None:
    for num_bytes, place in itertools.product([16, 240, 2000, 2048], [0, 1, 2]):
        rows = normal_rows(3, num_bytes // dtype.itemsize, dtype, num_bytes)
        expected = reference_sum(rows, [3], [], rows[0])
        addresses = [row.data_ptr() for row in rows]
        _cpu.reduce_rows(
            isa, str(dtype)[6:], addresses[place], addresses, [3], [], rows[0].numel(), streaming
        )
        assert_same(rows[place], expected)


@each_isa
@each_store
def test_copy_moves_every_byte_and_no_other(isa: str, streaming: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_bytes, misalignment in itertools.product([0, *ROW_BYTES], [0, 1, 8, 16, 48]):
        row = torch.randint(0, 256, (num_bytes + 1,), generator=generator, dtype=torch.uint8)[1:]
        out = Output(num_bytes, misalignment)
        _cpu.copy_row(isa, out.address, row.data_ptr(), num_bytes, streaming)
        assert torch.equal(out.read(torch.uint8), row)


def test_bad_arguments_are_named() -> None:
    row = torch.zeros(16, dtype=torch.bfloat16)
    address = row.data_ptr()
    with pytest.raises(ValueError, match=r"copy_row: expected isa to be one of .*, got mmx"):
        _cpu.copy_row("mmx", address, address, 32, False)
    with pytest.raises(ValueError, match=r"copy_row: .* multiple of 16 bytes, got 24"):
        _cpu.copy_row("baseline", address, address, 24, False)
    with pytest.raises(ValueError, match=r"reduce_rows: expected dtype .*, got int8"):
        _cpu.reduce_rows("baseline", "int8", address, [address], [1], [], 16, False)
    with pytest.raises(ValueError, match=r"reduce_rows: .* multiple of 16 bytes, got 20"):
        _cpu.reduce_rows("baseline", "float32", address, [address], [1], [], 5, False)
    with pytest.raises(ValueError, match=r"reduce_rows: .* group_ends to be 2, .*, got 1"):
        _cpu.reduce_rows("baseline", "bfloat16", address, [address] * 2, [1], [], 16, False)
    with pytest.raises(ValueError, match=r"reduce_rows: .* ascend from 0, got 1 after 2"):
        _cpu.reduce_rows("baseline", "bfloat16", address, [address], [2, 1], [], 16, False)
    with pytest.raises(ValueError, match=r"reduce_rows: .* bias_ptrs to hold at most 2, got 3"):
        _cpu.reduce_rows("baseline", "bfloat16", address, [], [], [address] * 3, 16, False)
