"""Other users reach nothing, and nothing that a peer says is believed unchecked."""

import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_megatron import BufferConfig
from ep_megatron.backends.base import OPERATIONS, Call, Routing, Rows
from ep_megatron.backends.shared_memory import SharedMemoryBackend
from ep_megatron.handle import DispatchHandle
from tests.puppet import CONTROL_BYTES, LAYOUT, NO_PLACE, PuppetPeer
from tests.ranks import fresh_processes

SHM = Path("/dev/shm")
ARENA_BYTES = 1 << 16
TOPK_IDX = torch.tensor([[0, 2], [1, 3], [2, 3], [-1, 0]])  # of 4 experts on 2 ranks
NUM_ROWS_THERE = {False: 3, True: 4}  # what rank 0 sends to rank 1, by `expand`
CONFIG = BufferConfig(timeout=5.0, max_bytes=1 << 20, initial_bytes=0)
HONEST: dict[str, Any] = {
    "counts": ((1, 2), (1, 0, 1, 1)),
    "rows_offset": CONTROL_BYTES,
    "rows_bytes": ARENA_BYTES // 2,
    "weights_offset": CONTROL_BYTES + ARENA_BYTES // 2,
    "committed": CONTROL_BYTES + ARENA_BYTES,
}
CANARY = b"\xa5" * 4096


class Pair:
    """A real rank 0 and its puppet."""

    def __init__(self) -> None:
        self.puppet = PuppetPeer(SHM, ARENA_BYTES + len(CANARY))
        end = CONTROL_BYTES + ARENA_BYTES
        self.puppet.own.memory[end : end + len(CANARY)] = CANARY
        self.backend = SharedMemoryBackend(self.puppet, CONFIG)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()
        # What follows the bytes that rank 1 has said it has is never touched.
        intact = self.puppet.own.memory[CONTROL_BYTES + ARENA_BYTES :] == CANARY
        self.puppet.close()
        assert intact

    def dispatch(self, expand: bool, **post: Any) -> tuple[Rows, DispatchHandle]:
        rows = Rows(torch.arange(64.0).view(4, 16), None, torch.rand(4, 2))
        routing = Routing(TOPK_IDX, 4, expand, 2 if expand else 1)
        self.puppet.take_part(Call.of("dispatch", rows, routing), **{**HONEST, **post})
        return self.backend.dispatch(rows, routing)

    def combine(self, handle: DispatchHandle, **post: Any) -> torch.Tensor:
        shape = (handle.num_recv_rows,) if handle.expand else (handle.num_recv_rows, 2)
        rows = Rows(torch.ones(handle.num_recv_rows, 16), None, torch.rand(shape))
        self.puppet.take_part(Call.of("combine", rows, handle), **{**HONEST, **post})
        return self.backend.combine(rows, handle)[0]


NUMBERS = st.one_of(
    st.integers(-2, 6), st.integers(-(1 << 31), (1 << 31) - 1), st.sampled_from([-(1 << 31), 0])
)
OFFSETS = st.one_of(
    st.integers(0, NO_PLACE),
    st.integers(0, CONTROL_BYTES + 2 * ARENA_BYTES),
    st.integers(0, 40).map(lambda page: CONTROL_BYTES + 4096 * (page - 8)),
    st.integers(1, 1 << 20).map(lambda before: NO_PLACE - before),
    st.just(NO_PLACE),
)


def lies(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """One to all words of a post, each anything."""
    words: dict[str, st.SearchStrategy[Any]] = {
        "counts": st.tuples(
            st.tuples(*[NUMBERS] * 2), st.tuples(*[st.one_of(st.integers(0, 2), NUMBERS)] * 4)
        ),
        "rows_offset": OFFSETS,
        "rows_bytes": OFFSETS,
        "weights_offset": OFFSETS,
        "committed": OFFSETS,
        **more,
    }
    return st.fixed_dictionaries({}, optional=words)


ERRORS = st.tuples(st.integers(0, 9), st.binary(max_size=LAYOUT["error_bytes"]))
CALLS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=16, max_size=16)
PATIENT = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def fuzz_dispatch() -> None:
    outcomes = set()

    @PATIENT
    @given(st.booleans(), lies(error=ERRORS, lie=CALLS), OFFSETS, OFFSETS)
    def fuzz(expand: bool, post: dict[str, Any], grant_at: int, committed: int) -> None:
        with Pair() as pair:
            pair.puppet.own.grant(1, grant_at, committed, b"\xff\xfe no end" * 50)
            try:
                received, handle = pair.dispatch(expand, **post)
            except (ValueError, RuntimeError) as error:
                assert str(error).startswith("dispatch: ")  # noqa: PT017
                outcomes.add("refused")
                return
            assert len(received.x) == handle.num_recv_rows <= 1 << 20
            outcomes.add("went on")

    fuzz()
    assert outcomes == {"refused", "went on"}


