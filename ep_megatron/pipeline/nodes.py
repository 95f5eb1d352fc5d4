"""One micro-batch's way through one model chunk: compute nodes with exchanges between them.

    C0 | X0 | C1 | X1 | C2 ...      attention+router | dispatch | experts | combine | residual+...

A compute node has a piece of autograd graph of its own: its inputs are cut off from what made them,
and its backward is one run of the engine over this piece. An exchange is outside autograd: a linear
map between ranks that starts, and is waited for where its result is needed. What an even node makes
beside the exchange's payload (the residual, the shared experts' output) is carried around exchange,
experts and exchange to the next even node, and its gradients go back the same way.

`overlapped` runs one pass forwards and another backwards, each one's exchanges behind the other's
compute, in the order of DeepSeek-V3's figure 4.

Source: the order is DeepSeek's (arXiv:2412.19437, figure 4, and the traces in
deepseek-ai/profile-data); nodes with exchanges outside autograd are also how pith-train (mlc-ai)
and Megatron-core's combined 1F1B are built.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ep_megatron.pipeline.observer import Observer
from ep_megatron.pipeline.weight_grad import Deferred, deferred_to, run_deferred
from ep_megatron.streams import EventHandle, EventOverlap

Tensors = tuple[Tensor | None, ...]


class RandomStates(Protocol):
    """How a node that is computed again draws what it drew the first time."""

    def save(self) -> Any:
        """Return the states of all generators that the node may draw from."""

    def restored(self, states: Any) -> contextlib.AbstractContextManager[None]:
        """Draw from `states` inside the block, and go on from the present states after it."""


class Compute:
    """A node of compute.

    Args:
        name: for timelines and errors.
        layer: within the chunk, or None.
        function: inputs -> outputs; None among the inputs where there is nothing.
        random: given for a node whose activations are not kept: its forward runs without autograd,
            and again in its backward, with the same random numbers.
        scope: entered around the function, such as autocast.
    """

    def __init__(
        self,
        name: str,
        layer: int | None,
        function: Callable[..., Tensors],
        random: RandomStates | None = None,
        scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.name, self.layer = name, layer
        self._function, self._random, self._scope = function, random, scope
        self._inputs: Tensors = ()
        self._edges: list[GradientEdge | None] = []
        self._states: Any = None
        self._deferred: Deferred = []

    def forward(self, inputs: Tensors) -> Tensors:
        """Return the outputs, cut off from autograd.

        The inputs are kept for `backward`; of the outputs only the place in autograd's graph is, so
        their memory goes with the caller's last reference.
        """
        if self._random is not None and torch.is_grad_enabled():
            self._inputs = inputs
            self._states = self._random.save()
            with torch.no_grad():
                outputs = self._run(inputs)
        else:
            outputs = self._run_with_graph(inputs)
        return tuple(None if output is None else output.detach() for output in outputs)

    def backward(self, grads: Tensors) -> Tensors:
        """Return the gradients of the inputs for those of the outputs; weights' may be left.

        Args:
            grads: one for each output, None where nothing flows back.
        """
        if self._random is not None:
            with self._random.restored(self._states), torch.enable_grad():
                self._run_with_graph(self._inputs)
        roots = [
            (edge, grad)
            for edge, grad in zip(self._edges, grads, strict=True)
            if edge is not None and grad is not None
        ]
        # One engine run for all outputs: they share parts of the graph.
        torch.autograd.backward([edge for edge, _ in roots], [grad for _, grad in roots])
        inputs, self._inputs, self._edges, self._states = self._inputs, (), [], None
        return tuple(None if leaf is None else leaf.grad for leaf in inputs)

    def weight_gradients(self) -> None:
        """Compute the weights' gradients that `backward` left."""
        run_deferred(self._deferred)

    def _run_with_graph(self, inputs: Tensors) -> Tensors:
        self._inputs = tuple(_leaf(tensor) for tensor in inputs)
        outputs = self._run(self._inputs)
        self._edges = [
            get_gradient_edge(output) if output is not None and output.requires_grad else None
            for output in outputs
        ]
        return outputs

    def _run(self, inputs: Tensors) -> Tensors:
        with self._scope(), deferred_to(self._deferred):
            return self._function(*inputs)


