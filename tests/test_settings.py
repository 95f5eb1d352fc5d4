"""DeepEP's configurations and size hints, to the byte; class-wide settings; communicators."""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.settings import Settings
from ep_megatron.sizes import Config
from tests.ranks import run_on_ranks
from tests.test_memory import make_buffer

ROW_EXTRA = 8 + 128 * 8 + 128 * 4 + 128 * 4


def align(value: int) -> int:
    return -(-value // 128) * 128


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7, 8, 16, 64, 160])
@pytest.mark.parametrize("hidden_bytes", [64, 14336])
def test_buffer_size_hints_follow_the_formulas(num_ranks: int, hidden_bytes: int) -> None:
    config = Config(24, 8, 288, 12, 100)
    channels, peers, nodes = 12, min(num_ranks, 8), max(num_ranks // 8, 1)
    assert config.num_max_rdma_chunked_recv_tokens == 108  # a multiple of 12
    nvl = channels * peers * (2 * nodes + 3) * 4
    nvl += channels * peers * 288 * (hidden_bytes + ROW_EXTRA)
    assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) == align(nvl)
    rdma = channels * nodes * 18 * 4
    rdma += channels * nodes * 108 * (hidden_bytes + ROW_EXTRA + 16)
    expected = align(2 * rdma) if num_ranks > 8 else 0
    assert config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) == expected


def test_a_hint_by_hand() -> None:
    # 10 channels, 2 ranks, 256 tokens of 128 + 2056 bytes, and 5 words of queue state each.
    hint = Config().get_nvl_buffer_size_hint(128, 2)
    assert hint == align(10 * 2 * 5 * 4 + 10 * 2 * 256 * 2184) == 11182592


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_sms": -1}, "num_sms to be at least 0, got -1"),
        ({"num_max_nvl_chunked_send_tokens": 256}, "to be more than 256, what is sent, got 256"),
        ({"num_max_nvl_chunked_send_tokens": 0}, "to be at least 1, got 0"),
        ({"num_max_rdma_chunked_recv_tokens": 6}, "to be at least twice 6, what is sent, got 6"),
        ({"num_max_rdma_chunked_recv_tokens": 0}, "to be at least 1, got 0"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_config_refuses_what_deepep_refuses(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**wrong)


def test_there_is_a_configuration_for_every_number_of_ranks() -> None:
    for num_ranks in range(1, 300):
        for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
            assert config.get_nvl_buffer_size_hint(1024, num_ranks) > 0
            assert (config.get_rdma_buffer_size_hint(1024, num_ranks) > 0) == (num_ranks > 8)
    assert Buffer.get_dispatch_config(16) == Config(20, 36, 288, 20, 128)
    assert Buffer.get_combine_config(144) == Config(20, 2, 720, 8, 128)
    assert Buffer.get_dispatch_config(5) == Buffer.get_dispatch_config(8)
    with pytest.raises(ValueError, match="num_ranks to be at least 1, got 0"):
        Buffer.get_dispatch_config(0)


def test_the_low_latency_hint_follows_the_formula() -> None:
    tokens, hidden, experts = 128, 7168, 256
    dispatched = 16 + max(2 * hidden, hidden + 4 * hidden // 128)
    combined = 4 * (hidden // 128) + 2 * hidden
    sent = max(tokens * dispatched, experts * tokens * combined)
    received = experts * tokens * max(dispatched, combined)
    total = 2 * (1024 + sent + received)
    assert total % 128 == 0
    hint = Buffer.get_low_latency_rdma_size_hint(tokens, hidden, 8, experts)
    assert hint == total + 128  # DeepEP adds one although it fits


def test_the_number_of_sms_is_class_wide_and_even() -> None:
    try:
        Buffer.set_num_sms(4)
        assert Buffer.num_sms == 4
        assert Buffer.get_combine_config(8).num_sms == 4
        for wrong in (3, 0, -2):
            with pytest.raises(ValueError, match="expected new_num_sms to be even"):
                Buffer.set_num_sms(wrong)
    finally:
        Buffer.set_num_sms(20)
    assert not Buffer.is_sm90_compiled()


def check_threads_follow(rank: int) -> None:
    """set_num_sms reaches a Buffer that exists, and changes no bit."""
    buffer, backend = make_buffer(num_threads=4)
    limits: list[int] = []
    limit = backend.limit_threads

    def note(num_threads: int) -> None:
        limits.append(num_threads)
        limit(num_threads)

    backend.limit_threads = note  # type: ignore[method-assign]
    idx = torch.randint(0, 8, (500, 4), generator=torch.Generator().manual_seed(rank))
    sums = []
    try:
        for num_sms in (20, 2, 2, 6):
            Settings.num_sms = num_sms
            rows, _, _, _, handle, _ = buffer.dispatch(
                torch.ones(500, 64), topk_idx=idx, num_experts=8, expand=True
            )
            assert isinstance(rows, torch.Tensor)
            assert handle is not None
            sums.append(buffer.combine(rows * 3, handle)[0])
    finally:
        Settings.num_sms = 20
    assert limits == [20, 2, 6]
    assert all(torch.equal(total, sums[0]) for total in sums)
    assert buffer.get_comm_stream().query()
    with pytest.raises(NotImplementedError, match="expected a buffer at a fixed place"):
        buffer.get_local_buffer_tensor(torch.bfloat16)


def check_low_latency_threads(rank: int) -> None:
    """Low-latency calls too; their rows are the same on any number of threads."""
    assert dist.group.WORLD is not None
    config = BufferConfig(backend="shared_memory", timeout=30, num_threads=4)
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True, config=config)
    calls = buffer._low_latency
    assert calls is not None
    limits: list[int] = []
    limit = calls.limit_threads

    def note(num_threads: int) -> None:
        limits.append(num_threads)
        limit(num_threads)

    calls.limit_threads = note  # type: ignore[method-assign]
    rng = torch.Generator().manual_seed(rank)
    x, idx = torch.randn(300, 128, generator=rng).bfloat16(), torch.arange(900).view(300, 3) % 8
    sums = []
    try:
        for num_sms in (2, 4, 4):
            Settings.num_sms = num_sms
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 300, 8, use_fp8=False)
            assert isinstance(rows, torch.Tensor)
            sums.append(buffer.low_latency_combine(rows, idx, torch.ones(300, 3), handle)[0])
    finally:
        Settings.num_sms = 20
    assert limits == [2, 4]
    assert all(torch.equal(total, sums[0]) for total in sums)
    torch.testing.assert_close(sums[0].float(), 3 * x.float(), rtol=2**-7, atol=0)
    buffer.destroy()


def test_threads_of_low_latency_calls_follow_too() -> None:
    run_on_ranks(2, check_low_latency_threads)


def test_threads_follow_the_number_of_sms() -> None:
    run_on_ranks(2, check_threads_follow)


class Communicator:
    """The part of mpi4py's communicator that is asked for, over a process group."""

    def Get_rank(self) -> int:  # noqa: N802
        return dist.get_rank()

    def Get_size(self) -> int:  # noqa: N802
        return dist.get_world_size()

    def allgather(self, value: Any) -> list[Any]:
        values = [None] * self.Get_size()
        dist.all_gather_object(values, value)
        return values

    def bcast(self, value: Any, root: int) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=root)
        return values[0]


