"""DeepEPTokenDispatcher: Megatron's six dispatcher steps over fused dispatch and combine.

Rows arrive grouped by local expert, so Megatron's permute and unpermute fall away:

    dispatch_preprocess    routing map -> top-k slots (local)
    token_dispatch         fused dispatch; the weights travel with the rows
    dispatch_postprocess   hands rows, counts and weights to the experts
    combine_preprocess     nothing to do
    token_combine          fused combine: sums a token's rows over its experts
    combine_postprocess    restores the shape; adds overlapped shared experts

The experts multiply by the weights (or their input by them, with `moe_apply_probs_on_input`); the
dispatcher never does. What the backward passes need travels in autograd's contexts, so a forward of
one microbatch may come between forward and backward of another, as in Megatron's combined 1F1B.
Between `token_dispatch` and `token_combine` of one forward the handle is kept here (and with 1F1B
overlap the rows, see stand_in.py), because Megatron's signatures have no place for it.

Shape letters: T tokens, H hidden, E experts, L local experts, K top-k, N rows received.
"""

import functools
import weakref
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from ep_megatron.autograd import fused_combine, fused_dispatch
from ep_megatron.buffer import Buffer
from ep_megatron.fp8 import Fp8Recipe, WireDtype, wire_recipe
from ep_megatron.handle import DispatchHandle
from ep_megatron.megatron import stand_in
from ep_megatron.megatron.routing import repeat_for_tensor_parallel, select_slots

# Layers share the buffer of their group. The dispatchers own it: when the last one of a group goes,
# so does the buffer, and a group made after destroy_process_group is another key.
_buffers: weakref.WeakValueDictionary[tuple[ProcessGroup, str], Buffer] = (
    weakref.WeakValueDictionary()
)


def shared_buffers() -> list[Buffer]:
    """Return the Buffers that dispatchers use in this process now, oldest first. Local."""
    return list(_buffers.values())


def shared_buffer(group: ProcessGroup, backend: str) -> Buffer:
    """Return the one buffer of `group` and `backend`, made on first use.

    Collective over `group` on first use. It lives as long as someone holds it.

    Args:
        group: tensor x expert parallel group.
        backend: as for `Buffer`.
    """
    buffer = _buffers.get((group, backend))
    if buffer is None:
        buffer = _buffers[group, backend] = Buffer(group, backend=backend)
    return buffer


class OverlapProbs:
    """Where Megatron's combined 1F1B puts the detached weights of a flex dispatcher.

    It assigns them here before `token_dispatch` and before `dispatch_postprocess`, and passes the
    same tensors as arguments, which are what the dispatcher uses.
    """

    token_probs: Tensor | None = None
    dispatched_probs: Tensor | None = None


