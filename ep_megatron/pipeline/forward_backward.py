"""Schedules behind the call that Megatron's training loop makes.

    from ep_megatron.pipeline.forward_backward import get_forward_backward_func
    forward_backward_func = get_forward_backward_func("dualpipev")

takes the place of Megatron's function of that name: same keyword arguments, same result, same
duties (losses scaled, gradients synchronised and finalised, timers, evaluation). The forward step
stays what it was; the model that it calls hands back a plan in place of an output, which the step
passes on, as Megatron's own combined 1F1B has it.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from ep_megatron.backends.meeting import Meeting
from ep_megatron.pipeline import program
from ep_megatron.pipeline.action import Schedule
from ep_megatron.pipeline.check import check
from ep_megatron.pipeline.duties import Request, Step, expert_group, groups_of, message_shape
from ep_megatron.pipeline.observer import Recorder
from ep_megatron.pipeline.p2p import Wire
from ep_megatron.pipeline.placement import forwards_of, schedule_for
from ep_megatron.pipeline.runtime import Hooks, Options, Runtime
from ep_megatron.pipeline.schedule import SCHEDULES

MakeSchedule = Callable[[int, int, int], Schedule]
"""Pipeline ranks, micro-batches, chunks per rank -> schedule."""


@dataclass(frozen=True)
class Settings:
    """How a schedule is executed.

    Attributes:
        overlap: run the halves of pairs node by node in turn; without it one after the other.
        launch_early: see `nodes.overlapped`; None: on a CPU, not on a GPU.
        timeout: seconds that a wait for another stage may take.
        weights_hide: compute weights' gradients beside the exchange of their inputs' gradients.
            Off, and `overlap` off, nothing runs beside an exchange: what overlap is compared with.
    """

    overlap: bool = True
    launch_early: bool | None = None
    timeout: float = 600.0
    weights_hide: bool = True


@functools.cache
def get_forward_backward_func(
    schedule: str | MakeSchedule,
    overlap: bool = True,
    launch_early: bool | None = None,
    timeout: float = 600.0,
    weights_hide: bool = True,
) -> "ForwardBackward":
    """Return what stands for Megatron's `get_forward_backward_func()`; the same for the same asked.

    Not collective.

    Args:
        schedule: a name, see `schedule.SCHEDULES`; or what makes a schedule, which is checked
            before it runs.
        overlap: see `Settings`.
        launch_early: see `Settings`.
        timeout: see `Settings`.
        weights_hide: see `Settings`.

    Raises:
        ValueError: for an unknown name.
    """
    return ForwardBackward(schedule, Settings(overlap, launch_early, timeout, weights_hide))


class ForwardBackward:
    """One schedule behind Megatron's call; see `get_forward_backward_func`.

    Args:
        schedule: name, or what makes one.
        settings: how it is executed.
    """

    def __init__(self, schedule: str | MakeSchedule, settings: Settings) -> None:
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(
                f"pipeline: expected schedule to be one of {', '.join(SCHEDULES)}, got {schedule!r}"
            )
        self.schedule, self.settings = schedule, settings
        self.recorder: Recorder | None = None
        # By pipeline or expert group, whose end they must not put off.
        self._channels: MutableMapping[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
        self._agreed: MutableMapping[Any, set[str]] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def recorded(self, pp_rank: int) -> Iterator[Recorder]:
        """Record the spans of the calls in this block, as pipeline rank `pp_rank`; CPU only.

        Raises:
            NotImplementedError: where there is a GPU, whose work the host's clock does not see.
        """
        if torch.cuda.is_available():
            raise NotImplementedError(
                "recorded: expected to run on a CPU, got a GPU; spans of a GPU's nodes are not "
                "there yet, use its own profiler"
            )
        self.recorder = Recorder(pp_rank)
        try:
            yield self.recorder
        finally:
            self.recorder = None

    def __call__(  # noqa: PLR0913  (Megatron's arguments)
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Run the forwards and backwards of one step; Megatron's arguments and result.

        Collective over all ranks of the model. Gradients are accumulated where Megatron's would be,
        in micro-batch order for every parameter of a chunk.

        Args:
            forward_step_func: data iterator, model -> what the model returned, function of the
                loss. It must not look into what the model returned.
            data_iterator: one, or one per chunk. For `dualpipe` each must give all micro-batches:
                either chunk runs its half of them.
            model: the chunks, in Megatron's wrappers or not.
            num_microbatches: of the step; of both directions together for `dualpipe`.
            seq_length: tokens of a sequence; not used with `variable_seq_lengths`.
            micro_batch_size: sequences of a micro-batch; likewise.
            decoder_seq_length: in place of `seq_length`.
            forward_only: evaluate.
            collect_non_loss_data: collect `loss_func(output, non_loss_data=True)`.
            first_val_step: whether it is the first step of an evaluation.
            adjust_tensor_shapes_fn: must be None.
            p2p_communicator: accepted; messages go over the pipeline group of `pg_collection`.
            pg_collection: process groups; None takes Megatron's global ones.
            force_all_reduce: see Megatron.

        Returns:
            what the loss functions reported, on the last pipeline rank; else an empty list. For
            `dualpipe`, that of both directions.

        Raises:
            ValueError: the schedule, the model or an argument cannot be used; before anything runs.
            RuntimeError: another rank is late or gone.
        """
        if adjust_tensor_shapes_fn is not None:
            raise ValueError(
                "pipeline: expected adjust_tensor_shapes_fn to be None, got a function; with "
                "variable_seq_lengths each message brings its shape"
            )
        request = Request(
            models=model if isinstance(model, list) else [model],
            iterators=data_iterator if isinstance(data_iterator, list) else [data_iterator],
            forward_step=forward_step_func,
            num_microbatches=num_microbatches,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            first_val_step=first_val_step,
            force_all_reduce=bool(force_all_reduce),
            groups=groups_of(pg_collection),
            timeout=self.settings.timeout,
        )
        schedule = self._schedule(request)
        step = Step(request, schedule, self.recorder)
        self._agree(request, schedule)
        shape = message_shape(request, decoder_seq_length or seq_length, micro_batch_size)
        self._execute(step, schedule, shape)
        return step.reported

    def _schedule(self, request: Request) -> Schedule:
        num_ranks, num_chunks = request.groups.pp.size(), len(request.models)
        make = self.schedule
        if isinstance(make, str):
            make = functools.partial(schedule_for, make)
        if request.forward_only:
            # Any number of micro-batches may be evaluated; 2 P is one that every schedule takes.
            placed = make(num_ranks, 2 * num_ranks, num_chunks)
            schedule = forwards_of(placed, request.num_microbatches)
        else:
            schedule = make(num_ranks, request.num_microbatches, num_chunks)
        check(schedule)
        return schedule

    def _agree(self, request: Request, schedule: Schedule) -> None:
        """Refuse to start unless all ranks hold the same schedule; asked once for each schedule."""
        groups = [request.groups.pp, expert_group(request.models)]
        digest = schedule.digest()
        for group in groups:
            if group is None or group.size() == 1 or digest in self._agreed.get(group, ()):
                continue
            meeting = Meeting(group, self.settings.timeout)
            about = f"{schedule.name} {schedule.num_microbatches} {digest[:32]}"
            answers = meeting.gather_text("pipeline", about)
            others = [rank for rank, answer in enumerate(answers) if answer != about]
            if others:
                raise ValueError(
                    f"pipeline: expected all ranks to hold the schedule {about} (name, "
                    f"micro-batches, digest), got {answers[others[0]]} on rank {others[0]} of the "
                    "group; give all ranks the same"
                )
            self._agreed.setdefault(group, set()).add(digest)

    def _execute(self, step: Step, schedule: Schedule, shape: tuple[int, ...] | None) -> None:
        group, device = step.request.groups.pp, step.device
        channels = self._channels.setdefault(group, {})
        wire = Wire(group, device, self.settings.timeout, channels)
        early = self.settings.launch_early
        options = Options(
            overlap=self.settings.overlap,
            launch_early=device.type == "cpu" if early is None else early,
            message_shape=shape,
            message_dtype=step.config.pipeline_dtype or step.config.params_dtype,
            weights_hide=self.settings.weights_hide,
        )
        if self.recorder is not None:
            how = program.Options(
                pairs=options.overlap,
                weights_hide=options.weights_hide,
                host_runs_ahead=False,
                launch_early=options.launch_early,
                whole_actions=True,
            )
            self.recorder.description = program.describe(schedule, how)
        hooks = Hooks(step.make_pass, step.forward_done, step.backward, step.chunk_done)
        with step.running():
            Runtime(schedule, group.rank(), wire, hooks, options, self.recorder).run()
