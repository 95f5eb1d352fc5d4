"""Random programs of calls of a Buffer, and what each must give, in plain tensor math.

A program is routings and a list of steps: dispatches fresh and cached, combines, waits. Handles of
earlier steps stay in use, calls are queued or not. It is a value of small numbers, so that one that
fails shrinks. Every rank works out every rank's inputs, and from them what it must receive.
"""

import functools
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from ep_megatron import fp8
from ep_megatron.fp8 import FP8, INPUT_DTYPES, MXFP8, Fp8Recipe
from tests.routing import Case, expected_rows

SUM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.float64)
RECIPES = (
    FP8,
    replace(FP8, scales="ue8m0", layout="column_major"),
    replace(FP8, scales="packed_ue8m0"),
    MXFP8,
    replace(MXFP8, scales="packed_ue8m0", layout="column_major", min_amax=fp8.TINY_AMAX),
)


@dataclass(frozen=True)
class DrawnCase(Case):
    """A routing given slot by slot: `slots[rank][token]` K experts, all of it `tile` times."""

    slots: tuple[tuple[tuple[int, ...], ...], ...] = ()
    tile: int = 1

    def topk_idx(self, rank: int) -> Tensor:
        idx = torch.tensor(self.slots[rank], dtype=self.idx_dtype).view(-1, self.num_topk)
        return idx.repeat(self.tile, 1)


@dataclass(frozen=True)
class Payload:
    """Rows of a dispatch: cast by `recipe` on the way, or before by the caller."""

    hidden: int
    dtype: torch.dtype = torch.float32
    recipe: Fp8Recipe | None = None
    is_cast_by_caller: bool = False
    widen_to: torch.dtype | None = None

    def rows(self, num_tokens: int, seed: int) -> Tensor:
        """Return `[num_tokens, H]` before any cast."""
        return numbers((num_tokens, self.hidden), self.dtype, seed)

    @property
    def row_major(self) -> Fp8Recipe:
        assert self.recipe is not None
        return replace(self.recipe, layout="row_major")


@dataclass(frozen=True)
class Dispatch:
    """A dispatch: fresh along routing `of`, or cached with the handle of fresh dispatch `of`."""

    of: int
    is_cached: bool
    payload: Payload
    expand: bool = False
    alignment: int = 1
    weights: torch.dtype | None = None
    spare_rows: int | None = None  # num_worst_tokens is the most rows of a rank, and these
    is_async: bool = False


@dataclass(frozen=True)
class Combine:
    """A combine with the handle of fresh dispatch `of`."""

    of: int
    hidden: int
    dtype: torch.dtype
    weights: torch.dtype | None = None
    num_biases: int = 0
    is_of_received: bool = False  # the rows are what the dispatch brought, if it can be summed
    is_strided: bool = False
    is_async: bool = False


@dataclass(frozen=True)
class Wait:
    """Wait for the event of step `of`."""

    of: int


Step = Dispatch | Combine | Wait


@dataclass(frozen=True)
class Program:
    num_ranks: int
    routings: tuple[DrawnCase, ...]
    steps: tuple[Step, ...]

    def fresh(self) -> list[int]:
        """Return the numbers of the steps that make handles."""
        return [
            at
            for at, step in enumerate(self.steps)
            if isinstance(step, Dispatch) and not step.is_cached
        ]

    def maker(self, at: int) -> int:
        """Return the fresh dispatch whose handle step `at` makes or uses."""
        step = self.steps[at]
        if isinstance(step, Dispatch) and not step.is_cached:
            return at
        makers = [maker for maker in self.fresh() if maker < at]
        return makers[step.of % len(makers)]

    def case(self, at: int) -> DrawnCase:
        """Return the routing of step `at`, with the alignment of its handle."""
        maker = self.steps[self.maker(at)]
        assert isinstance(maker, Dispatch)
        return replace(self.routings[maker.of % len(self.routings)], alignment=maker.alignment)

    def expand(self, at: int) -> bool:
        maker = self.steps[self.maker(at)]
        assert isinstance(maker, Dispatch)
        return maker.expand


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return numbers of very different sizes, with zeros of both signs; of integers all bits."""
    rng = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.int64).to(dtype)
    values = torch.randn(shape, generator=rng, dtype=torch.float64)
    values *= torch.exp2(torch.randint(-12, 4, shape, generator=rng))
    values.view(-1)[::7], values.view(-1)[::11] = -0.0, 0.0
    return values.to(dtype)


def seed_of(at: int, rank: int, what: int = 0) -> int:
    return (at * 16 + rank) * 8 + what


# -- what must come out -------------------------------------------------------------------------


@functools.cache
def rows_of(case: DrawnCase, rank: int, expand: bool) -> list[tuple[int, int, int] | None]:
    return expected_rows(case, rank, expand).rows


def gather(sources: list[Tensor], rows: list[tuple[int, int, int] | None]) -> Tensor:
    """Pick `sources[source][token]` for each row; zeros for padding."""
    starts = torch.tensor([0, *(len(source) for source in sources)]).cumsum(0).tolist()
    zero = sources[0].new_zeros(1, *sources[0].shape[1:])
    at = [starts[-1] if row is None else starts[row[0]] + row[1] for row in rows]
    everything = torch.cat([part.view(torch.uint8) for part in (*sources, zero)])
    return everything[torch.tensor(at, dtype=torch.int64)].view(sources[0].dtype)


def expected_x(program: Program, at: int, rank: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows, and scales, that dispatch `at` must bring to `rank`."""
    step, case = program.steps[at], program.case(at)
    assert isinstance(step, Dispatch)
    payload, rows = step.payload, rows_of(case, rank, program.expand(at))
    sent = [payload.rows(n, seed_of(at, source)) for source, n in enumerate(case.num_tokens)]
    if payload.recipe is None:
        return gather(sent, rows), None
    pairs = [fp8.quantize(x, payload.row_major) for x in sent]
    data = gather([pair[0] for pair in pairs], rows)
    scales = gather([pair[1] for pair in pairs], rows)
    if payload.widen_to is None:
        return data, scales
    return fp8.dequantize(data, scales, payload.widen_to), None


