"""Multi-token prediction layers of a GPT chunk, in the steps between which nodes are cut.

DeepSeek-V3's MTP layer is a transformer layer over the hidden states of the layer before it, joined
with the embeddings of the tokens one further. `TransformerLayer` in it is cut into nodes as any
other; what MTP adds is done in the node before and behind it, and the hidden states of all depths
are carried on to the loss. The parts are Megatron's, called in the order of its
`MultiTokenPredictionLayer.forward`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ep_megatron.pipeline.weight_grad import defer

Step = Callable[..., tuple[Tensor, ...]]
"""Hidden states, and those of earlier depths -> the same after the step; inside a node."""


class Predictions:
    """The MTP layers of one pass.

    Args:
        model: a GPTModel with `mtp_process`.
        call: the micro-batch, see `layer.Call`.
    """

    def __init__(self, model: Any, call: Any) -> None:
        self._model, self._call = model, call
        self._layers = list(model.mtp.layers)
        # A node that is computed again finds what the first time left, and leaves it again.
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {0: (call.input_ids, call.position_ids)}

    def layers(self) -> Iterator[tuple[Step, Any, Step]]:
        """Yield the step before, the transformer layer, and the step behind it, of each depth."""
        for depth, layer in enumerate(self._layers):
            yield (
                self._with(self._enter, depth, layer),
                layer.transformer_layer,
                self._with(self._leave, depth, layer),
            )

    @staticmethod
    def _with(step: Callable[..., tuple[Tensor, ...]], depth: int, layer: Any) -> Step:
        return lambda hidden, *earlier: step(depth, layer, hidden, *earlier)

    def _enter(
        self, depth: int, layer: Any, hidden: Tensor, *earlier: Tensor
    ) -> tuple[Tensor, ...]:
        """Join hidden states with the next tokens' embeddings; keep them for the loss."""
        if depth == 0:
            # The decoder's output is a view to the MTP block, which decides in which order three
            # gradients of it are added.
            (hidden,) = hidden.chunk(1)
        input_ids, position_ids = self._tokens[depth]
        input_ids, position_ids, embedded, states = layer._get_embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            embedding=self._model.embedding,
            hidden_states=hidden,
            packed_seq_params=self._call.packed_seq_params,
        )
        self._tokens[depth + 1] = input_ids, position_ids
        with _scope(layer.config):
            joined = layer._concat_embeddings(states, embedded)
        if layer.config.delay_wgrad_compute:
            defer(layer.eh_proj.backward_dw)
        return (joined, *earlier, hidden)

    def _leave(
        self, depth: int, layer: Any, hidden: Tensor, *earlier: Tensor
    ) -> tuple[Tensor, ...]:
        return (layer._postprocess(hidden), *earlier)


@contextlib.contextmanager
def _scope(config: Any) -> Iterator[None]:
    """Enter what Megatron enters around the parts of an MTP layer."""
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with contextlib.ExitStack() as stack:
        if config.sequence_parallel:
            stack.enter_context(get_cuda_rng_tracker().fork())
        if config.fp8:
            stack.enter_context(get_fp8_context(config))
        yield
