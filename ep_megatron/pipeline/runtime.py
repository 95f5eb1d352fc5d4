"""Executes one rank's actions of a schedule: passes through nodes, and messages between stages.

The runtime knows nothing of Megatron: who calls it says how a pass is made and what is to be done
when a chunk's gradients are complete (`forward_backward.py` does both for Megatron models).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_megatron.pipeline import nodes
from ep_megatron.pipeline.action import Action, Kind, Schedule
from ep_megatron.pipeline.nodes import Pass
from ep_megatron.pipeline.observer import Recorder
from ep_megatron.pipeline.p2p import Channel, Link, Wire

_Key = tuple[int, int]  # chunk, micro-batch


@dataclass(frozen=True)
class Hooks:
    """What the runtime asks of its caller.

    Attributes:
        make_pass: chunk, micro-batch -> its nodes; called in the order of the chunk's forwards.
        forward_done: called after each forward with chunk, micro-batch and the pass's output.
        backward: surrounds each backward of inputs.
        chunk_done: called when a chunk's last weight gradient is accumulated.
    """

    make_pass: Callable[[int, int], Pass]
    forward_done: Callable[[int, int, Tensor], None]
    backward: Callable[[], contextlib.AbstractContextManager[None]]
    chunk_done: Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """How actions are executed.

    Attributes:
        overlap: run the two halves of a pair node by node in turn; else one after the other.
        launch_early: see `nodes.overlapped`.
        message_shape: of a message between stages; None where each message brings its shape.
        message_dtype: of a message between stages.
        weights_hide: compute weights' gradients beside the exchange of their inputs' gradients.
    """

    overlap: bool
    launch_early: bool
    message_shape: tuple[int, ...] | None
    message_dtype: torch.dtype
    weights_hide: bool = True


def links_of(schedule: Schedule, rank: int) -> dict[tuple[int, str], Link]:
    """Return the links of a rank's chunks to other ranks.

    Returns:
        (chunk, what) -> link, where `what` is "input" or "output" for activations, "output grad" or
        "input grad" for gradients; absent at the ends and where both stages are on this rank.
    """
    links = {}
    for chunk, stage in enumerate(schedule.stages[rank]):
        direction = schedule.directions[chunk]
        before, after = schedule.previous(rank, chunk), schedule.following(rank, chunk)
        if before is not None and before[0] != rank:
            links[chunk, "input"] = Link(before[0], "F", stage - 1, direction)
            links[chunk, "input grad"] = Link(before[0], "B", stage - 1, direction)
        if after is not None and after[0] != rank:
            links[chunk, "output"] = Link(after[0], "F", stage, direction)
            links[chunk, "output grad"] = Link(after[0], "B", stage, direction)
    return links


class Runtime:
    """One step of one rank.

    Collective over the pipeline ranks, and through the passes' exchanges over the expert ranks.

    Args:
        schedule: what all ranks do, checked.
        rank: this rank.
        wire: carries the messages.
        hooks: see `Hooks`.
        options: see `Options`.
        recorder: collects spans, or None.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        wire: Wire,
        hooks: Hooks,
        options: Options,
        recorder: Recorder | None = None,
    ) -> None:
        self._schedule, self._rank, self._wire = schedule, rank, wire
        self._hooks, self._options, self._recorder = hooks, options, recorder
        self._actions = schedule.actions[rank]
        self._passes: dict[_Key, Pass] = {}
        self._output_grads: dict[_Key, Tensor] = {}
        self._handed: dict[tuple[str, int, int], Tensor] = {}
        self._channels: dict[tuple[int, str], Channel] = {}

    def run(self) -> None:
        """Execute the actions.

        Raises:
            RuntimeError: another rank is late or gone.
        """
        links = links_of(self._schedule, self._rank)
        self._wire.connect(list(links.values()))
        dtype = self._options.message_dtype
        self._channels = {key: Channel(link, self._wire, dtype) for key, link in links.items()}
        try:
            self._expect()
            last = self._last_weights()
            for step, action in enumerate(self._actions):
                if self._recorder is not None:
                    self._recorder.step = step
                self._execute(action)
                for chunk in last.get(step, ()):
                    self._hooks.chunk_done(chunk)
            for channel in self._channels.values():
                channel.drain()
        finally:
            for channel in self._channels.values():
                channel.close()
        assert not self._handed, "a stage's output was left behind"

    def _expect(self) -> None:
        """Announce the messages of known shape."""
        shape = self._options.message_shape
        if shape is None:
            return
        incoming = {Kind.F: "input", Kind.B: "output grad", Kind.I: "output grad"}
        for part in (part for action in self._actions for part in action.parts()):
            what = incoming.get(part.kind)
            channel = self._channels.get((part.chunk, what)) if what else None
            if channel is not None:
                channel.expect(shape)

    def _last_weights(self) -> dict[int, list[int]]:
        """Return step -> chunks whose last weight gradient it computes."""
        last: dict[int, int] = {}
        for step, action in enumerate(self._actions):
            for part in action.parts():
                if part.kind in (Kind.B, Kind.W):
                    last[part.chunk] = step
        chunks: dict[int, list[int]] = {}
        for chunk, step in sorted(last.items()):
            chunks.setdefault(step, []).append(chunk)
        return chunks

    def _execute(self, action: Action) -> None:
        if action.kind is Kind.FB:
            ahead, back = action.parts()
            if self._options.overlap:
                self._pair(ahead, back)
            else:
                self._forward(ahead)
                self._backward(back)
        elif action.kind is Kind.F:
            self._forward(action)
        elif action.kind is Kind.W:
            nodes.weight_gradients(self._passes.pop((action.chunk, action.microbatch)))
        else:
            self._backward(action)

    def _forward(self, action: Action) -> None:
        hidden = self._input(action)
        run = self._hooks.make_pass(action.chunk, action.microbatch)
        self._forwarded(action, run, nodes.forward(run, (hidden,)))

    def _backward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        grads, is_split = self._output_grad(action), action.kind is Kind.I
        run = self._passes[key] if is_split else self._passes.pop(key)
        with self._hooks.backward():
            (grad,) = nodes.backward(run, grads, is_split, self._options.weights_hide)
        self._give_input_grad(action, grad)

    def _pair(self, ahead: Action, back: Action) -> None:
        hidden, grads = self._input(ahead), self._output_grad(back)
        run = self._hooks.make_pass(ahead.chunk, ahead.microbatch)
        behind = self._passes.pop((back.chunk, back.microbatch))
        with self._hooks.backward():
            outputs, (grad,) = nodes.overlapped(
                run, (hidden,), behind, grads, self._options.launch_early
            )
        self._forwarded(ahead, run, outputs)
        self._give_input_grad(back, grad)

    def _input(self, action: Action) -> Tensor | None:
        chunk, microbatch = action.chunk, action.microbatch
        if self._schedule.previous(self._rank, chunk) is None:
            return None
        channel = self._channels.get((chunk, "input"))
        if channel is None:
            return self._handed.pop(("F", chunk, microbatch))
        with self._message("recv", "F", action):
            return channel.receive(with_shape=self._options.message_shape is None)

    def _forwarded(self, action: Action, run: Pass, outputs: nodes.Tensors) -> None:
        chunk, microbatch = action.chunk, action.microbatch
        (output,) = outputs
        assert output is not None
        self._hooks.forward_done(chunk, microbatch, output)
        if torch.is_grad_enabled() and self._has_backward:
            self._passes[chunk, microbatch] = run
        following = self._schedule.following(self._rank, chunk)
        if following is None:
            if self._has_backward:
                self._output_grads[chunk, microbatch] = torch.ones_like(output)
            return
        channel = self._channels.get((chunk, "output"))
        if channel is None:
            self._handed["F", following[1], microbatch] = output
            return
        is_ragged = self._options.message_shape is None
        if is_ragged and self._has_backward:
            self._channels[chunk, "output grad"].expect(tuple(output.shape))
        with self._message("send", "F", action):
            channel.send(output, with_shape=is_ragged)

    def _output_grad(self, action: Action) -> nodes.Tensors:
        chunk, microbatch = action.chunk, action.microbatch
        if self._schedule.following(self._rank, chunk) is None:
            return (self._output_grads.pop((chunk, microbatch)),)
        channel = self._channels.get((chunk, "output grad"))
        if channel is None:
            return (self._handed.pop(("B", chunk, microbatch)),)
        with self._message("recv", action.kind.value, action):
            return (channel.receive(),)

    def _give_input_grad(self, action: Action, grad: Tensor | None) -> None:
        previous = self._schedule.previous(self._rank, action.chunk)
        if previous is None:
            return
        assert grad is not None
        channel = self._channels.get((action.chunk, "input grad"))
        if channel is None:
            self._handed["B", previous[1], action.microbatch] = grad
            return
        with self._message("send", action.kind.value, action):
            channel.send(grad)

    @property
    def _has_backward(self) -> bool:
        return any(action.kind is not Kind.F for action in self._actions)

    @contextlib.contextmanager
    def _message(self, name: str, way: str, action: Action) -> Iterator[Any]:
        if self._recorder is None:
            yield
            return
        watch = self._recorder.of(action.chunk, action.microbatch)
        with watch.message(name, way):
            yield
