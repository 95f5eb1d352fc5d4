"""From actions to nodes: the order in which one rank's compute and exchanges are started.

A forward alternates segments of compute with exchanges. A backward goes the other way; each
segment's weights' half is put behind the exchange that its inputs' half has started. A pair
weaves a forward and a backward, one segment apart, so that each one's exchange runs beside the
other's compute:

    last segment backward; then again and again: segment forward, its exchange; segment backward,
    its exchange; the backward's weights

Source: arXiv:2412.19437, figure 4, and the order of nodes in github.com/deepseek-ai/profile-data.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from ep_megatron.pipeline.action import Action, Kind, Schedule
from ep_megatron.pipeline.check import Event, gives, needs
from ep_megatron.pipeline.costs import Costs, StageCosts


@dataclass(frozen=True)
class Options:
    """How a rank runs its actions.

    Attributes:
        pairs: weave the two halves of a pair; else one runs after the other.
        weights_hide: put the weights' half of a full backward behind the exchange that the inputs'
            half has started; else compute both first.
        blocking: nothing runs beside an exchange.
        host_runs_ahead: the host only enqueues, as with CUDA streams; else it computes itself, and
            an exchange begins no earlier than the host reaches it.
        launch_early: in a pair, start each exchange right after its compute; else start both after
            both computes, for hosts that an exchange's launch blocks. Makes no difference to a
            host that runs ahead.
        whole_actions: an action begins when all its messages are there, and sends when all of it is
            done; else each half of a pair waits for its own, and what is ready leaves at once.
    """

    pairs: bool = True
    weights_hide: bool = True
    blocking: bool = False
    host_runs_ahead: bool = True
    launch_early: bool = True
    whole_actions: bool = False


def describe(schedule: Schedule, options: Options) -> dict[str, Any]:
    """Return what a timeline's description says of a run, so that it can be simulated again."""
    return schedule.to_json() | {"options": asdict(options)}


@dataclass(eq=False, slots=True)
class Node:
    """One thing that a rank does.

    Nodes of one lane run in the order in which the rank's program has them.
    """

    is_compute: bool
    name: str
    kind: str
    chunk: int
    microbatch: int
    layer: int | None
    step: int
    duration: float
    after: list["Node"] = field(default_factory=list)
    needs: list[Event] = field(default_factory=list)
    gives: list[Event] = field(default_factory=list)


def program(schedule: Schedule, costs: Costs, options: Options, rank: int) -> list[Node]:
    """Return one rank's nodes in the order in which its host starts them."""
    writer = _Writer(schedule, costs, options, rank)
    for step, action in enumerate(schedule.actions[rank]):
        writer.add(step, action)
    return writer.nodes


class _Flow:
    """One action on its way: its nodes so far end in `last`, and its segments are counted."""

    def __init__(self, step: int, action: Action, stage: StageCosts) -> None:
        self.step = step
        self.action = action
        self.stage = stage
        self.last: Node | None = None
        self.segment = 0 if action.kind is Kind.F else len(stage.segments) - 1

    @property
    def has_more(self) -> bool:
        return 0 <= self.segment < len(self.stage.segments)


