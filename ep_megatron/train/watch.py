"""What the dispatchers of a run wait for, and how evenly experts are used."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from ep_megatron.statistics import BufferStatistics, expert_loads, load_sentences, wait_table

_MOST_RANKS = 16  # of a group whose table is read by people
Groups = Mapping[tuple[int, ...], list[BufferStatistics]]


def gather_statistics() -> Groups:
    """Return the statistics of all expert-parallel groups, by their ranks in the run; collective.

    Empty where another dispatcher is used.
    """
    from ep_megatron.megatron.token_dispatcher import shared_buffers

    mine = [
        (tuple(dist.get_process_group_ranks(buffer.group)), buffer.statistics().to_json())
        for buffer in shared_buffers()
        if buffer.is_counting
    ]
    everyone: list[list[tuple[tuple[int, ...], Any]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    groups: dict[tuple[int, ...], list[BufferStatistics]] = {}
    for found in everyone:
        for ranks, value in found:
            groups.setdefault(ranks, []).append(BufferStatistics.from_json(value))
    return groups


def watch_scalars(groups: Groups) -> dict[str, float]:
    """Return means since the start of the run, for TensorBoard."""
    scalars: dict[str, float] = {}
    for name in ("dispatch", "combine"):
        calls = [s.operations[name] for found in groups.values() for s in found]
        num_calls = sum(one.num_calls for one in calls)
        if num_calls:
            waited = sum(one.seconds_waiting for one in calls)
            moved = sum(peer.num_bytes for one in calls for peer in one.peers)
            scalars[f"wait-ms-per-{name}"] = 1e3 * waited / num_calls
            scalars[f"bytes-per-{name}"] = moved / num_calls
    loads = [load for found in groups.values() for load in expert_loads(found).values()]
    if loads and all(sum(load) for load in loads):
        scalars["expert-load-max-over-mean"] = max(max(n) * len(n) / sum(n) for n in loads)
    return scalars


def watch_report(groups: Groups) -> str:
    """Return who was slow, who waited for whom, and how experts were used, for people."""
    lines = []
    for ranks, found in groups.items():
        names = ", ".join(map(str, ranks))
        lines.append(f"expert-parallel group of ranks {names} (numbered from 0 in it):")
        lines += [f"  {sentence}" for sentence in (*found[0].slow_ranks(), *load_sentences(found))]
        for name in ("dispatch", "combine") if len(ranks) <= _MOST_RANKS else ():
            lines += [f"  {line}" for line in wait_table(found, name).splitlines()]
    return "\n".join(lines)
