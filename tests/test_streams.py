"""CPU streams and events: order, errors, ends, forks and Ctrl-C, without any rank."""

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from ep_megatron.streams import CPUStream, EventHandle, EventOverlap

PATIENCE = 30.0  # seconds; nothing here takes one


def fail() -> None:
    raise ValueError("broken on purpose")


def blocked(stream: CPUStream) -> tuple[threading.Event, EventHandle]:
    """Put something on the stream that ends when the returned event is set."""
    release = threading.Event()
    started = threading.Event()

    def function() -> None:
        started.set()
        assert release.wait(PATIENCE)

    event = stream.submit(function)
    assert started.wait(PATIENCE)
    return release, event


def test_functions_run_in_order_and_events_are_points_between_them() -> None:
    stream, ran = CPUStream(), []
    release, first = blocked(stream)
    events = [stream.submit(lambda i=i: ran.append(i)) for i in range(50)]  # type: ignore[misc]
    point = stream.record_event()
    assert not any(event.query() for event in (first, *events, point))
    assert not stream.query()
    release.set()
    point.current_stream_wait()
    assert ran == list(range(50))
    assert all(event.query() for event in (first, *events))
    stream.synchronize()
    assert stream.query()


def test_an_event_of_the_calling_thread_is_complete() -> None:
    event = EventHandle()
    assert event.query()
    event.current_stream_wait()


def test_one_stream_waits_for_another() -> None:
    producer, consumer, ran = CPUStream(), CPUStream(), []
    release, event = blocked(producer)
    consumer.wait_event(EventOverlap(event))
    consumer.wait_event(EventOverlap(None))
    done = consumer.submit(lambda: ran.append("consumer"))
    assert not done.query()
    ran.append("caller")
    release.set()
    done.current_stream_wait()
    assert ran == ["caller", "consumer"]


def test_an_error_is_raised_at_its_event_and_what_follows_runs() -> None:
    stream, ran = CPUStream(), []
    event = stream.submit(fail)
    after = stream.submit(lambda: ran.append(1))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken on purpose"):
            event.current_stream_wait()
    with pytest.raises(ValueError, match="broken on purpose"), EventOverlap(event):
        pass
    after.current_stream_wait()
    assert ran == [1]


def test_an_error_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    stream = CPUStream()
    with caplog.at_level(logging.ERROR, "ep_megatron.streams"):
        stream.submit(fail, "dispatch")
        stream.synchronize()
        stream.record_event().current_stream_wait()
        gc.collect()
    assert "dispatch failed, and nobody waited for its event: broken on purpose" in caplog.text


def test_event_overlap_waits_at_the_end_of_its_block() -> None:
    stream, ran = CPUStream(), []
    release, event = blocked(stream)
    overlap = EventOverlap(event, extra_tensors=(1, 2))
    overlap.register_hook_after_wait(lambda: ran.append("hook"))
    with overlap(release_handle=True):
        ran.append("block")
        release.set()
    assert ran == ["block", "hook"]
    assert overlap.event is None
    assert overlap.extra_tensors is None
    with overlap, EventOverlap(None):
        pass
    assert ran == ["block", "hook"]  # once
    with pytest.raises(ValueError, match="expected an event, got none"):
        EventOverlap(None).current_stream_wait()


def test_a_stream_that_waits_for_its_own_future_says_so() -> None:
    stream = CPUStream()
    later: list[EventHandle] = []
    go = threading.Event()

    def wait_for_later() -> None:
        assert go.wait(PATIENCE)
        later[0].current_stream_wait()

    event = stream.submit(wait_for_later)
    later.append(stream.record_event())
    go.set()
    with pytest.raises(RuntimeError, match="got a later place on the same stream"):
        event.current_stream_wait()


def ended(name: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while any(thread.name == name for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_thread_ends_with_its_stream_after_what_is_queued() -> None:
    name, ran = "a stream that goes away", []
    stream = CPUStream(name)
    assert ended(name)  # nothing was queued, so there is no thread
    release, _ = blocked(stream)
    stream.submit(lambda: ran.append(1))
    del stream
    gc.collect()
    release.set()
    assert ended(name)
    assert ran == [1]
    closed = CPUStream()
    closed.close()
    with pytest.raises(RuntimeError, match="got one that was closed"):
        closed.submit(fail)


def test_a_fork_is_refused() -> None:
    stream = CPUStream()
    release, event = blocked(stream)
    calls: list[Callable[[], object]] = [
        stream.record_event,
        stream.synchronize,
        event.current_stream_wait,
    ]
    child = os.fork()
    if child == 0:
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += "got a fork of it" in str(error)
        os._exit(0 if refused == len(calls) else 1)
    _, status = os.waitpid(child, 0)
    release.set()
    assert os.waitstatus_to_exitcode(status) == 0
    event.current_stream_wait()


def test_a_wait_hears_ctrl_c_and_makes_the_work_give_up() -> None:
    gave_up = threading.Event()
    stream = CPUStream(interrupt=gave_up.set)

    def work() -> None:
        assert gave_up.wait(PATIENCE)
        raise RuntimeError("gave up")

    event = stream.submit(work)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        event.current_stream_wait()
    with pytest.raises(RuntimeError, match="gave up"):
        event.current_stream_wait()


@pytest.mark.parametrize("how", ["queued", "stuck"])
def test_the_interpreter_ends_with_work_in_flight(how: str) -> None:
    """What is queued still runs; what is stuck is told to give up, and the exit is a clean one."""
    code = """
import sys, threading, time
from ep_megatron import streams
streams._EXIT_GRACE = 1.0 if sys.argv[1] == "stuck" else 30.0
gave_up = threading.Event()
stream = streams.CPUStream(interrupt=gave_up.set)
if sys.argv[1] == "stuck":
    stream.submit(lambda: print("told" if gave_up.wait(60) else "never told", flush=True))
else:
    stream.submit(lambda: time.sleep(0.3))
    stream.submit(lambda: print("ran", flush=True))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("told\n" if how == "stuck" else "ran\n")
