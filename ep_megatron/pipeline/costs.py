"""What each stage of a schedule costs: the compute and exchange nodes that it consists of."""

from dataclasses import dataclass

from ep_megatron.pipeline.action import Schedule
from ep_megatron.pipeline.profile import ComputeTimes, Profile


@dataclass(frozen=True, slots=True)
class Piece:
    """A compute node and its times in microseconds.

    Attributes:
        name: as in a trace.
        layer: within the stage; None for embedding and head.
        forward: F.
        inputs: I.
        weights: W.
    """

    name: str
    layer: int | None
    forward: float
    inputs: float
    weights: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """A dispatch or combine and its times in microseconds."""

    name: str
    layer: int
    forward: float
    backward: float


@dataclass(frozen=True)
class StageCosts:
    """A stage: compute and exchange strictly alternate.

    Attributes:
        segments: compute between exchanges, each of any number of pieces; one more than exchanges.
        exchanges: in forward order.
        whole: an action is one node, and nothing leaves it before all of it is done.
        pair: of a whole stage, the time of a pair where that is not the sum of its halves.
        activation_bytes: that a forward leaves for its backward.
        parameter_bytes: of weights and gradients.
    """

    segments: tuple[tuple[Piece, ...], ...]
    exchanges: tuple[Exchange, ...] = ()
    whole: bool = False
    pair: float | None = None
    activation_bytes: float = 0.0
    parameter_bytes: float = 0.0


@dataclass(frozen=True)
class Costs:
    """A schedule's stages, and what is between them.

    Attributes:
        stages: `[stage]`.
        p2p: microseconds of a message to another rank.
        compute_share: how fast compute is while an exchange runs on the same rank; 1 is unhindered.
        kept_by_weights: share of activations held between I and W.
    """

    stages: tuple[StageCosts, ...]
    p2p: float = 0.0
    compute_share: float = 1.0
    kept_by_weights: float = 1.0


def chunk_costs(
    schedule: Schedule, times: tuple[float, float, float], pair: float | None = None
) -> Costs:
    """Return costs with one node per action, as in the papers: F, I and W, and a pair's time."""
    stage = StageCosts(((Piece("chunk", None, *times),),), whole=True, pair=pair)
    return Costs((stage,) * schedule.num_stages)


def profile_costs(
    profile: Profile,
    schedule: Schedule,
    expert_parallel: int | None = None,
    communication_sms: int | None = None,
    imbalance: float = 1.0,
) -> Costs:
    """Return what a model costs when its layers are dealt to a schedule's stages.

    Layers are dealt in order so that the stages' times, embedding and head included, are as equal
    as they can be.

    Args:
        profile: the model and machine.
        schedule: that gives the number of stages.
        expert_parallel: ranks of the group; as measured without.
        communication_sms: SMs of the exchanges; as measured without.
        imbalance: rows of the rank with most over the mean; all wait for it, so experts and
            exchanges take that much longer.

    Raises:
        ValueError: when the profile cannot say, or there are fewer layers than stages.
    """
    if imbalance < 1.0:
        raise ValueError(f"simulate: expected imbalance to be at least 1, got {imbalance}")
    if profile.chunk is not None:
        scale = 2 * schedule.num_ranks / schedule.num_stages
        chunk = profile.chunk
        times = (chunk.F * scale, chunk.I * scale, chunk.W * scale)
        return chunk_costs(schedule, times, None if chunk.FB is None else chunk.FB * scale)
    compute_scale, exchange_scale, share = _sm_scales(profile, communication_sms)
    exchange_scale *= profile.exchange_scale(expert_parallel) * imbalance
    kinds = profile.layer_kinds()
    if len(kinds) < schedule.num_stages:
        raise ValueError(
            f"simulate: expected layers to be at least one per stage ({schedule.num_stages}), "
            f"got {len(kinds)}; use fewer pipeline ranks or chunks"
        )
    ranks = expert_parallel or (profile.exchange.expert_parallel if profile.exchange else 1)
    scales = (compute_scale, exchange_scale, imbalance)
    stages = []
    for stage, count in enumerate(_deal(profile, kinds, schedule.num_stages)):
        own, kinds = kinds[:count], kinds[count:]
        ends = (stage == 0, stage == schedule.num_stages - 1)
        stages.append(_stage(profile, own, ends, scales, ranks))
    return Costs(tuple(stages), profile.p2p, share, profile.kept_by_weights)