class Backwards(Communicator):
    def allgather(self, value: Any) -> list[Any]:
        return super().allgather(value)[::-1]


def check_communicator(rank: int) -> None:
    buffer = Buffer(None, comm=Communicator())
    assert (buffer.rank, buffer.group_size) == (rank, 2)
    assert buffer.group is dist.group.WORLD
    with pytest.raises(ValueError, match=r"in their order, got \[1, 0\]; pass group= for a part"):
        Buffer(None, comm=Backwards())
    with pytest.raises(ValueError, match="got int without Get_rank, Get_size, allgather, bcast"):
        Buffer(None, comm=3)
    with pytest.raises(ValueError, match="expected group or comm, got neither"):
        Buffer(None)


def test_a_communicator_stands_for_a_group() -> None:
    run_on_ranks(2, check_communicator)


def test_a_communicator_of_a_process_without_torch_distributed(tmp_path: Path) -> None:
    code = """
import pickle, sys, time, torch
from pathlib import Path
from ep_megatron import Buffer, BufferConfig
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
class Comm:
    calls = 0
    def Get_rank(self): return rank
    def Get_size(self): return 2
    def allgather(self, value):
        self.calls += 1
        part = folder / f"{self.calls}.{rank}.part"
        part.write_bytes(pickle.dumps(value))
        part.rename(part.with_suffix(""))
        files = [folder / f"{self.calls}.{r}" for r in range(2)]
        while not all(f.exists() for f in files): time.sleep(0.01)
        return [pickle.loads(f.read_bytes()) for f in files]
    def bcast(self, value, root): return self.allgather(value)[root]
buffer = Buffer(None, comm=Comm())
x, *_ = buffer.dispatch(torch.full((1, 8), rank + 1.0), topk_idx=torch.tensor([[0, 1]]),
                        num_experts=2)
print(x[:, 0].tolist())
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert out == "[1.0, 2.0]\n"