class _Writer:
    def __init__(self, schedule: Schedule, costs: Costs, options: Options, rank: int) -> None:
        self.nodes: list[Node] = []
        self._schedule = schedule
        self._costs = costs
        self._options = options
        self._rank = rank
        self._last_compute: Node | None = None
        self._last_exchange: Node | None = None

    def add(self, step: int, action: Action) -> None:
        first = len(self.nodes)
        self._add(step, action)
        if self._options.whole_actions:
            self._close(self.nodes[first:])

    def _close(self, nodes: list[Node]) -> None:
        """Move an action's messages to its first node and behind its last ones."""
        needed = [event for node in nodes for event in node.needs]
        given = [event for node in nodes for event in node.gives]
        for node in nodes:
            node.needs, node.gives = [], []
        nodes[0].needs = needed
        last = nodes[-1]
        end = Node(True, "border", last.kind, last.chunk, last.microbatch, None, last.step, 0.0)
        end.gives = given
        end.after = [node for node in nodes if not node.is_compute][-1:]
        self._last_compute = end
        self.nodes.append(end)

    def _add(self, step: int, action: Action) -> None:
        flows = [self._flow(step, part) for part in action.parts()]
        if len(flows) == 2 and self._options.pairs and not self._options.blocking:
            if flows[0].stage.whole:
                self._whole_pair(flows[0], flows[1], action)
            else:
                self._weave(flows[0], flows[1])
            return
        for flow in flows:
            if flow.stage.whole:
                self._whole(flow)
                continue
            while flow.has_more:
                self._segment(flow)

    def _flow(self, step: int, part: Action) -> _Flow:
        stage = self._schedule.stage_of(self._rank, part.chunk)
        return _Flow(step, part, self._costs.stages[stage])

    def _whole(self, flow: _Flow) -> None:
        (piece,) = flow.stage.segments[0]
        kind = flow.action.kind
        times = {Kind.F: piece.forward, Kind.I: piece.inputs, Kind.W: piece.weights}
        duration = times.get(kind, piece.inputs + piece.weights)
        node = self._compute(flow, piece.name, None, kind.value, duration)
        if kind is not Kind.W:
            node.needs = needs(self._schedule, self._rank, flow.action)
            node.gives = gives(self._schedule, self._rank, flow.action)

    def _whole_pair(self, forward: _Flow, backward: _Flow, action: Action) -> None:
        """Write both halves one after the other; each gets its share of the pair's time."""
        ((piece,),) = forward.stage.segments
        single = piece.forward + piece.inputs + piece.weights
        scale = 1.0 if forward.stage.pair is None else forward.stage.pair / single
        first = self._compute(forward, piece.name, None, "F", scale * piece.forward)
        first.needs = needs(self._schedule, self._rank, action)
        rest = scale * (piece.inputs + piece.weights)
        last = self._compute(backward, piece.name, None, "B", rest)
        last.gives = gives(self._schedule, self._rank, action)

    def _weave(self, forward: _Flow, backward: _Flow) -> None:
        self._segment(backward)
        while forward.has_more or backward.has_more:
            if self._options.launch_early:
                if forward.has_more:
                    self._segment(forward)
                if backward.has_more:
                    self._segment(backward)
                continue
            running = [flow for flow in (forward, backward) if flow.has_more]
            for flow in running:
                self._inputs(flow)
            for flow in running:
                self._exchange(flow)
            for flow in running:
                self._weights(flow)
                self._advance(flow)

    def _segment(self, flow: _Flow) -> None:
        """Write a segment's compute, the exchange that follows it, and its weights' half."""
        self._inputs(flow)
        if self._options.weights_hide:
            self._exchange(flow)
            self._weights(flow)
        else:
            self._weights(flow)
            if flow.action.kind is Kind.B:
                flow.last = self._last_compute
            self._exchange(flow)
        self._advance(flow)

    def _advance(self, flow: _Flow) -> None:
        flow.segment += 1 if flow.action.kind is Kind.F else -1

    def _inputs(self, flow: _Flow) -> None:
        """Write the part that an exchange waits for: F or I, or nothing of a W."""
        kind, stage = flow.action.kind, flow.stage
        is_first = flow.last is None
        before = len(self.nodes)
        if kind is Kind.F:
            for piece in stage.segments[flow.segment]:
                flow.last = self._compute(flow, piece.name, piece.layer, "F", piece.forward)
        elif kind is not Kind.W:
            for piece in reversed(stage.segments[flow.segment]):
                flow.last = self._compute(flow, piece.name, piece.layer, "I", piece.inputs)
        if kind is not Kind.W and len(self.nodes) == before:
            # A segment without pieces, such as a stage's last one, still orders what is around it.
            flow.last = self._compute(flow, "border", None, "F" if kind is Kind.F else "I", 0.0)
        if is_first and kind is not Kind.W:
            self.nodes[before].needs = needs(self._schedule, self._rank, flow.action)
        end = len(stage.segments) - 1 if kind is Kind.F else 0
        if flow.segment == end and kind is not Kind.W:
            self.nodes[-1].gives = gives(self._schedule, self._rank, flow.action)

    def _weights(self, flow: _Flow) -> None:
        if flow.action.kind not in (Kind.B, Kind.W):
            return
        for piece in reversed(flow.stage.segments[flow.segment]):
            if piece.weights:
                self._compute(flow, piece.name, piece.layer, "W", piece.weights, depends=False)

    def _compute(
        self,
        flow: _Flow,
        name: str,
        layer: int | None,
        kind: str,
        duration: float,
        depends: bool = True,
    ) -> Node:
        action = flow.action
        node = Node(True, name, kind, action.chunk, action.microbatch, layer, flow.step, duration)
        if depends and flow.last is not None:
            node.after.append(flow.last)
        if self._options.blocking and self._last_exchange is not None:
            node.after.append(self._last_exchange)
        self._last_compute = node
        self.nodes.append(node)
        return node

    def _exchange(self, flow: _Flow) -> None:
        """Write the exchange behind the segment, if there is one."""
        kind = flow.action.kind
        index = flow.segment if kind is Kind.F else flow.segment - 1
        if kind is Kind.W or not 0 <= index < len(flow.stage.exchanges):
            return
        exchange = flow.stage.exchanges[index]
        is_forward = kind is Kind.F
        node = Node(
            False,
            exchange.name,
            "F" if is_forward else "B",
            flow.action.chunk,
            flow.action.microbatch,
            exchange.layer,
            flow.step,
            exchange.forward if is_forward else exchange.backward,
        )
        if flow.last is not None:
            node.after.append(flow.last)
        holds = self._options.blocking or not self._options.host_runs_ahead
        if holds and self._last_compute is not None:
            node.after.append(self._last_compute)
        self._last_exchange = flow.last = node
        self.nodes.append(node)