def _deal(profile: Profile, kinds: list[str], num_stages: int) -> list[int]:
    """Return how many layers each stage gets: the least sum of squares of the stages' times."""
    times = [0.0]
    for kind in kinds:
        layer = profile.layers[kind]
        times.append(times[-1] + _total(layer.attention) + _total(layer.experts))
    num_layers, head = len(kinds), _total(profile.head)
    best: list[tuple[float, list[int]] | None] = [
        ((times[n] + _total(profile.embedding) + head * (num_stages == 1)) ** 2, [n]) if n else None
        for n in range(num_layers + 1)
    ]
    for stage in range(1, num_stages):
        extra = head if stage == num_stages - 1 else 0.0
        following: list[tuple[float, list[int]] | None] = [None] * (num_layers + 1)
        for end in range(stage + 1, num_layers + 1):
            for begin in range(stage, end):
                before = best[begin]
                if before is None:
                    continue
                cost = before[0] + (times[end] - times[begin] + extra) ** 2
                current = following[end]
                if current is None or cost < current[0]:
                    following[end] = (cost, [*before[1], end - begin])
        best = following
    dealt = best[num_layers]
    assert dealt is not None  # there are at least as many layers as stages
    return dealt[1]


def _total(times: ComputeTimes) -> float:
    return times.F + times.I + times.W


def _sm_scales(profile: Profile, communication_sms: int | None) -> tuple[float, float, float]:
    """Return factors of compute and exchange times, and compute's speed beside an exchange."""
    sms = profile.sms
    if sms is None:
        if communication_sms is not None:
            raise ValueError(
                f"simulate: expected communication_sms to be left out, since profile "
                f"{profile.name!r} has no sms, got {communication_sms}"
            )
        return 1.0, 1.0, 1.0
    count = sms.communication if communication_sms is None else communication_sms
    if not 0 < count < sms.total:
        raise ValueError(
            f"simulate: expected communication_sms to be between 1 and {sms.total - 1}, got {count}"
        )
    exchange = max(1.0, sms.sufficient / count) / max(1.0, sms.sufficient / sms.communication)
    if sms.reserved:
        return (sms.total - sms.communication) / (sms.total - count), exchange, 1.0
    return 1.0, exchange, (sms.total - count) / sms.total


def _stage(
    profile: Profile,
    kinds: list[str],
    ends: tuple[bool, bool],
    scales: tuple[float, float, float],
    expert_parallel: int,
) -> StageCosts:
    compute, exchange, imbalance = scales
    segments: list[list[Piece]] = [[]]
    exchanges: list[Exchange] = []
    activations = parameters = 0.0

    def add(name: str, layer: int | None, times: ComputeTimes, scale: float) -> None:
        segments[-1].append(Piece(name, layer, times.F * scale, times.I * scale, times.W * scale))

    if ends[0]:
        add("embedding", None, profile.embedding, compute)
        parameters += profile.embedding_parameters
    for layer, kind in enumerate(kinds):
        what = profile.layers[kind]
        add("attention", layer, what.attention, compute)
        is_moe = what.dispatch is not None and what.combine is not None
        for name, times in (("dispatch", what.dispatch), ("combine", what.combine)):
            if times is not None:
                one = Exchange(name, layer, times.F * exchange, times.B * exchange)
                exchanges.append(one)
                segments.append([])
            if name == "dispatch":
                word = "experts" if is_moe else "dense"
                add(word, layer, what.experts, compute * (imbalance if is_moe else 1.0))
        activations += what.activation_bytes
        parameters += what.parameters + what.expert_parameters / expert_parallel
    if ends[1]:
        add("head", None, profile.head, compute)
        parameters += profile.head_parameters
    return StageCosts(
        tuple(map(tuple, segments)),
        tuple(exchanges),
        activation_bytes=activations,
        parameter_bytes=parameters * profile.bytes_per_parameter,
    )
