"""The places inside megatron-core that need a hand on a machine without CUDA, one function each.

Each imports the module it changes, says why and for which versions of megatron-core (0.16.1 and
0.19.2 were read), and replaces attributes through the given function, so that all can be undone.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

Replace = Callable[[Any, str, Any], None]


def _random_states(replace: Replace) -> None:
    """tensor_parallel/random.py reads generators from CUDA's C++ tables (all versions).

    The CPU's generator plays the GPU's part, which each fork of the tracker then warns about.
    """
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    def keep(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

    replace(megatron_random, "_get_cuda_rng_state", get_state)
    replace(megatron_random, "_set_cuda_rng_state", set_state)
    logger = logging.getLogger(megatron_random.__name__)
    replace(logger, "filters", [*logger.filters, keep])


def _router_gemm(replace: Replace) -> None:
    """The router names te_general_gemm without importing it when TE is absent (0.16 only)."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        replace(moe_utils, "te_general_gemm", None)


def _alltoall_splits(replace: Replace) -> None:
    """The alltoall dispatcher turns only CUDA tensors into split sizes (all versions).

    `all_to_all_single` would get tensors as its split sizes and refuse them.
    """
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)


def _mla_linears(replace: Replace) -> None:
    """MLA asks isinstance(x, TELinear) where TELinear is None without TE (0.16 only)."""
    import megatron.core.transformer.multi_latent_attention as attention

    for name in ("TELinear", "TEColumnParallelLinear"):
        if not isinstance(getattr(attention, name, None), type):
            replace(attention, name, type(name, (), {}))


def _recompute_without_fp8(replace: Replace) -> None:
    """CheckpointWithoutOutput calls TE's FP8 state manager unguarded (0.16 and 0.19)."""
    import megatron.core.tensor_parallel.random as megatron_random

    if hasattr(megatron_random, "FP8GlobalStateManager"):
        return
    manager = type("NoFp8", (), {"is_fp8_enabled": staticmethod(lambda: False)})
    replace(megatron_random, "FP8GlobalStateManager", manager)
    for name in ("activation_recompute_forward", "fp8_autocast"):
        replace(megatron_random, name, lambda **_kwargs: contextlib.nullcontext())


def _pipeline_outputs(replace: Replace) -> None:
    """The schedules free an output's storage right after posting its isend (all versions).

    A CUDA stream orders the two; gloo does not, and would send freed memory without any error. The
    output is kept, and its backward is the ordinary one. Megatron's arguments switch the freeing on
    unconditionally, so it cannot be left to the configuration.
    """
    import megatron.core.pipeline_parallel.schedules as schedules

    def keep_output(_out: torch.Tensor, deallocate_pipeline_outputs: bool = False) -> None:
        pass

    def backward(output: torch.Tensor, grad_output: torch.Tensor | None) -> None:
        torch.autograd.backward(output, grad_tensors=grad_output)

    replace(schedules, "deallocate_output_tensor", keep_output)
    replace(schedules, "custom_backward", backward)


def _distributed_adam(replace: Replace) -> None:
    """DistributedOptimizer cannot restore torch's AdamW, used without TE and Apex (0.16, 0.19).

    Its template of a checkpoint asserts that every parameter has a `step` before any was taken; it
    copies a `step` that was never saved per parameter, and writes leaves outside no_grad; and all
    parameters then share one `step` tensor, which torch increments once per parameter.
    """
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    set_states = optimizer_class._set_main_param_and_optimizer_states
    load, template = optimizer_class.load_state_dict, optimizer_class.sharded_state_dict

    def set_main_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, position = self.model_param_group_index_map[model_param]
        param = self.optimizer.param_groups[group]["params"][position]
        if "step" in self.optimizer.state[param]:
            tensors = {**tensors, "step": self.optimizer.state[param]["step"]}
        with torch.no_grad():
            set_states(self, model_param, tensors)

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].detach().clone()

    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            with torch.no_grad():
                self._init_optimizer_states_with_dummy_values()
        return template(self, model, is_loading, **kwargs)

    replace(optimizer_class, "_set_main_param_and_optimizer_states", set_main_states)
    replace(optimizer_class, "load_state_dict", load_state_dict)
    replace(optimizer_class, "sharded_state_dict", sharded_state_dict)


SITES = (
    _random_states,
    _router_gemm,
    _alltoall_splits,
    _mla_linears,
    _recompute_without_fp8,
    _pipeline_outputs,
    _distributed_adam,
)
