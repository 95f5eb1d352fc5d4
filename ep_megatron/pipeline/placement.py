"""Where a schedule's stages live, in terms of what a megatron-core GPT chunk is built with.

Megatron numbers the stage of virtual chunk c on pipeline rank r as `c * P + r`. A V has its second
half in reverse order. Here the *first* chunk is built as if its rank were `P - 1 - r`: the V stands
upside down, with embedding and loss on the last rank, which is where Megatron looks for the loss.
Only the pipeline group that the chunk is built with says so; nothing inside Megatron is changed.

For `dualpipe` the second chunk holds the stage of rank `P - 1 - r` of a plain pipeline once more.

Source: a group that answers another rank while a model is built is our own way; MindSpeed and
Primus place a V by replacing functions of Megatron.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_megatron.pipeline.action import Action, Kind, Schedule
from ep_megatron.pipeline.p2p import swap
from ep_megatron.pipeline.schedule import make_schedule

V_SHAPED = ("zbv", "dualpipev")


class MirroredGroup:
    """A pipeline group whose ranks count from the other end; for building and finalising only."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def rank(self) -> int:
        """Return `P - 1 - r`."""
        return self.size() - 1 - self.group.rank()

    def size(self) -> int:
        """Return P."""
        return self.group.size()


class GroupOfOne:
    """A group with this rank alone, over which Megatron finds nothing to reduce."""

    def rank(self) -> int:
        """Return 0."""
        return 0

    def size(self) -> int:
        """Return 1."""
        return 1


class _HalfOfTwo:
    """A pipeline group of two, seen by one of its ranks; for building only."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


def groups_of_half(groups: Any, half: int) -> Any:
    """Return process groups to build half a V with where one rank has both.

    Megatron has no virtual stages without a pipeline, so each half is built as a rank of two.

    Args:
        groups: the ProcessGroupCollection of the model; not changed.
        half: 0 or 1.
    """
    its_groups = copy.copy(groups)
    its_groups.pp, its_groups.embd, its_groups.pos_embd = _HalfOfTwo(half), None, None
    return its_groups


@dataclass(frozen=True)
class ChunkPlacement:
    """What to build one chunk with, by the names of GPTModel's arguments.

    Attributes:
        pre_process: the chunk has the embedding.
        post_process: the chunk has the head and the loss.
        vp_stage: virtual stage, None where Megatron has no virtual stages.
        pg_collection: the process groups.
        pp_rank: for the functions that make layer specs.
    """

    pre_process: bool
    post_process: bool
    vp_stage: int | None
    pg_collection: Any
    pp_rank: int

    def model_arguments(self) -> dict[str, Any]:
        """Return GPTModel's keyword arguments."""
        return {
            "pre_process": self.pre_process,
            "post_process": self.post_process,
            "vp_stage": self.vp_stage,
            "pg_collection": self.pg_collection,
        }


