"""What Megatron's training loop expects of a schedule, besides running it.

Data read, loss divided and scaled, scales of the auxiliary losses set, gradients kept from being
reduced before they are whole, reduced, finalised; timers. `Step` does it for one call.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_megatron.pipeline import layer
from ep_megatron.pipeline.action import Schedule
from ep_megatron.pipeline.copies import reduce_copies, report_of_both_ends
from ep_megatron.pipeline.nodes import Pass
from ep_megatron.pipeline.observer import Recorder, Silent
from ep_megatron.pipeline.placement import GroupOfOne, has_joined_ends, tied_pairs
from ep_megatron.pipeline.weight_grad import split_linears


@dataclass(frozen=True)
class Request:
    """One call, by the names of Megatron's arguments; see `ForwardBackward` and `Settings`."""

    models: list[Any]
    iterators: list[Any]
    forward_step: Callable[..., Any]
    num_microbatches: int
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    force_all_reduce: bool
    groups: Any
    timeout: float


class _Plan:
    """What a forward step gets in place of the model's output."""

    def __init__(self, call: layer.Call) -> None:
        self.call = call

    def __getattr__(self, name: str) -> Any:
        """Refuse a forward step that computes with the output before anything was computed."""
        raise AttributeError(
            f"pipeline: expected the forward step to hand on what the model returns, got a use of "
            f"its {name}; what depends on the output belongs into the function of the loss"
        )


class _Planner:
    """Stands for a model chunk in a forward step: calling it plans the micro-batch.

    Other attributes are the chunk's, so that code that looks for `config` or `vp_stage` finds them.
    """

    def __init__(self, model: Any, gpt: Any) -> None:
        self._model, self._gpt = model, gpt

    def __getattr__(self, name: str) -> Any:
        """Return the chunk's attribute."""
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> _Plan:
        """Return the plan of a call of the chunk with these arguments."""
        return _Plan(layer.bind_call(self._gpt, args, kwargs))

    build_schedule_plan = __call__


