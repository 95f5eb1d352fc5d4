"""megatron-core on a machine without CUDA."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from ep_megatron.megatron import host

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device"),
]


@pytest.fixture
def installed() -> Iterator[None]:
    with host.without_cuda() as answered:
        assert answered
        yield


def _call_as_megatron(expression: str, **names: Any) -> Any:
    """Evaluate an expression as if a line of megatron-core did."""
    return eval(expression, {"__name__": "megatron.core.optimizer", **names})


@pytest.mark.usefixtures("installed")
def test_requests_for_cuda_tensors_are_answered_with_the_cpu() -> None:
    tensors = [
        torch.zeros(2, device="cuda"),
        torch.zeros(2, device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda"),
        torch.tensor([1.0, 2.0], pin_memory=True),
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.usefixtures("installed")
def test_only_megatron_sees_cpu_tensors_as_cuda_tensors() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert x.type() == "torch.BFloat16Tensor"
    assert _call_as_megatron("x.type()", x=x) == "torch.cuda.BFloat16Tensor"
    assert _call_as_megatron("x.long().type()", x=x) == "torch.LongTensor"


@pytest.mark.usefixtures("installed")
def test_streams_and_events_are_always_done() -> None:
    stream, start = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    with torch.cuda.stream(stream):
        x = torch.ones(4)
        x.record_stream(stream)
    end = stream.record_event()
    torch.cuda.current_stream().wait_event(end)
    stream.wait_stream(torch.cuda.current_stream())
    assert stream.query()
    assert end.query()
    assert start.elapsed_time(end) >= 0


@pytest.mark.usefixtures("installed")
def test_forked_random_states_are_separate_and_repeatable() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draw() -> list[torch.Tensor]:
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(1)
        tracker.add("experts", 7)
        before = torch.rand(3)
        with tracker.fork("experts"):
            inside = torch.rand(3)
        return [before, inside, torch.rand(3)]

    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(torch.cat([first[0], first[2]]), torch.rand(6))
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("installed")
def test_pipeline_outputs_stay_whole_after_they_are_sent() -> None:
    from megatron.core.pipeline_parallel import schedules

    x = torch.arange(4.0, requires_grad=True)
    y = x * 2
    schedules.deallocate_output_tensor(y, deallocate_pipeline_outputs=True)
    assert torch.equal(y, torch.tensor([0.0, 2.0, 4.0, 6.0]))
    schedules.custom_backward(y, torch.ones(4))
    assert torch.equal(x.grad, torch.full((4,), 2.0))  # type: ignore[arg-type]


@pytest.mark.usefixtures("installed")
def test_split_sizes_of_alltoall_become_lists_of_the_host() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    splits = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert splits.tolist() == [1, 2]
    assert not torch.is_tensor(splits)


def test_everything_is_put_back() -> None:
    from megatron.core.pipeline_parallel import schedules

    def snapshot() -> list[Any]:
        owned = [torch.cuda.Stream, torch.cuda.current_device, torch.cuda.manual_seed]
        return [*owned, schedules.custom_backward, torch.Tensor.record_stream]

    before = snapshot()
    with host.without_cuda():
        inside = snapshot()
        assert host.install()  # again: changes nothing
        assert snapshot() == inside
    assert snapshot() == before
    assert all(a is not b for a, b in zip(before, inside, strict=True))
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_a_machine_with_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stream = torch.cuda.Stream
    assert not host.install()
    assert torch.cuda.Stream is stream
