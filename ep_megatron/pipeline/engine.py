"""Discrete events: when every node of every rank runs.

Each rank has two lanes that run their nodes in order, compute and exchanges; a node begins when its
lane is free, what it comes after has ended, and its messages have arrived. While an exchange runs,
the rank's compute may be slower (it lends it processors); so a running node's end is not known when
it starts, and is planned anew whenever the other lane starts or stops.
"""

import heapq
from dataclasses import dataclass

from ep_megatron.pipeline.action import Schedule
from ep_megatron.pipeline.check import Event
from ep_megatron.pipeline.program import Node
from ep_megatron.pipeline.trace import Span


@dataclass(eq=False, slots=True)
class _Lane:
    nodes: list[Node]
    position: int = 0
    started: float = 0.0
    left: float = 0.0
    """Work of the running node that is left at `seen`, in microseconds at full speed."""
    seen: float = 0.0
    speed: float = 1.0
    running: bool = False
    plan: int = 0
    """Number of the valid plan for the end of the running node; older ones are void."""


class Engine:
    """Runs the programs of all ranks of a schedule."""

    def __init__(
        self, schedule: Schedule, programs: list[list[Node]], p2p: float, compute_share: float
    ) -> None:
        self._schedule = schedule
        self._p2p = p2p
        self._compute_share = compute_share
        self._lanes = [
            tuple(_Lane([n for n in nodes if n.is_compute is c]) for c in (True, False))
            for nodes in programs
        ]
        self._waits: dict[int, int] = {}
        self._followers: dict[int, list[tuple[int, Node]]] = {}
        self._receivers: dict[tuple[int, Event], list[Node]] = {}
        for rank, nodes in enumerate(programs):
            for node in nodes:
                self._waits[id(node)] = len(node.after) + len(node.needs)
                for other in node.after:
                    self._followers.setdefault(id(other), []).append((rank, node))
                for event in node.needs:
                    self._receivers.setdefault((rank, event), []).append(node)
        self._channels: dict[tuple[int, int, str], float] = {}
        self._heap: list[tuple[float, int, int, int, int, Event | None]] = []
        self._number = 0
        self.spans: list[Span] = []

    def run(self) -> list[Span]:
        """Run until nothing is left and return what happened.

        Raises:
            RuntimeError: when ranks wait for ever, which `check` would have refused.
        """
        for rank in range(len(self._lanes)):
            self._start(rank, 0.0)
        while self._heap:
            time, _, rank, lane_index, plan, event = heapq.heappop(self._heap)
            if event is not None:
                self._arrive(rank, event)
            else:
                lane = self._lanes[rank][lane_index]
                if plan != lane.plan or not lane.running:
                    continue
                self._end(rank, lane, time)
            self._start(rank, time)
        for rank, lanes in enumerate(self._lanes):
            for lane in lanes:
                if lane.position < len(lane.nodes):
                    node = lane.nodes[lane.position]
                    raise RuntimeError(
                        f"simulate: expected every rank to finish, got rank {rank} waiting at step "
                        f"{node.step} before {node.name}({node.kind}) of {node.chunk}."
                        f"{node.microbatch}"
                    )
        return self.spans

    def _push(self, time: float, rank: int, lane: int, plan: int, event: Event | None) -> None:
        self._number += 1
        heapq.heappush(self._heap, (time, self._number, rank, lane, plan, event))

    def _arrive(self, rank: int, event: Event) -> None:
        for node in self._receivers.get((rank, event), ()):
            self._waits[id(node)] -= 1

    def _end(self, rank: int, lane: _Lane, time: float) -> None:
        node = lane.nodes[lane.position]
        lane.running = False
        lane.position += 1
        if time > lane.started:
            name = "compute" if node.is_compute else "comm"
            self.spans.append(
                Span(
                    rank,
                    name,
                    node.name,
                    node.kind,
                    node.chunk,
                    node.microbatch,
                    node.layer,
                    lane.started,
                    time,
                    node.step,
                )
            )
        for _, follower in self._followers.get(id(node), ()):
            self._waits[id(follower)] -= 1
        for event in node.gives:
            self._arrive(rank, event)
            self._send(rank, event, node, time)

    def _send(self, rank: int, event: Event, node: Node, time: float) -> None:
        """Start the message that carries a stage's output on, if that is another rank's."""
        way, stage, direction, microbatch = event
        target_stage = stage + 1 if way == "F" else stage - 1
        if not 0 <= target_stage < self._schedule.num_stages:
            return
        target = self._schedule.rank_of(target_stage, direction)
        if target == rank:
            return
        channel = (rank, target, way)
        start = max(time, self._channels.get(channel, 0.0))
        end = start + self._p2p
        self._channels[channel] = end
        self._push(end, target, 0, 0, event)
        if self._p2p:
            span = Span(
                rank, "p2p", "send", way, node.chunk, microbatch, None, start, end, node.step
            )
            self.spans.append(span)

    def _start(self, rank: int, time: float) -> None:
        """Start what can, and let compute go as fast as the exchange beside it allows."""
        compute, exchange = self._lanes[rank]
        for lane in (compute, exchange):
            if lane.running or lane.position == len(lane.nodes):
                continue
            node = lane.nodes[lane.position]
            if self._waits[id(node)] == 0:
                lane.running = True
                lane.started = lane.seen = time
                lane.left, lane.speed = node.duration, 0.0
        for index, lane in enumerate((compute, exchange)):
            slowed = index == 0 and exchange.running
            speed = self._compute_share if slowed else 1.0
            if lane.running and lane.speed != speed:
                lane.left = max(0.0, lane.left - (time - lane.seen) * lane.speed)
                lane.seen, lane.speed = time, speed
                lane.plan += 1
                self._push(time + lane.left / speed, rank, index, lane.plan, None)