def _leaf(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


class Exchange(Protocol):
    """A node of communication: a linear map between ranks and its adjoint."""

    name: str
    layer: int | None
    num_payload: int
    """Tensors it takes from the compute node before it."""
    num_received: int
    """Tensors that the compute node after it gets."""

    def start(self, payload: Tensors, after: EventOverlap) -> None:
        """Launch the exchange, once what `after` stands for is done. Collective."""

    def start_adjoint(self, grads: Tensors, after: EventOverlap) -> None:
        """Launch the adjoint for the gradients of what was received. Collective."""

    def finish(self) -> Tensors:
        """Return what the launched exchange brings, once the current stream may read it."""


class Pass:
    """One micro-batch in one chunk, from its forward to its last weight gradient.

    Args:
        compute: C0 ... Cn.
        exchanges: X0 ... X(n-1); n is even.
        observer: is told of every node.
    """

    def __init__(
        self, compute: list[Compute], exchanges: list[Exchange], observer: Observer
    ) -> None:
        assert len(compute) == len(exchanges) + 1
        assert len(exchanges) % 2 == 0
        self.compute, self.exchanges, self.observer = compute, exchanges, observer
        self._carry: Tensors = ()
        self._carry_grads: Tensors = ()

    @property
    def last(self) -> int:
        """Index of the last compute node."""
        return len(self.compute) - 1

    def run_forward(self, index: int, received: Tensors) -> Tensors:
        """Run compute node `index` forwards; return the payload of the exchange that follows."""
        node = self.compute[index]
        with self.observer.compute(node.name, node.layer, "F"):
            if index % 2:
                return node.forward(received)
            outputs = node.forward(received + self._carry)
        if index == self.last:
            self._carry = ()
            return outputs
        num_payload = self.exchanges[index].num_payload
        self._carry = outputs[num_payload:]
        return outputs[:num_payload]

    def run_backward(self, index: int, grads: Tensors) -> Tensors:
        """Run compute node `index` backwards; return what the adjoint before it sends."""
        node = self.compute[index]
        with self.observer.compute(node.name, node.layer, "B"):
            if index % 2:
                return node.backward(grads)
            if index < self.last:
                grads += self._carry_grads
            grads = node.backward(grads)
        num_received = self.exchanges[index - 1].num_received if index else len(grads)
        self._carry_grads = grads[num_received:]
        return grads[:num_received]

    def run_weights(self, index: int) -> None:
        """Compute the weight gradients that node `index` has left."""
        node = self.compute[index]
        with self.observer.compute(node.name, node.layer, "W"):
            node.weight_gradients()

    def launch(self, index: int, payload: Tensors, after: EventOverlap) -> None:
        """Start exchange `index` forwards. Collective."""
        exchange = self.exchanges[index]
        self.observer.launch(exchange.name, exchange.layer, "F")
        exchange.start(payload, after)

    def launch_adjoint(self, index: int, grads: Tensors, after: EventOverlap) -> None:
        """Start exchange `index` backwards. Collective."""
        exchange = self.exchanges[index]
        self.observer.launch(exchange.name, exchange.layer, "B")
        exchange.start_adjoint(grads, after)

    def arrive(self, index: int) -> Tensors:
        """Return what exchange `index`, which is under way, brings."""
        with self.observer.arrival():
            return self.exchanges[index].finish()


def forward(run: Pass, inputs: Tensors) -> Tensors:
    """Run a pass forwards; return the last node's outputs. Collective over the expert ranks."""
    payload = inputs
    for index in range(run.last):
        payload = run.run_forward(index, payload)
        run.launch(index, payload, _now())
        payload = run.arrive(index)
    return run.run_forward(run.last, payload)


def backward(run: Pass, grads: Tensors, split: bool = False, weights_hide: bool = True) -> Tensors:
    """Run a pass backwards; return the inputs' gradients. Collective over the expert ranks.

    Each node's weight gradients are computed while the exchange after it is under way, or before it
    without `weights_hide`; with `split` not at all: `weight_gradients` does that later.
    """
    for index in reversed(range(run.last + 1)):
        grads = run.run_backward(index, grads)
        if not (split or weights_hide):
            run.run_weights(index)
        if index:
            run.launch_adjoint(index - 1, grads, _now())
        if weights_hide and not split:
            run.run_weights(index)
        if index:
            grads = run.arrive(index - 1)
    return grads


def weight_gradients(run: Pass) -> None:
    """Compute the weight gradients that a split `backward` has left, in its order."""
    for index in reversed(range(run.last + 1)):
        run.run_weights(index)


def overlapped(
    ahead: Pass, inputs: Tensors, back: Pass, grads: Tensors, launch_early: bool = True
) -> tuple[Tensors, Tensors]:
    """Run `ahead` forwards and `back` backwards, node by node in turn.

    Collective over the expert ranks, in an order that depends on the two passes' lengths alone: so
    it is the same on all ranks, whatever their tokens.

    Args:
        ahead: the pass to run forwards.
        inputs: of `ahead`.
        back: the pass to run backwards; may be of the same chunk.
        grads: of the outputs of `back`.
        launch_early: start each exchange as soon as its payload is there, as suits a CPU, where a
            call that computes returns when it has computed. Without it, both passes' computations
            are enqueued before both exchanges, as suits a GPU, where an exchange may keep the host
            waiting for counts; on the device the order is the same, as exchanges wait for events.

    Returns:
        outputs of `ahead`, gradients of the inputs of `back`.
    """
    position = back.last
    grads = back.run_backward(position, grads)
    if position:
        back.launch_adjoint(position - 1, grads, _now())
    back.run_weights(position)
    payload = inputs
    for index in range(max(ahead.last + 1, back.last)):
        waiting: list[tuple[Callable[..., None], int, Tensors, EventOverlap]] = []
        if index <= ahead.last:
            if index:
                payload = ahead.arrive(index - 1)
            payload = ahead.run_forward(index, payload)
            if index < ahead.last:
                waiting.append((ahead.launch, index, payload, _now()))
        if launch_early:
            _launch(waiting)
        computed = position > 0
        if computed:
            grads = back.arrive(position - 1)
            position -= 1
            grads = back.run_backward(position, grads)
            if position:
                waiting.append((back.launch_adjoint, position - 1, grads, _now()))
        _launch(waiting)
        if computed:
            back.run_weights(position)
    return payload, grads


def _launch(waiting: list[tuple[Callable[..., None], int, Tensors, EventOverlap]]) -> None:
    while waiting:
        start, index, payload, after = waiting.pop(0)
        start(index, payload, after)


def _now() -> EventOverlap:
    return EventOverlap(EventHandle())