def fuzz_combine() -> None:
    outcomes = set()

    @PATIENT
    @given(st.booleans(), lies())
    def fuzz(expand: bool, post: dict[str, Any]) -> None:
        with Pair() as pair:
            _, handle = pair.dispatch(expand)
            try:
                pair.combine(handle, **post)
            except RuntimeError as error:
                assert str(error).startswith("combine: ")  # noqa: PT017
                outcomes.add("refused")
                return
            outcomes.add("went on")

    fuzz()
    assert outcomes == {"refused", "went on"}


def check_honest_puppet() -> None:
    """What the fuzzing starts from is a call that works."""
    for expand in (False, True):
        with Pair() as pair:
            received, handle = pair.dispatch(expand)
            assert int((handle.route_rank == 1).sum()) == NUM_ROWS_THERE[expand]
            assert torch.equal(received.x[0], torch.arange(16.0))
            row = pair.puppet.own.memory[CONTROL_BYTES : CONTROL_BYTES + 64]
            assert torch.frombuffer(bytearray(row), dtype=torch.float32).tolist() == [
                float(n) for n in range(16)
            ]
            combined = pair.combine(handle)
            assert torch.equal(combined[3], torch.ones(16))


def check_lies_are_named() -> None:
    """Each lie ends the group with a sentence that names the rank and what it said."""
    beyond = CONTROL_BYTES + ARENA_BYTES
    for post, sentence in (
        ({"counts": ((-1, 1), (1, 0, 1, 0))}, "rank 1 counts -1 tokens and 1 rows"),
        ({"counts": ((1, 1), (1, 0, 9, 0))}, "rank 1 counts 1 tokens and 9 rows"),
        ({"rows_offset": 0}, "rank 1 names 576 bytes at 0"),
        ({"rows_offset": beyond}, f"rank 1 names 576 bytes at {beyond}"),
        ({"rows_offset": CONTROL_BYTES + 64}, "at a multiple of 4096"),
        ({"committed": beyond + (1 << 30)}, f"to {beyond + (1 << 30)} of {beyond + 4096}"),
    ):
        with Pair() as pair:
            with pytest.raises(RuntimeError, match="expected all 2 ranks in call 1") as caught:
                pair.dispatch(True, **post)
            assert sentence in str(caught.value), str(caught.value)
            assert pair.puppet.theirs is not None
            assert pair.puppet.theirs.read(LAYOUT["gave_up"], "I") == 1  # and the others hear of it
            with pytest.raises(RuntimeError, match="expected a working Buffer"):
                pair.dispatch(True)


def check_cut_file() -> None:
    """Rows' memory that was cut off, before or after it was mapped, is an error, not a SIGBUS."""
    puppet = PuppetPeer(SHM, ARENA_BYTES)
    os.truncate(SHM / puppet.name, 4096)
    with pytest.raises(RuntimeError, match="is too small to be a segment"):
        SharedMemoryBackend(puppet, CONFIG)
    puppet.close()
    with Pair() as pair:
        os.truncate(SHM / pair.puppet.name, CONTROL_BYTES + 4096)
        with pytest.raises(RuntimeError, match=r"cannot reach .* bytes of .*: Bad address"):
            pair.dispatch(False)
        os.truncate(SHM / pair.puppet.name, pair.puppet.num_bytes)
        pair.puppet.own.memory[-len(CANARY) :] = CANARY


