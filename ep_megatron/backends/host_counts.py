"""What ranks of several hosts tell each other of their routing before rows move.

In a small group everybody hears everything: R + E numbers from each rank to each. That grows with
the square of the group, so in a large one a rank tells others only what concerns their host, and
asks its gateway there where its rows start: as many numbers in all as there are ranks and experts,
times the ranks of a host, for one more message each way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_megatron.backends.host_plan import Counts, HostPlan
from ep_megatron.backends.wire import Message, Transfer, Wire
from ep_megatron.hosts import MANY_COUNTS


def tellings(plan: HostPlan) -> Sequence[Tensor]:
    """Return what to tell every rank when all agree on a dispatch."""
    if not _is_large(plan):
        return [plan.counts] * plan.num_ranks
    by_host = [plan.telling(host) for host in range(plan.hosts.num_hosts)]
    return [by_host[host] for host in plan.hosts.host_of]


def counts_of(operation: str, plan: HostPlan, told: Tensor, wire: Wire) -> Counts:
    """Return what a rank must know, of the `tellings` of all; collective.

    Raises:
        LateError: naming ranks that did not answer.
    """
    if not _is_large(plan):
        return plan.all_counts(told)
    answers, receives = [], []
    for host in range(plan.hosts.num_hosts):
        if host == plan.host:
            answers.append(plan.answer(told, plan.rank))
            continue
        answers.append(torch.empty(2, plan.num_places(host), dtype=torch.int32))
        gateway = plan.hosts.gateway(plan.rank, host)
        receives.append(Transfer(gateway, Message.COUNTS, answers[host]))
    sends = [
        Transfer(source, Message.COUNTS, plan.answer(told, source).contiguous())
        for source in plan.hosts.served_by(plan.rank)
    ]
    wire.exchange(operation, receives, sends)
    return plan.counts_of_answers(told, answers)


def _is_large(plan: HostPlan) -> bool:
    return plan.num_ranks + plan.routing.num_experts >= MANY_COUNTS
