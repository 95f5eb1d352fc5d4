"""The network between hosts with GPUs: the binding as far as it goes without any, its errors."""

import ast
import inspect
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from ep_megatron import Buffer, BufferConfig
from ep_megatron.backends.meeting import Meeting, SubMeeting
from ep_megatron.backends.nvshmem import NvshmemNetwork
from tests.ranks import run_on_ranks

STUB = Path(__file__).parents[1] / "ep_megatron" / "_nvshmem.pyi"


@pytest.fixture(scope="module")
def native() -> Any:
    return pytest.importorskip("ep_megatron._nvshmem", reason="built without NVSHMEM")


# -- the compiled module --------------------------------------------------------------------------


def test_importing_needs_no_driver_and_a_program_that_did_ends_well(native: Any) -> None:
    code = (
        "from ep_megatron import _nvshmem as n\n"
        "print(n.version(), n.world(), len(n.unique_id()), n.unique_id() != n.unique_id())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"3\.\d+\.\d+ None 128 True\n", done.stdout)


def test_errors_without_a_gpu_are_exceptions(native: Any) -> None:
    name = native.unique_id()
    for arguments, said in (
        ((name[:-1], 0, 1, 0), r"the unique id to be 128 bytes, got 127"),
        ((bytes(128), 0, 1, 0), r"the unique id to be of version \d+, got 0"),
        ((name, 0, 0, 0), r"the number of ranks to be at least 1, got 0"),
        ((name, 2, 2, 0), r"rank to be from 0 to 1, got 2"),
        ((name, 0, 1, 99), r"a CUDA driver and a GPU, got|the device to be from 0 to \d+, got 99"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"^nvshmem join: expected ({said})"):
            native.join(*arguments)
    with pytest.raises(RuntimeError, match="nvshmem allocate: expected a world, got none"):
        native.allocate(16)
    with pytest.raises(RuntimeError, match="nvshmem put_signal: expected a world, got none"):
        native.put_signal(0, 16, 16, 16, 8, 1, 0)
    assert native.world() is None


def parameters(definition: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in definition.args.args if argument.arg != "self"]


def stub() -> dict[str, list[str]]:
    found = ast.parse(STUB.read_text()).body
    return {node.name: parameters(node) for node in found if isinstance(node, ast.FunctionDef)}


def test_the_stub_says_what_the_module_has(native: Any) -> None:
    for name, names in stub().items():
        signature = getattr(native, name).__doc__.splitlines()[0]
        inside = re.search(r"\((.*)\) ->", signature)
        assert inside is not None
        assert re.findall(r"(\w+): ", inside[1]) == names, signature
    public = {name for name in dir(native) if not name.startswith("_")}
    assert public == {*stub(), "UNIQUE_ID_BYTES"}


def test_the_emulated_module_has_the_same_signatures() -> None:
    pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")
    from tests.cuda.nic import EmulatedNvshmem

    for name, names in stub().items():
        found = list(inspect.signature(getattr(EmulatedNvshmem, name)).parameters)
        assert found == ["self", *names], name


# -- joining a world ------------------------------------------------------------------------------


class Process:
    """What one process knows of NVSHMEM."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.joined: tuple[bytes, int, int] | None = None
        self.puts: list[tuple[int, ...]] = []

    def world(self) -> Any:
        return self.joined

    def unique_id(self) -> bytes:
        return bytes(range(128))

    def join(self, unique_id: bytes, rank: int, num_ranks: int, device: int) -> None:
        if self.error is not None:
            raise self.error
        assert device == 10 + rank
        self.joined = unique_id, rank, num_ranks

    def put_signal(self, *numbers: int) -> None:
        self.puts.append(numbers)


class Threads:
    """A meeting of two threads, as far as joining needs one."""

    num_ranks = 2

    def __init__(self, rank: int, texts: list[str], barrier: threading.Barrier) -> None:
        self.rank, self._texts, self._barrier = rank, texts, barrier

    def gather_text(self, operation: str, text: str, num_bytes: int = 256) -> list[str]:
        assert len(text.encode()) <= num_bytes
        self._barrier.wait(20)
        self._texts[self.rank] = text
        self._barrier.wait(20)
        return list(self._texts)


def join(*processes: Process | ImportError) -> list[NvshmemNetwork | str]:
    """Return each rank's network, or its error."""
    texts, barrier = ["", ""], threading.Barrier(2)
    made: list[NvshmemNetwork | str] = ["", ""]

    def make(rank: int) -> None:
        process = processes[rank]

        def load() -> Process:
            if isinstance(process, ImportError):
                raise process
            return process

        try:
            made[rank] = NvshmemNetwork(Threads(rank, texts, barrier), 10 + rank, 77, load)
        except RuntimeError as error:
            made[rank] = str(error)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return made


def test_the_first_buffer_joins_and_later_ones_are_in() -> None:
    processes = [Process(), Process()]
    for _ in range(2):  # Process.join would notice a second one by another name only
        first, _ = join(*processes)
        assert [process.joined for process in processes] == [
            (bytes(range(128)), rank, 2) for rank in range(2)
        ]
        processes[0].error = processes[1].error = RuntimeError("joined twice")
    assert isinstance(first, NvshmemNetwork)
    first.put_signal(1, 2, 3, 4, 5, 6)
    assert processes[0].puts == [(1, 2, 3, 4, 5, 6, 77)]


def test_what_one_rank_lacks_is_said_on_all() -> None:
    no_module, no_join = ImportError("libnvshmem_host.so.3"), Process(RuntimeError("no card"))
    for processes, said in (
        ((Process(), no_module), "NVSHMEM on every rank (pip install -r requirements-cuda.txt and "
         "ep_megatron anew, on every host), got rank 1: libnvshmem_host.so.3"),
        ((no_join, no_join), "NVSHMEM to join all GPUs, got rank 0: no card; rank 1: no card"),
    ):  # fmt: skip
        errors = join(*processes)
        assert errors == [f"Buffer: expected {said}"] * 2


def test_a_process_is_in_one_world() -> None:
    other, same, new = Process(), Process(), Process()
    other.joined = (bytes(128), 1, 2)  # it is rank 0 here
    same.joined = (bytes(128), 1, 2)
    for processes in ((other, same), (new, same)):
        errors = join(*processes)
        assert errors[0] == errors[1]
        assert "expected the ranks of the first Buffer over several hosts" in str(errors[0])


# -- the choice -----------------------------------------------------------------------------------


class Gpu:
    """As far as the choice of a network goes."""

    ordinal, stream = 0, 0

    def __init__(self, ordinal: int) -> None:
        assert ordinal == 0


def check_choice(rank: int) -> str:
    """Return what a rank hears when another has no NVSHMEM."""
    assert dist.group.WORLD is not None
    config = BufferConfig(backend="cuda", timeout=30, host_id="ABBA"[rank])
    module = None if rank == 2 else SimpleNamespace(world=lambda: None)
    fakes = {"backends.gpu": SimpleNamespace(GpuDevice=Gpu), "_nvshmem": module}
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setitem(sys.modules, f"ep_megatron.{name}", fake)
        with pytest.raises(RuntimeError) as error:
            Buffer(dist.group.WORLD, config=config)
    return str(error.value)


def check_parts(rank: int) -> list[str]:
    """Return what the ranks of a host tell each other, more often on one host than the other."""
    assert dist.group.WORLD is not None
    members = [[0, 3], [1, 2]]["ABBA"[rank] == "B"]
    part = SubMeeting(Meeting(dist.group.WORLD, 30), members)
    for _ in range(2 if rank in (1, 2) else 1):
        said = list(part.gather_text("test", f"{rank} is {part.rank} of {part.num_ranks}"))
    dist.barrier()  # a meeting that is dropped cuts off ranks that are still at it
    return said


def test_several_hosts_need_nvshmem_on_every_rank() -> None:
    pytest.importorskip("ep_megatron._cuda", reason="built without nvcc")
    errors = run_on_ranks(4, check_choice)
    assert len(set(errors)) == 1
    assert re.search("expected NVSHMEM on every rank .* got rank 2: ", errors[0])


def test_the_ranks_of_a_host_meet_alone() -> None:
    a, b = ["0 is 0 of 2", "3 is 1 of 2"], ["1 is 0 of 2", "2 is 1 of 2"]
    assert run_on_ranks(4, check_parts) == [a, b, b, a]
