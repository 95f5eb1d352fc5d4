"""Run megatron-core on a machine without a CUDA device.

megatron-core asks `torch.cuda` for devices, streams and random states, and creates tensors on
"cuda". Where no CUDA device exists, `install` answers those requests with the CPU. It forks nothing
and uses three mechanisms:

1. a `TorchFunctionMode` that turns a "cuda" device argument into "cpu";
2. replaced attributes of `torch.cuda` (devices, streams, events, random states, memory figures);
3. a short list of named sites inside megatron-core that the first two cannot reach
   (`ep_megatron.megatron.host_sites`), each with the reason and the versions it is for.

Streams are inert: all work is done when the call returns, so nothing overlaps. Where
`torch.cuda.is_available()` is true, `install` changes nothing.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ep_megatron.megatron.host_sites import SITES

_CPU = torch.device("cpu")
_AS_CUDA_TYPE = {
    f"torch.{name}Tensor": f"torch.cuda.{name}Tensor" for name in ("Float", "Half", "BFloat16")
}


class Stream:
    """A stream on which all work is already done."""

    device = _CPU
    cuda_stream = stream_id = device_index = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """Return at once."""

    def wait_event(self, event: "Event") -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: no work is pending."""
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return `event`, or a new one, recorded now."""
        event = event or Event()
        event.record()
        return event


class Event:
    """The moment at which the host called `record`."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.time = 0.0

    def record(self, _stream: Stream | None = None) -> None:
        """Take the time."""
        self.time = time.perf_counter()

    def wait(self, _stream: Stream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: what was recorded is done."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to `end`."""
        return (end.time - self.time) * 1e3


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaToCpu(TorchFunctionMode):
    """Rewrite what asks for CUDA; CPU autograd runs in the same thread, so backward is covered."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers and clip_grads.py compare with 'torch.cuda.FloatTensor' and the like.
            name = func(*args)
            asks = sys._getframe(1).f_globals.get("__name__", "")
            return _AS_CUDA_TYPE.get(name, name) if asks.startswith("megatron.") else name
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Patches:
    """Attributes replaced so far, with what they were."""

    def __init__(self) -> None:
        self.mode: _CudaToCpu | None = None
        self.undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self.undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:
            self.undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)


_patches = _Patches()


def install() -> bool:
    """Answer megatron-core's requests for CUDA with the CPU; not collective, may be called again.

    Call it before a model is built, in the thread that trains.

    Returns:
        True if CUDA requests are answered with the CPU, False if there is a CUDA device and
        nothing was changed.
    """
    if _patches.mode is not None:
        return True
    if torch.cuda.is_available():
        return False
    for name, value in _cuda_attributes().items():
        _patches.set(torch.cuda, name, value)
    for name in ("range_push", "range_pop"):
        _patches.set(torch.cuda.nvtx, name, lambda *_args: 0)
    # Its C++ argument parser rejects our Stream before a mode sees the call.
    _patches.set(torch.Tensor, "record_stream", lambda _tensor, _stream: None)
    for site in SITES:
        site(_patches.set)
    _patches.mode = _CudaToCpu()
    _patches.mode.__enter__()
    return True


def uninstall() -> None:
    """Put back everything `install` replaced."""
    if _patches.mode is None:
        return
    _patches.mode.__exit__(None, None, None)
    _patches.mode = None
    while _patches.undo:
        _patches.undo.pop()()


@contextlib.contextmanager
def without_cuda() -> Iterator[bool]:
    """`install` for the length of a `with` block; yields what `install` returned."""
    already = _patches.mode is not None
    installed = install()
    try:
        yield installed
    finally:
        if not already:
            uninstall()


def _cuda_attributes() -> dict[str, Any]:
    default_stream = Stream()

    @contextlib.contextmanager
    def stream(_stream: Stream | None) -> Iterator[None]:
        yield

    attributes: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda *_args: default_stream,
        "default_stream": lambda *_args: default_stream,
        "current_device": lambda: _CPU,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        # torch.manual_seed would call torch.cuda.manual_seed again.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "memory_stats": lambda *_args: {},
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_args: (0, 0),
    }
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        attributes[name] = lambda *_args: None
    for name in ("memory_allocated", "memory_reserved"):
        attributes[name] = attributes[f"max_{name}"] = lambda *_args: 0
    return attributes