class Step:
    """One step's duties on one rank.

    Args:
        request: the call.
        schedule: what will run, checked.
        recorder: collects spans, or None.

    Raises:
        ValueError: the models or the config cannot be used; nothing has run then.
    """

    def __init__(self, request: Request, schedule: Schedule, recorder: Recorder | None) -> None:
        from megatron.core.utils import get_model_config, unwrap_model

        self.request, self._schedule, self._recorder = request, schedule, recorder
        self.config = get_model_config(request.models[0])
        self.chunks = unwrap_model(list(request.models))
        self._rank = request.groups.pp.rank()
        self._check()
        self.reported: list[Any] = []
        self.device = next(self.chunks[0].parameters()).device
        self._num_tokens = torch.zeros([], dtype=torch.int, device=self.device)
        self._tied = tied_pairs(self.chunks)
        self._is_two_way = schedule.num_directions > 1

    def _check(self) -> None:
        request, schedule = self.request, self._schedule
        if len(self.chunks) != schedule.num_chunks:
            raise ValueError(
                f"pipeline: expected model to be {schedule.num_chunks} chunks for "
                f"{schedule.name}, got {len(self.chunks)}"
            )
        if len(request.iterators) != len(self.chunks):
            raise ValueError(
                f"pipeline: expected data_iterator to be {len(self.chunks)} iterators, one for "
                f"each chunk, got {len(request.iterators)}"
            )
        if getattr(self.config, "num_microbatches_with_partial_activation_checkpoints", None):
            raise ValueError(
                "pipeline: expected num_microbatches_with_partial_activation_checkpoints to be "
                "None, got a number; nodes are computed again by recompute_granularity"
            )
        last = schedule.num_stages - 1
        for chunk, gpt in enumerate(self.chunks):
            layer.check_chunk(gpt)
            split_linears(gpt)
            stage = schedule.stages[self._rank][chunk]
            for name, has, should in (
                ("the embedding", gpt.pre_process, stage == 0),
                ("the head", gpt.post_process, stage == last),
            ):
                if has != should:
                    raise ValueError(
                        f"pipeline: expected chunk {chunk} of pipeline rank {self._rank}, stage "
                        f"{stage} of {schedule.name}, to {'have' if should else 'lack'} {name}, "
                        "got the contrary; build chunks with placement.place_chunk"
                    )

    # What the runtime asks for.

    def make_pass(self, chunk: int, microbatch: int) -> Pass:
        """Read a micro-batch and return its nodes."""
        from megatron.core.pipeline_parallel.schedules import set_current_microbatch

        config, model, gpt = self.config, self.request.models[chunk], self.chunks[chunk]
        known = self._schedule.microbatches_of(chunk)
        if config.timers is not None:
            config.timers("forward-compute", log_level=2).start()
        if microbatch == known.start:
            # Both ways read all micro-batches of a step, so that they stay in step.
            self._skip(chunk, known.start)
            is_first = not self.request.forward_only or self.request.first_val_step is not False
            if is_first and hasattr(model, "set_is_first_microbatch"):
                model.set_is_first_microbatch()
        set_current_microbatch(model, microbatch)
        with self._autocast():
            plan, loss_func = self.request.forward_step(
                self.request.iterators[chunk], _Planner(model, gpt)
            )
        if not isinstance(plan, _Plan):
            raise ValueError(
                "pipeline: expected forward_step_func to return what it got from the model, got "
                f"{type(plan).__name__}; what it computes from the output belongs into the "
                "function of the loss"
            )
        if microbatch == known.stop - 1:
            self._skip(chunk, self.request.num_microbatches - known.stop)
        finish = functools.partial(self._finish, chunk, loss_func) if gpt.post_process else _same
        watch = Silent() if self._recorder is None else self._recorder.of(chunk, microbatch)
        return layer.make_pass(gpt, plan.call, finish, watch, self._autocast)

    def forward_done(self, chunk: int, microbatch: int, output: Tensor) -> None:
        """Set the auxiliary losses' scales; on the last stage `_finish` did."""
        if not self.chunks[chunk].post_process:
            self._calc_loss(chunk, output, None, is_last=False)

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Time a backward."""
        timers = self.config.timers
        if timers is not None:
            timers("backward-compute", log_level=2).start()
        yield
        if timers is not None:
            timers("backward-compute").stop()

    def chunk_done(self, chunk: int) -> None:
        """Start to reduce a chunk's gradients behind what is left to do."""
        if not self._tied and not self._is_two_way:
            self._start_grad_sync(chunk)

    # The step around it.

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surround the schedule with what comes before and after it."""
        config = self.config
        timers = config.timers
        if timers is not None:
            timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        if self.request.forward_only:
            yield
        else:
            self._start_param_sync()
            with self._no_sync():
                yield
            self._finalize()
        if self._is_two_way:
            self.reported = report_of_both_ends(self.request.groups.pp, self.reported)
        if timers is not None:
            timers("forward-backward").stop()

    def _finish(self, chunk: int, loss_func: Any, output: Tensor) -> Tensor:
        from megatron.core.transformer.module import Float16Module, float16_to_fp32

        model: Any = self.request.models[chunk]
        while hasattr(model, "module"):
            if isinstance(model, Float16Module):
                output = float16_to_fp32(output)
            model = model.module
        output = self._calc_loss(chunk, output, loss_func, is_last=True)
        scale = self.config.grad_scale_func
        if scale is not None and not self.request.forward_only:
            output = scale(output)
        return output

    def _calc_loss(self, chunk: int, output: Tensor, loss_func: Any, is_last: bool) -> Tensor:
        from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

        request = self.request
        output, num_tokens = forward_step_calc_loss(
            request.models[chunk],
            output,
            loss_func,
            self.config,
            getattr(self.chunks[chunk], "vp_stage", None),
            request.collect_non_loss_data,
            request.num_microbatches,
            self.reported,
            request.groups.cp.size(),
            is_last,
        )
        self._num_tokens += num_tokens
        return output

    def _skip(self, chunk: int, count: int) -> None:
        for _ in range(count):
            next(self.request.iterators[chunk])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.config.enable_autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.config.autocast_dtype)

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Keep hooks from reducing gradients: only the schedule knows when they are whole."""
        given = self.config.no_sync_func
        if given is None:
            given = [model.no_sync for model in self.request.models if hasattr(model, "no_sync")]
        with contextlib.ExitStack() as stack:
            for no_sync in given if isinstance(given, list) else [given]:
                stack.enter_context(no_sync())
            yield

    def _start_param_sync(self) -> None:
        given = self.config.param_sync_func
        if given is not None:
            for chunk, model in enumerate(self.request.models):
                _of_chunk(given, chunk)(model.parameters())

    def _start_grad_sync(self, chunk: int) -> None:
        model, given = self.request.models[chunk], self.config.grad_sync_func
        if self.request.forward_only:
            return
        if given is not None:
            _of_chunk(given, chunk)(model.parameters())
        elif getattr(getattr(model, "ddp_config", None), "overlap_grad_reduce", False):
            model.start_grad_sync()

    def _finalize(self) -> None:
        groups, config = self.request.groups, self.config
        if self._is_two_way:
            reduce_copies(groups.pp, self.chunks, self.request.timeout)
            dist.all_reduce(self._num_tokens, group=groups.pp)
        for embedding, head in self._tied:
            one, other = gradient_of(embedding), gradient_of(head)
            one.add_(other)
            other.copy_(one)
        if self._tied or self._is_two_way:
            for chunk in range(len(self.chunks)):
                self._start_grad_sync(chunk)
        if config.finalize_model_grads_func is None:
            return
        if has_joined_ends(self._schedule):
            # Embedding and head are on one rank, where they have just been summed.
            groups = copy.copy(groups)
            groups.embd = groups.pos_embd = GroupOfOne()
        config.finalize_model_grads_func(
            self.request.models,
            self._num_tokens if config.calculate_per_token_loss else None,
            pg_collection=groups,
            force_all_reduce=self.request.force_all_reduce,
        )