class DeepEPTokenDispatcher(MoETokenDispatcher):
    """Token dispatcher over the exact-address protocol, for any tensor x expert parallel group.

    Each expert tensor parallel rank is a destination of its own; their partial outputs are summed
    by combine. `tokens_per_expert` are int64 on the CPU and, with FP8 or FP4 experts, padded to the
    alignment of their matrix products, so that the experts find nothing left to pad.

    Args:
        num_local_experts: L.
        local_expert_indices: the L global indices of this rank's experts.
        config: Megatron's TransformerConfig.
        pg_collection: process groups `ep`, `expt_tp` and `tp_ep`.
        backend: as for `Buffer`, one of `ep_megatron.config.BACKENDS`.
        dispatch_dtype: how rows travel to the experts: "bf16" (as they are, whatever their dtype),
            "fp8" (e4m3, a scale per 128 columns) or "mxfp8" (per 32); they arrive widened.
        combine_grad_dtype: likewise for the gradients that combine's backward pass sends.

    Raises:
        ValueError: if `moe_pad_expert_input_to_capacity` is set, or the hidden size is not a
            multiple of the FP8 blocks.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any,
        backend: str = "auto",
        dispatch_dtype: WireDtype = "bf16",
        combine_grad_dtype: WireDtype = "bf16",
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if config.moe_pad_expert_input_to_capacity:
            raise ValueError(
                "DeepEPTokenDispatcher: expected moe_pad_expert_input_to_capacity to be False, got "
                "True; rows are never padded to the capacity, leave the flag out (the capacity "
                "factor itself works)"
            )
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts = self.tp_size * self.ep_size * num_local_experts
        self.backend = backend
        self.dispatch_fp8 = wire_recipe(dispatch_dtype)
        self.combine_grad_fp8 = wire_recipe(combine_grad_dtype, is_gradient=True)
        _check_hidden(config.hidden_size, dispatch_dtype, self.dispatch_fp8)
        _check_hidden(config.hidden_size, combine_grad_dtype, self.combine_grad_fp8)
        self.topk_idx: Tensor | None = None
        self.cudagraph_attrs = ["topk_idx"]
        self._comm_manager = OverlapProbs()
        self._handle: DispatchHandle | None = None
        self._hidden_rows: Tensor | None = None

    @functools.cached_property
    def buffer(self) -> Buffer:
        """The group's Buffer, made on first use. Collective then."""
        return shared_buffer(self.tp_ep_group, self.backend)

    @property
    def expert_alignment(self) -> int:
        """Rows each expert's block is padded to a multiple of.

        Read for every dispatch, as Megatron may switch FP8 on for some layers after building them.
        """
        config = self.config
        pads = config.fp8 or config.fp4 or getattr(config, "use_transformer_engine_op_fuser", False)
        return max(1, get_align_size_for_quantization(config)) if pads else 1

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn the routing map into top-k slots. Local; differentiable in both tensors.

        Args:
            hidden_states: `[S / TP, B, H]`.
            routing_map: `[T, E]` bool.
            probs: `[T, E]` floating point.

        Returns:
            hidden_states: `[T, H]`, a view.
            topk_weights: `[T, K * TP]` float32 or float64.
        """
        self.hidden_shape = hidden_states.shape
        topk_idx, weights = select_slots(routing_map, probs, self.config.moe_router_topk)
        self.topk_idx, weights = repeat_for_tensor_parallel(
            topk_idx, weights, self.num_local_experts, self.tp_size
        )
        return hidden_states.view(-1, self.hidden_shape[-1]), weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send each row to the ranks of its experts. Collective; differentiable in both tensors.

        Args:
            hidden_states: `[T, H]`.
            probs: `[T, K * TP]`, from `dispatch_preprocess`.

        Returns:
            rows: `[N, H]` grouped by local expert; with `overlap_moe_expert_parallel_comm` a tensor
                of that shape which only `dispatch_postprocess` turns into the rows.
            row_weights: `[N]`, the dtype of `probs`, 0 on padding rows.
        """
        assert self.topk_idx is not None  # set by dispatch_preprocess
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states.view(self.hidden_shape))
        rows, _, row_weights, handle = fused_dispatch(
            hidden_states,
            self.topk_idx,
            probs,
            self.num_experts,
            self.buffer,
            expand=True,
            expert_alignment=self.expert_alignment,
            fp8=self.dispatch_fp8,
        )
        assert isinstance(handle, DispatchHandle)  # of as many rows as come
        self._handle = handle
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        if self.config.overlap_moe_expert_parallel_comm:
            rows, self._hidden_rows = stand_in.hide(rows)
        assert row_weights is not None  # as weights were given
        return rows, row_weights

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows `[N, H]`, tokens_per_expert `[L]` int64 on the CPU and weights `[N]`."""
        counts = self._current_handle("dispatch_postprocess").num_recv_tokens_per_expert
        if self._hidden_rows is not None:
            hidden_states = stand_in.show(hidden_states, self._hidden_rows)
            self._hidden_rows = None
        return hidden_states, torch.tensor(counts, dtype=torch.int64, device="cpu"), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the rows `[N, H]` as they are: combine takes them grouped by expert."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sum the experts' rows `[N, H]` into tokens `[T, H]`. Collective; differentiable."""
        handle = self._current_handle("token_combine")
        output = fused_combine(hidden_states, handle, self.buffer, grad_fp8=self.combine_grad_fp8)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(output)
            self.shared_experts.post_forward_comm()
        self._handle = None
        return output

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Restore `[S / TP, B, H]` and add the overlapped shared experts' output."""
        output = hidden_states.view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def _current_handle(self, operation: str) -> DispatchHandle:
        if self._handle is None:
            raise RuntimeError(
                f"{operation}: expected a dispatch that is not combined yet, got none; call "
                "token_dispatch first, once for every token_combine"
            )
        return self._handle


def _check_hidden(hidden_size: int, name: str, recipe: Fp8Recipe | None) -> None:
    if recipe is not None and hidden_size % recipe.block:
        raise ValueError(
            f"DeepEPTokenDispatcher: expected hidden_size to be a multiple of {recipe.block} for "
            f'"{name}", got {hidden_size}; leave the rows in "bf16"'
        )
