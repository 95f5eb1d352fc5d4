"""Make a schedule by name, refuse a wrong one before it runs, and say what memory it needs."""

from collections.abc import Callable

from ep_megatron.pipeline.action import Action, Kind, Schedule, parse_action
from ep_megatron.pipeline.check import check, peak_activations
from ep_megatron.pipeline.generators import dual_pipe, interleaved, one_f_one_b, zero_bubble_v

__all__ = [
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "check",
    "make_schedule",
    "parse_action",
    "peak_activations",
]

SCHEDULES = {
    "1f1b": "one forward, one backward",
    "interleaved": "1F1B over several chunks per rank",
    "interleaved-overlap": "the same, forwards and backwards in pairs (Megatron's combined 1F1B)",
    "zb1p": "1F1B with the weights' half of backward filling bubbles (ZB-H1)",
    "zbv": "zero bubble on a V of two chunks per rank",
    "dualpipe": "pairs, micro-batches from both ends, two copies of every stage",
    "dualpipev": "DualPipe cut in half: pairs on a V, one copy",
}
"""Names and what they are."""


def make_schedule(
    name: str, pipeline_parallel: int, num_microbatches: int, num_chunks: int | None = None
) -> Schedule:
    """Write down a published schedule.

    Args:
        name: one of `SCHEDULES`.
        pipeline_parallel: pipeline ranks P.
        num_microbatches: M; of both directions together for `dualpipe`.
        num_chunks: model chunks per rank; a choice for the interleaved ones only (2, or 1 for
            `interleaved-overlap` on one rank, where it is Megatron's combined schedule without a
            pipeline), else what the schedule has.

    Raises:
        ValueError: for an unknown name or numbers that the schedule is not made for.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"make_schedule: expected name to be one of {', '.join(SCHEDULES)}, got {name!r}"
        )
    for argument, value in (
        ("pipeline_parallel", pipeline_parallel),
        ("num_microbatches", num_microbatches),
    ):
        if value < 1:
            raise ValueError(f"make_schedule: expected {argument} to be at least 1, got {value}")
    chunks = _num_chunks(name, pipeline_parallel, num_chunks)
    _check_microbatches(name, pipeline_parallel, num_microbatches)
    num_ranks, ranks = pipeline_parallel, range(pipeline_parallel)
    stages: tuple[tuple[int, ...], ...]
    if name == "dualpipe":
        stages = tuple((rank, num_ranks - 1 - rank) for rank in ranks)
    elif name in ("zbv", "dualpipev"):
        stages = tuple((rank, 2 * num_ranks - 1 - rank) for rank in ranks)
    else:
        stages = tuple(tuple(c * num_ranks + rank for c in range(chunks)) for rank in ranks)
    generate = _generator(name, num_ranks, num_microbatches, chunks)
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        stages=stages,
        directions=(0, 1) if name == "dualpipe" else (0,) * chunks,
        actions=tuple(tuple(generate(rank)) for rank in ranks),
    )


def _num_chunks(name: str, num_ranks: int, asked: int | None) -> int:
    if name.startswith("interleaved"):
        alone = name == "interleaved-overlap" and num_ranks == 1
        chunks = asked if asked is not None else (1 if alone else 2)
        if chunks < (1 if alone else 2):
            raise ValueError(
                f"make_schedule: expected num_chunks of {name} to be at least 2, got {chunks}; "
                "with one chunk per rank use 1f1b"
            )
        return chunks
    chunks = 1 if name in ("1f1b", "zb1p") else 2
    if asked not in (None, chunks):
        raise ValueError(
            f"make_schedule: expected num_chunks of {name} to be {chunks}, got {asked}"
        )
    return chunks


def _check_microbatches(name: str, num_ranks: int, num_microbatches: int) -> None:
    wrong = None
    if name.startswith("interleaved") and num_microbatches % num_ranks:
        wrong = f"a multiple of pipeline_parallel ({num_ranks})"
    elif name == "dualpipev" and num_microbatches < 2 * num_ranks:
        wrong = f"at least 2 * pipeline_parallel ({2 * num_ranks})"
    elif name == "dualpipe":
        if num_ranks % 2:
            raise ValueError(
                f"make_schedule: expected pipeline_parallel of dualpipe to be even, got {num_ranks}"
                "; dualpipev takes any"
            )
        if num_microbatches % 2 or num_microbatches < 2 * num_ranks:
            wrong = f"even and at least 2 * pipeline_parallel ({2 * num_ranks})"
    if wrong:
        raise ValueError(
            f"make_schedule: expected num_microbatches of {name} to be {wrong}, "
            f"got {num_microbatches}"
        )


def _generator(
    name: str, num_ranks: int, num_microbatches: int, num_chunks: int
) -> Callable[[int], list[Action]]:
    """Return what writes one rank's actions."""

    def both_ends(rank: int) -> list[Action]:
        near = int(rank >= num_ranks // 2)
        position = min(rank, num_ranks - 1 - rank)
        each = num_microbatches // 2
        return dual_pipe(num_ranks // 2, position, each, (0, each), near)

    generators: dict[str, Callable[[int], list[Action]]] = {
        "1f1b": lambda rank: one_f_one_b(num_ranks, rank, num_microbatches, split=False),
        "zb1p": lambda rank: one_f_one_b(num_ranks, rank, num_microbatches, split=True),
        "interleaved": lambda rank: interleaved(
            num_ranks, rank, num_microbatches, num_chunks, overlap=False
        ),
        "interleaved-overlap": lambda rank: interleaved(
            num_ranks, rank, num_microbatches, num_chunks, overlap=True
        ),
        "zbv": lambda rank: zero_bubble_v(num_ranks, rank, num_microbatches),
        "dualpipe": both_ends,
        "dualpipev": lambda rank: dual_pipe(num_ranks, rank, num_microbatches, (0, 0), near=0),
    }
    return generators[name]