def expected_weights_and_idx(
    program: Program, at: int, rank: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights and expert ids that dispatch `at` must bring to `rank`."""
    step, case, expand = program.steps[at], program.case(at), program.expand(at)
    assert isinstance(step, Dispatch)
    rows, first = rows_of(case, rank, expand), rank * case.experts_per_rank
    idx = gather([case.topk_idx(source) for source in range(case.num_ranks)], rows) - first
    is_local = (idx >= 0) & (idx < case.experts_per_rank)
    recv_idx = None if expand or step.is_cached else idx.where(is_local, -1)
    if step.weights is None:
        return None, recv_idx
    sent = [sent_weights(program, at, source) for source in range(case.num_ranks)]
    weights = gather(sent, rows)
    if not expand:
        return weights.masked_fill(~is_local, 0), recv_idx
    slots = torch.tensor([0 if row is None else row[2] for row in rows], dtype=torch.int64)
    return weights.gather(1, slots[:, None])[:, 0], None


def sent_weights(program: Program, at: int, rank: int) -> Tensor:
    """Return the weights `[T, K]` that go with dispatch `at`."""
    step, case = program.steps[at], program.case(at)
    assert isinstance(step, Dispatch)
    assert step.weights is not None
    return numbers((case.num_tokens[rank], case.num_topk), step.weights, seed_of(at, rank, 1))


def combined_rows(program: Program, at: int, rank: int) -> Tensor:
    """Return the rows that combine `at` gets on `rank`."""
    step, case = program.steps[at], program.case(at)
    assert isinstance(step, Combine)
    if step.is_of_received:
        rows, scales = expected_x(program, program.maker(at), rank)
        if scales is None and rows.dtype in SUM_DTYPES:
            return rows
    shape = (len(rows_of(case, rank, program.expand(at))), step.hidden)
    return numbers(shape, step.dtype, seed_of(at, rank))


def combined_weights(program: Program, at: int, rank: int) -> Tensor | None:
    """Return the weights that combine `at` gets on `rank`."""
    step, case, expand = program.steps[at], program.case(at), program.expand(at)
    assert isinstance(step, Combine)
    num_rows = len(rows_of(case, rank, expand))
    shape = (num_rows,) if expand else (num_rows, case.num_topk)
    return None if step.weights is None else numbers(shape, step.weights, seed_of(at, rank, 1))


def biases_of(program: Program, at: int, rank: int, like: Tensor) -> list[Tensor]:
    """Return the biases that combine `at` gets on `rank`."""
    step = program.steps[at]
    assert isinstance(step, Combine)
    shape = (program.case(at).num_tokens[rank], like.shape[1])
    return [numbers(shape, like.dtype, seed_of(at, rank, 2 + i)) for i in range(step.num_biases)]


def expected_sums(
    program: Program, at: int, rank: int, hosts: list[list[int]], is_rounded: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what combine `at` must give on `rank`.

    The biases, then host after host; a host's part is its ranks' parts, one after the other, and a
    rank's part its rows in slot order. Everything in float32 or float64, a host's part rounded to
    the dtype of the rows if `is_rounded`.
    """
    case, everyone = program.case(at), range(program.num_ranks)
    ys = [combined_rows(program, at, other) for other in everyone]
    dtype, wide = ys[0].dtype, torch.promote_types(ys[0].dtype, torch.float32)
    total = torch.full((case.num_tokens[rank], ys[0].shape[1]), -0.0, dtype=wide)
    biases = biases_of(program, at, rank, ys[0])
    for bias in biases:
        total += bias.to(wide)
    is_summed = torch.zeros(len(total), dtype=torch.bool)
    for host in hosts:
        part, is_here = part_of(program, at, rank, host, ys, wide)
        total[is_here] += part[is_here].to(dtype if is_rounded else wide).to(wide)
        is_summed |= is_here
    if not biases:
        total[~is_summed] = 0
    given = [combined_weights(program, at, other) for other in everyone]
    weights = [w for w in given if w is not None]
    if not weights:
        return total.to(dtype), None
    return total.to(dtype), expected_weight_sums(program, at, rank, hosts, weights)


def expected_weight_sums(
    program: Program, at: int, rank: int, hosts: list[list[int]], weights: list[Tensor]
) -> Tensor:
    """Return `[T, K]`: of expert-major rows each slot's, else the sum of the ranks' columns."""
    case = program.case(at)
    shape = (case.num_tokens[rank], case.num_topk)
    if program.expand(at):
        total = torch.zeros(shape, dtype=weights[0].dtype)
        for other, given in enumerate(weights):
            for place, row in enumerate(rows_of(case, other, True)):
                if row is not None and row[0] == rank:
                    total[row[1], row[2]] = given[place]
        return total
    total = torch.full(shape, -0.0, dtype=weights[0].dtype)
    is_summed = torch.zeros(len(total), dtype=torch.bool)
    for host in hosts:
        part, is_here = part_of(program, at, rank, host, weights, total.dtype)
        total[is_here] += part[is_here]
        is_summed |= is_here
    total[~is_summed] = 0
    return total


def part_of(
    program: Program, at: int, rank: int, host: list[int], ys: list[Tensor], wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what the ranks of a host add to the tokens of `rank`, and to which tokens."""
    case, expand = program.case(at), program.expand(at)
    total = torch.full((case.num_tokens[rank], ys[0].shape[1]), -0.0, dtype=wide)
    is_here = torch.zeros(len(total), dtype=torch.bool)
    for other in host:
        of_rank, in_rank = torch.full_like(total, -0.0), torch.zeros_like(is_here)
        for slot in range(case.num_topk) if expand else (-1,):
            found = [
                (row[1], place)
                for place, row in enumerate(rows_of(case, other, expand))
                if row is not None and row[0] == rank and row[2] == slot
            ]
            tokens, places = torch.tensor(found, dtype=torch.int64).view(-1, 2).unbind(1)
            of_rank[tokens] += ys[other][places].to(wide)
            in_rank[tokens] = True
        total[in_rank] += of_rank[in_rank]
        is_here |= in_rank
    return total, is_here


# -- how they are drawn -------------------------------------------------------------------------


@st.composite
def routings(draw: st.DrawFn, num_ranks: int) -> DrawnCase:
    num_topk, experts_per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    expert = st.integers(-1, num_ranks * experts_per_rank - 1)
    tokens = st.lists(st.tuples(*[expert] * num_topk), max_size=6)
    slots = tuple(tuple(draw(tokens)) for _ in range(num_ranks))
    tile = draw(st.sampled_from((1, 1, 1, 30)))
    return DrawnCase(
        "drawn",
        tuple(len(tokens) * tile for tokens in slots),
        num_topk,
        experts_per_rank,
        idx_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        slots=slots,
        tile=tile,
    )


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    if draw(st.booleans()):
        dtypes = (*SUM_DTYPES, torch.uint8, torch.int32)
        return Payload(
            draw(st.sampled_from((16, 48, 144, 512))), draw(st.sampled_from(dtypes[::-1]))
        )
    return Payload(
        draw(st.sampled_from((512, 1024))),
        draw(st.sampled_from(INPUT_DTYPES)),
        draw(st.sampled_from(RECIPES)),
        draw(st.booleans()),
        draw(st.sampled_from((None, *INPUT_DTYPES))),
    )


@st.composite
def dispatches(draw: st.DrawFn, is_cached: st.SearchStrategy[bool]) -> Dispatch:
    expand = draw(st.booleans())
    return Dispatch(
        of=draw(st.integers(0, 3)),
        is_cached=draw(is_cached),
        payload=draw(payloads()),
        expand=expand,
        alignment=draw(st.sampled_from((1, 2, 3, 8))),
        weights=draw(st.sampled_from((None, *WEIGHT_DTYPES))),
        spare_rows=draw(st.sampled_from((None, None, 0, 3))),
        is_async=draw(st.booleans()),
    )


COMBINES = st.builds(
    Combine,
    of=st.integers(0, 3),
    hidden=st.sampled_from((16, 40, 144)),
    dtype=st.sampled_from(SUM_DTYPES),
    weights=st.sampled_from((None, *WEIGHT_DTYPES)),
    num_biases=st.integers(0, 2),
    is_of_received=st.booleans(),
    is_strided=st.booleans(),
    is_async=st.booleans(),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    num_ranks = draw(st.sampled_from((2, 3, 4, 1)))
    first = draw(dispatches(st.just(False)))
    later = st.one_of(COMBINES, dispatches(st.booleans()), st.builds(Wait, st.integers(0, 7)))
    return Program(
        num_ranks,
        tuple(draw(st.lists(routings(num_ranks), min_size=1, max_size=2))),
        (first, *draw(st.lists(later, max_size=7))),
    )
