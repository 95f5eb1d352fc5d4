"""What dispatch and combine move, hold and roughly take from 8 to thousands of ranks, on paper.

Routing is uniform: a token's K experts are drawn without replacement from all, or from those of
`max_nodes` nodes drawn first. R ranks in N nodes (NVLink domains) of G, E experts, T tokens of a
rank, H hidden. Bytes are those that leave one rank in one call, unless said otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ep_megatron.config import MAX_CHUNKS, BufferConfig
from ep_megatron.hosts import MANY_COUNTS
from ep_megatron.sizes import Config, default_config, low_latency_size_hint

_BLOCK = 128  # columns of a scale
_POST_BYTES = 688  # of a rank's word on a call, beside its counts (csrc/cuda/protocol.h)
SLOT_BYTES = 3 * 4 + 4  # route and weight that travel between nodes for each slot
ROW_BYTES = 4 + 8  # weight and link that travel inside a node with each expert's row
_DEEPEP_SMS = 20
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Fabric:
    """Published speeds of a kind of machine, and what is assumed of them.

    Attributes:
        name: of the machine.
        ranks_per_node: G, GPUs that load and store each other's memory.
        nvlink: bytes per second that leave a GPU.
        network: likewise, to other nodes.
        efficiency: (low, high) share of these that long transfers reach.
        nvlink_latency: (low, high) seconds until a flag is seen.
        network_latency: likewise between nodes.
        message: (low, high) seconds that a network card takes for a message.
    """

    name: str
    ranks_per_node: int
    nvlink: float
    network: float
    efficiency: tuple[float, float] = (0.6, 0.9)
    nvlink_latency: tuple[float, float] = (1 * MICROSECOND, 3 * MICROSECOND)
    network_latency: tuple[float, float] = (3 * MICROSECOND, 10 * MICROSECOND)
    message: tuple[float, float] = (0.02 * MICROSECOND, 0.2 * MICROSECOND)


FABRICS = {
    "h100": Fabric("8 H100, NVLink 4, one 400 Gbit/s port per GPU", 8, 450e9, 50e9),
    "b200": Fabric("8 B200, NVLink 5, one 400 Gbit/s port per GPU", 8, 900e9, 50e9),
    "nvl72": Fabric("NVL72, 64 GPUs of it used, one 400 Gbit/s port per GPU", 64, 900e9, 50e9),
}


@dataclass(frozen=True)
class Layer:
    """A mixture-of-experts layer as the router sees it.

    Attributes:
        num_tokens: T, of a rank.
        hidden: H.
        num_topk: K.
        num_experts: E at least; never fewer than there are ranks.
        max_nodes: most nodes a token's experts are on; 0 for any number.
        low_latency_tokens: C, most tokens of a rank in a low-latency call.
        busiest: rows of the busiest rank over the mean; what it receives is that much more.
    """

    num_tokens: int = 4096
    hidden: int = 7168
    num_topk: int = 8
    num_experts: int = 256
    max_nodes: int = 4
    low_latency_tokens: int = 128
    busiest: float = 1.0


@dataclass(frozen=True)
class Plan:
    """One group of ranks; see the module. Times are (low, high) seconds.

    Attributes:
        num_ranks: R.
        num_nodes: N.
        num_experts: E.
        ranks_per_token: expected number of ranks that hold a token's experts.
        nodes_per_token: likewise of nodes.
        network: bytes to other nodes of a (dispatch, combine).
        nvlink: bytes over NVLink of a (dispatch, combine).
        messages: to other nodes of a dispatch: counts, then rows with a signal each.
        counts: bytes of counts that a dispatch exchanges.
        counts_to_all: what they would be if every rank told every other everything.
        received: bytes that hold what a dispatch brings, on the busiest rank.
        deepep_buffers: bytes of DeepEP V1's queues.
        low_latency_window: bytes of our window for the low-latency verbs.
        deepep_low_latency: bytes of DeepEP V1's.
        low_latency_network: bytes to other nodes of a low-latency (dispatch, combine).
        dispatch: time of one.
        combine: time of one.
    """

    num_ranks: int
    num_nodes: int
    num_experts: int
    ranks_per_token: float
    nodes_per_token: float
    network: tuple[float, float]
    nvlink: tuple[float, float]
    messages: int
    counts: int
    counts_to_all: int
    received: float
    deepep_buffers: int
    low_latency_window: int
    deepep_low_latency: int
    low_latency_network: tuple[float, float]
    dispatch: tuple[float, float]
    combine: tuple[float, float]

    @property
    def counts_share(self) -> float:
        """Counts over the rows of a dispatch that leave the rank."""
        return self.counts / max(self.network[0] + self.nvlink[0], 1.0)


def expected_groups(num_items: int, num_groups: int, num_drawn: int) -> float:
    """Return how many of equal groups hold at least one of the items drawn without replacement."""
    size = num_items // num_groups
    missed = 1.0
    for drawn in range(num_drawn):
        missed *= max(num_items - size - drawn, 0) / (num_items - drawn)
    return num_groups * (1 - missed)


def plan(num_ranks: int, layer: Layer, fabric: Fabric) -> Plan:
    """Work out a group of ranks.

    Args:
        num_ranks: R; a multiple of a node's where there is more than one node.
        layer: what is routed.
        fabric: the machine.

    Raises:
        ValueError: if the ranks do not fill their nodes, or experts do not fill the ranks.
    """
    for what, value, least in (
        ("num_tokens", layer.num_tokens, 1),
        ("hidden", layer.hidden, _BLOCK),
        ("num_topk", layer.num_topk, 1),
        ("max_nodes", layer.max_nodes, 0),
        ("busiest", layer.busiest, 1),
    ):
        if value < least:
            raise ValueError(f"scale: expected {what} to be at least {least}, got {value}")
    per_node = min(num_ranks, fabric.ranks_per_node)
    num_experts = max(layer.num_experts, num_ranks)
    for what, count, divisor in (
        ("num_ranks", num_ranks, per_node),
        ("num_experts", num_experts, num_ranks),
    ):
        if count % divisor:
            raise ValueError(f"scale: expected {what} to be a multiple of {divisor}, got {count}")
    nodes = num_ranks // per_node
    limited = min(layer.max_nodes or nodes, nodes)
    experts = num_experts // nodes * limited
    drawn = min(layer.num_topk, experts)
    ranks_per_token = expected_groups(experts, limited * per_node, drawn)
    nodes_per_token = expected_groups(experts, limited, drawn)
    elsewhere = (nodes - 1) / nodes
    tokens, scales = layer.num_tokens, 4 * layer.hidden // _BLOCK
    rows = layer.hidden + scales, 2 * layer.hidden  # bytes of one, to the experts and back
    sent = rows[0] + SLOT_BYTES * layer.num_topk
    spread = rows[0] + ROW_BYTES * layer.num_topk / ranks_per_token
    crossing = tokens * nodes_per_token * elsewhere  # rows to other nodes
    inside = tokens * ranks_per_token * (1 - 1 / per_node)  # rows that the gateway does not keep
    network = crossing * sent, crossing * rows[1]
    nvlink = inside * spread, inside * rows[1]
    messages = num_ranks - per_node + _puts(crossing, nodes - 1, rows[0])
    calls = tokens * layer.num_topk * elsewhere / tokens * layer.low_latency_tokens
    return Plan(
        num_ranks=num_ranks,
        num_nodes=nodes,
        num_experts=num_experts,
        ranks_per_token=ranks_per_token,
        nodes_per_token=nodes_per_token,
        network=network,
        nvlink=nvlink,
        messages=messages,
        counts=_counts(num_ranks, nodes, num_experts),
        counts_to_all=(num_ranks - 1) * (_POST_BYTES + 4 * (num_ranks + num_experts)),
        received=layer.busiest * tokens * ranks_per_token * spread + network[0],
        deepep_buffers=_deepep_buffers(num_ranks, layer),
        low_latency_window=4 * num_experts * layer.low_latency_tokens * (2 * layer.hidden + 4),
        deepep_low_latency=low_latency_size_hint(
            layer.low_latency_tokens, layer.hidden, num_ranks, num_experts
        ),
        low_latency_network=(calls * (layer.hidden + scales + 4), calls * 2 * layer.hidden),
        dispatch=_time(network[0], nvlink[0], messages, nodes, fabric, layer.busiest),
        combine=_time(network[1], nvlink[1], messages, nodes, fabric, layer.busiest),
    )


def plans(sizes: Sequence[int], layer: Layer, fabric: Fabric) -> list[Plan]:
    """Work out several groups."""
    return [plan(num_ranks, layer, fabric) for num_ranks in sizes]


def markdown(rows: Sequence[Plan]) -> str:
    """Return the plans as a table."""
    head = (
        "EP | nodes | experts | ranks, nodes per token | network MB | NVLink MB | messages | "
        "counts kB (of rows) | received MB | DeepEP V1 queues MB | window MB | "
        "DeepEP V1 low latency MB | dispatch ms | combine ms"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for p in rows:
        cells = [
            str(p.num_ranks),
            str(p.num_nodes),
            str(p.num_experts),
            f"{p.ranks_per_token:.2f}, {p.nodes_per_token:.2f}",
            " / ".join(f"{b / 1e6:.0f}" for b in p.network),
            " / ".join(f"{b / 1e6:.0f}" for b in p.nvlink),
            str(p.messages),
            f"{p.counts / 1e3:.0f} ({100 * p.counts_share:.2g} %)",
            f"{p.received / 1e6:.0f}",
            f"{p.deepep_buffers / 1e6:.0f}",
            f"{p.low_latency_window / 1e6:.0f}",
            f"{p.deepep_low_latency / 1e6:.0f}",
            " to ".join(f"{1e3 * t:.2f}" for t in p.dispatch),
            " to ".join(f"{1e3 * t:.2f}" for t in p.combine),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _counts(num_ranks: int, nodes: int, num_experts: int) -> int:
    """Return the bytes of counts that a rank sends; see `backends.host_counts`."""
    num_places = num_ranks + num_experts
    if nodes == 1 or num_places < MANY_COUNTS:
        return (num_ranks - 1) * (_POST_BYTES + 4 * num_places)
    telling = _POST_BYTES + 4 * (num_places // nodes + 1)
    answer = 2 * 4 * num_places // nodes
    return (num_ranks - 1) * telling + (nodes - 1) * answer


def _puts(num_rows: float, num_gateways: int, row_bytes: int) -> int:
    """Return in how many puts rows cross, and what is beside them; see `backends.crossing`."""
    if num_gateways == 0:
        return 0
    each = num_rows / num_gateways
    least = math.ceil(BufferConfig.chunk_bytes_between_hosts / row_bytes)
    return num_gateways * (math.ceil(each / max(math.ceil(each / MAX_CHUNKS), least)) + 1)


def _deepep_buffers(num_ranks: int, layer: Layer) -> int:
    """Return the larger of DeepEP V1's queues for dispatch and combine, NVLink and RDMA."""

    def both(config: Config) -> int:
        row_bytes = 2 * layer.hidden
        return config.get_nvl_buffer_size_hint(
            row_bytes, num_ranks
        ) + config.get_rdma_buffer_size_hint(row_bytes, num_ranks)

    return max(
        both(default_config(kind, num_ranks, _DEEPEP_SMS)) for kind in ("dispatch", "combine")
    )


def _time(
    network: float, nvlink: float, messages: int, nodes: int, fabric: Fabric, busiest: float
) -> tuple[float, float]:
    """Return the best and the worst that is expected.

    Best: both kinds of links at once and well used. Worst: one after the other, badly used. Three
    flags follow one another: counts, rows over the network, rows inside the node.
    """
    worst_share, best_share = fabric.efficiency
    on_network, on_nvlink = network * busiest / fabric.network, nvlink * busiest / fabric.nvlink
    times = []
    for index, moved in enumerate(
        (
            max(on_network, on_nvlink) / best_share,
            (on_network + on_nvlink) / worst_share,
        )
    ):
        flags = 2 * fabric.nvlink_latency[index]
        if nodes > 1:
            flags += 2 * fabric.network_latency[index] + messages * fabric.message[index]
        times.append(moved + flags)
    return times[0], times[1]