def schedule_for(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Return a schedule as it is placed on Megatron's ranks.

    Args:
        name: see `make_schedule`.
        num_ranks: pipeline ranks.
        num_microbatches: of the step.
        num_chunks: model chunks per rank.

    Raises:
        ValueError: see `make_schedule`.
    """
    asked = num_chunks if name.startswith("interleaved") else None
    schedule = make_schedule(name, num_ranks, num_microbatches, asked)
    return schedule.mirrored() if name in V_SHAPED else schedule


def forwards_of(schedule: Schedule, num_microbatches: int) -> Schedule:
    """Return a schedule of forwards alone with the places of `schedule`, for evaluation.

    Chunk after chunk, all micro-batches of each; where they run both ways, in turn.

    Args:
        schedule: of any number of micro-batches.
        num_microbatches: of the evaluation.
    """
    empty = dataclasses.replace(schedule, num_microbatches=num_microbatches)
    chunks = range(schedule.num_chunks)
    all_of = [[Action(Kind.F, c, m) for m in empty.microbatches_of(c)] for c in chunks]
    two_ways = schedule.num_directions > 1

    def forwards(stages: tuple[int, ...]) -> tuple[Action, ...]:
        if two_ways:
            return tuple(action for pair in zip(*all_of, strict=True) for action in pair)
        order = sorted(chunks, key=lambda chunk: stages[chunk])
        return tuple(action for chunk in order for action in all_of[chunk])

    return dataclasses.replace(empty, actions=tuple(map(forwards, schedule.stages)))


def num_virtual_chunks(name: str) -> int | None:
    """Return the `virtual_pipeline_model_parallel_size` that a schedule needs.

    None where it needs none; the interleaved ones take any of at least 2.
    """
    return 2 if name in V_SHAPED or name == "interleaved" else None


def num_models(name: str, virtual_size: int | None) -> int:
    """Return how many chunks a rank builds."""
    return 2 if name == "dualpipe" else (virtual_size or 1)


def place_chunk(name: str, chunk: int, config: Any, pg_collection: Any) -> ChunkPlacement:
    """Return what to build chunk `chunk` of this rank with. Not collective.

    Args:
        name: of the schedule.
        chunk: index of the chunk.
        config: TransformerConfig.
        pg_collection: Megatron's ProcessGroupCollection of the whole model.

    Raises:
        ValueError: if the config cannot be placed so.
    """
    group = pg_collection.pp
    size, rank = group.size(), group.rank()
    virtual = config.virtual_pipeline_model_parallel_size
    is_v, is_two_way = name in V_SHAPED, name == "dualpipe"
    if is_v or is_two_way:
        _check_placeable(name, config)
        if chunk == (0 if is_v else 1):
            pg_collection = copy.copy(pg_collection)
            pg_collection.pp, rank = MirroredGroup(group), size - 1 - rank
        # Embedding and head are on one rank: Megatron's sum over first and last rank does not fit.
        pg_collection = copy.copy(pg_collection)
        pg_collection.embd = pg_collection.pos_embd = None
    stage = rank if is_two_way or not virtual else chunk * size + rank
    num_stages = size if is_two_way else size * (virtual or 1)
    return ChunkPlacement(
        pre_process=stage == 0,
        post_process=stage == num_stages - 1,
        vp_stage=chunk if virtual and not is_two_way else None,
        pg_collection=pg_collection,
        pp_rank=rank,
    )


def _check_placeable(name: str, config: Any) -> None:
    wanted = num_virtual_chunks(name)
    if config.virtual_pipeline_model_parallel_size != wanted:
        raise ValueError(
            f"pipeline: expected virtual_pipeline_model_parallel_size of {name} to be {wanted}, "
            f"got {config.virtual_pipeline_model_parallel_size}"
        )
    if config.pipeline_model_parallel_layout:
        raise ValueError(
            f"pipeline: expected pipeline_model_parallel_layout of {name} to be left out, got "
            f"{config.pipeline_model_parallel_layout}; Megatron looks it up by the global pipeline "
            "rank"
        )


def join_chunks(
    name: str, models: list[Any], pp_group: dist.ProcessGroup, timeout: float = 600.0
) -> None:
    """Make parameters that stand for one and the same equal; call it before an optimizer is made.

    Collective over the pipeline ranks. With tied embeddings on a V or two ways, the head gets the
    embedding's weight; with multi-token prediction, the embedding beside the loss does. Two ways,
    the second copy of each stage gets the first one's parameters and buffers, and is marked as
    shared, so that norms of gradients count it once.

    Args:
        name: of the schedule.
        models: this rank's chunks, wrapped or not.
        pp_group: the pipeline ranks.
        timeout: seconds to wait for the rank with the other copies.

    Raises:
        RuntimeError: naming that rank, if it is late or gone.
    """
    from megatron.core.utils import unwrap_model

    chunks = unwrap_model(list(models))
    if name == "dualpipe":
        first, second = chunks
        mine = [*first.parameters(), *first.buffers()]
        copies = [*second.parameters(), *second.buffers()]
        swap(pp_group, [t.data for t in mine], [t.data for t in copies], timeout)
        for parameter in second.parameters():
            parameter.shared = True
    with torch.no_grad():
        for embedding, head in tied_pairs(chunks):
            head.data.copy_(embedding.data)


def has_joined_ends(schedule: Schedule) -> bool:
    """Return whether the first and the last stage are on one rank, in different chunks."""
    return schedule.num_chunks > 1 and all(
        schedule.rank_of(0, direction) in schedule.loss_ranks
        for direction in range(schedule.num_directions)
    )


def tied_pairs(chunks: list[Any]) -> list[tuple[Any, Any]]:
    """Return pairs of weights on this rank that are two tensors for one parameter.

    The embedding of the first stage, and that of the last one's multi-token prediction, or where
    embedding and head are tied and there is none, the head.
    """
    return [
        (one.shared_embedding_or_output_weight(), other.shared_embedding_or_output_weight())
        for one in chunks
        for other in chunks
        if one.pre_process and other.post_process and one is not other
        if one.share_embeddings_and_output_weights or other.mtp_process
    ]