def check_unknown_words_are_shown() -> None:
    """Numbers that name no dtype and no operation are shown as they are."""
    assert len(OPERATIONS) < 99
    for field in range(len(Call._fields)):
        with Pair() as pair:
            rows, routing = Rows(torch.zeros(4, 16)), Routing(TOPK_IDX, 4)
            call = Call.of("dispatch", rows, routing)
            lie = list(call)
            lie[field] = 99
            pair.puppet.take_part(call, lie, **HONEST)
            with pytest.raises(ValueError, match=r"got .*99.* on rank 1$"):
                pair.backend.dispatch(rows, routing)


CHECKS = [
    check_honest_puppet,
    check_lies_are_named,
    check_cut_file,
    check_unknown_words_are_shown,
    fuzz_dispatch,
    fuzz_combine,
]


def _run(check: Callable[[], None], pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        check()
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())


@pytest.mark.parametrize("check", CHECKS, ids=[c.__name__ for c in CHECKS])
def test_peers(check: Callable[[], None]) -> None:
    """In a process of its own: what must not happen is a fault that ends it."""
    context = fresh_processes()
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(check, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(300), "no answer within 300 s"
        answer = ours.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process ended with exit code {process.exitcode}")
    process.join()
    assert answer is None, answer
    assert not list(SHM.glob(f"ep_megatron.test.{process.pid}.*"))


# -- other users ----------------------------------------------------------------------------------

OTHER = 65534  # nobody
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
_ATTEMPT = """
import os, sys
for path in sys.argv[1:]:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        try:
            os.open(path, flags)
        except PermissionError:
            continue
        sys.exit(f"{path} opened")
    try:
        os.remove(path)
    except PermissionError:
        continue
    sys.exit(f"{path} removed")
"""


def _become_other() -> None:
    os.setgroups([])
    os.setresgid(OTHER, OTHER, OTHER)
    os.setresuid(OTHER, OTHER, OTHER)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach and write, as /dev/shm is."""
    folder = Path(tempfile.mkdtemp(dir=SHM))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@needs_root
def test_another_user_can_neither_read_nor_write_nor_remove_a_segment(open_folder: Path) -> None:
    puppet = PuppetPeer(open_folder, ARENA_BYTES)
    config = replace(CONFIG, shm_dir=str(open_folder))
    seen: list[Path] = []

    def look(operation: str, text: str, num_bytes: int = 256) -> Any:
        seen.extend(p for p in open_folder.iterdir() if p.name == text)
        if seen and text == seen[0].name:  # the moment in which the segment has a name
            assert seen[0].stat().st_mode & 0o777 == 0o600
            _attempt(str(seen[0]))
        return PuppetPeer.gather_text(puppet, operation, text, num_bytes)

    puppet.gather_text = look  # type: ignore[method-assign]
    backend = SharedMemoryBackend(puppet, config)
    assert len(seen) == 1
    assert len(seen[0].name.rsplit(".", 1)[1]) == 32  # 128 random bits
    assert not seen[0].exists()
    # Nor by the descriptors and mappings of the process, now that the name is gone.
    process = Path("/proc") / str(os.getpid())
    paths = [path for part in ("fd", "map_files") for path in (process / part).iterdir()]
    mine = [str(p) for p in paths if p.is_symlink() and seen[0].name in os.readlink(p)]
    assert mine
    _attempt(str(process / "mem"), *mine)
    backend.close()
    puppet.close()


def _attempt(*paths: str) -> None:
    result = subprocess.run(
        ["python3", "-c", _ATTEMPT, *paths],
        preexec_fn=_become_other,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@needs_root
def test_what_another_user_planted_is_refused(open_folder: Path) -> None:
    puppet = PuppetPeer(open_folder, ARENA_BYTES)
    os.chown(open_folder / puppet.name, OTHER, OTHER)
    config = replace(CONFIG, shm_dir=str(open_folder))
    with pytest.raises(RuntimeError, match="is not a file of this user with mode 0600"):
        SharedMemoryBackend(puppet, config)
    os.chown(open_folder / puppet.name, os.geteuid(), os.getegid())
    (open_folder / puppet.name).rename(open_folder / "real")
    (open_folder / puppet.name).symlink_to(open_folder / "real")
    with pytest.raises(RuntimeError, match="cannot open"):
        SharedMemoryBackend(puppet, config)
    puppet.close()
    assert sorted(p.name for p in open_folder.iterdir()) == ["real"]
