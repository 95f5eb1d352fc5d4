"""What a dispatch of a checkpointed forward pass leaves for the same dispatch when it is run again.

Activation checkpointing runs a region twice. The second time every token goes where it went before,
so nothing has to be counted or agreed upon again: a fresh `Buffer.dispatch` inside the second run
takes the handle of the first, and only rows travel. Rows are not kept, which is what checkpointing
is for. Which dispatch is which follows from their order in the region, alike on all ranks.

    checkpoint(layer, x, use_reentrant=False, context_fn=recompute.contexts)
    checkpoint(recompute.remember(layer), x, use_reentrant=True)

`ep_megatron.megatron.plugin.install` does the second for Megatron's own checkpoints.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ep_megatron.backends.base import Routing
from ep_megatron.handle import AnyHandle, DispatchHandle

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
ContextPair = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class KeptDispatch:
    """A fresh dispatch as it was: enough to make it again, and to notice that it is another one.

    Attributes:
        maker: what runs the calls of the Buffer that made it.
        routing: a copy.
        recv_topk_idx: `[M, K]`, a copy, or None.
        handle: what was returned.
    """

    maker: "weakref.ref[Any]"
    routing: Routing
    recv_topk_idx: Tensor | None
    handle: AnyHandle

    def check(self, maker: Any, routing: Routing) -> None:
        """Raise unless this is the same dispatch. Local.

        Raises:
            ValueError: if it is of another Buffer, routing or option. On a GPU the device compares
                the routing, and ends the program where they differ.
        """
        mine, theirs = self.routing.topk_idx, routing.topk_idx
        is_same = (
            self.maker() is maker
            and replace(routing, topk_idx=mine) == self.routing
            and (theirs.shape, theirs.device) == (mine.shape, mine.device)
        )
        if is_same and mine.device.type == "cpu":
            is_same = torch.equal(theirs, mine)
        elif is_same:
            torch._assert_async((theirs == mine).all())
        if not is_same:
            raise ValueError(
                "dispatch: expected the recomputation to dispatch as the forward pass did, got "
                "another Buffer, topk_idx or option; make the region deterministic, or do not "
                "keep its handles"
            )

    def received(self) -> tuple[Tensor | None, list[int]]:
        """Return recv_topk_idx and the counts, the caller's own."""
        idx = None if self.recv_topk_idx is None else self.recv_topk_idx.clone()
        if isinstance(self.handle, DispatchHandle):
            return idx, list(self.handle.num_recv_tokens_per_expert)
        return idx, []


class Region:
    """The fresh dispatches of one checkpointed region, in order; one per call of a checkpoint."""

    def __init__(self) -> None:
        self.kept: list[KeptDispatch] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the fresh dispatches inside leave."""
        self.kept.clear()
        with _inside(_Run(self, None)):
            yield

    def replaying(self) -> AbstractContextManager[None]:
        """Let the fresh dispatches inside go the ways that are kept; as often as it is entered."""
        return _Anew(lambda: _inside(_Run(self, 0)))


@dataclass
class _Run:
    region: Region
    position: int | None  # of the next dispatch to take; None while recording


_runs: ContextVar[tuple[_Run, ...]] = ContextVar("ep_megatron_recompute", default=())


@contextlib.contextmanager
def _inside(run: _Run) -> Iterator[None]:
    token = _runs.set((*_runs.get(), run))
    try:
        yield
    finally:
        _runs.reset(token)


class _Anew(AbstractContextManager[None]):
    """A context that is made when it is entered: a retained graph is recomputed more than once."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@contextlib.contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _neither() -> ContextPair:
    return contextlib.nullcontext(), contextlib.nullcontext()


def contexts(within: Callable[[], ContextPair] = _neither) -> ContextPair:
    """Return the `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    Local. What is kept lives as long as the checkpoint does.

    Args:
        within: another such function whose contexts hold too, as
            `functools.partial(create_selective_checkpoint_contexts, policy)`.
    """
    region = Region()
    forward, again = within()
    return (
        _both(forward, region.recording()),
        _Anew(lambda: _both(again, region.replaying())),
    )


def remember(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Return `function` for one call of a checkpoint that has no `context_fn`.

    Local. Its first call is taken for the forward pass, every later one for a recomputation.
    """
    region, is_recorded = Region(), False

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        nonlocal is_recorded
        with region.replaying() if is_recorded else region.recording():
            is_recorded = True
            return function(*args, **kwargs)

    return run


def take(maker: Any, routing: Routing) -> KeptDispatch | None:
    """Return the dispatch that this one repeats, or None if it is new.

    Args:
        maker: see `KeptDispatch`.
        routing: of the dispatch that is asked for.

    Raises:
        ValueError: if the forward pass had no such dispatch.
    """
    runs = _runs.get()
    inner: list[_Run] = []
    for run in reversed(runs):
        if run.position is None:
            inner.append(run)
            continue
        if run.position >= len(run.region.kept):
            raise ValueError(
                f"dispatch: expected at most {len(run.region.kept)} fresh dispatches in the "
                "recomputation, as in the forward pass, got another; make the region deterministic"
            )
        kept = run.region.kept[run.position]
        run.position += 1  # on all ranks, also on one that raises
        kept.check(maker, routing)
        for other in inner:  # a checkpoint inside the one that is recomputed
            other.region.kept.append(kept)
        return kept
    return None


def is_recording() -> bool:
    """Return whether someone keeps what a fresh dispatch leaves."""
    return any(run.position is None for run in _runs.get())


def keep(kept: KeptDispatch) -> None:
    """Hand a fresh dispatch to all who keep such."""
    for run in _runs.get():
        if run.position is None:
            run.region.kept.append(kept)