def gradient_of(parameter: Any) -> Tensor:
    """Return where a parameter's gradient is accumulated."""
    gradient: Tensor | None = getattr(parameter, "main_grad", None)
    if gradient is None:
        gradient = parameter.grad
    assert gradient is not None
    return gradient


def _of_chunk(given: Any, chunk: int) -> Any:
    return given[chunk] if isinstance(given, list) else given


def _same(output: Tensor) -> Tensor:
    return output


def groups_of(pg_collection: Any) -> Any:
    """Return the process groups a schedule needs; Megatron's global ones for None."""
    if pg_collection is not None:
        return pg_collection
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=False
    )
    return groups


def expert_group(models: list[Any]) -> dist.ProcessGroup | None:
    """Return the group over which the models' experts exchange tokens, or None without experts."""
    from megatron.core.utils import unwrap_model

    for gpt in unwrap_model(list(models)):
        for one in layer.layers_of(gpt):
            if one.is_moe_layer:
                group: dist.ProcessGroup = one.mlp.token_dispatcher.tp_ep_group
                return group
    return None


def message_shape(
    request: Request, seq_length: int, micro_batch_size: int
) -> tuple[int, ...] | None:
    """Return the shape of hidden states between stages; None where it varies."""
    from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
    from megatron.core.utils import get_model_config

    config = get_model_config(request.models[0])
    if config.variable_seq_lengths:
        return None
    (shape,) = get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=None,
        config=config,
        tp_group=request.groups.tp,
        cp_group=request.groups.cp,
    )
    return tuple(shape)
