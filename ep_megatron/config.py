"""What a user may set on a Buffer, checked in one place."""

from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("auto", "shared_memory", "hierarchical", "process_group", "cuda")
MIB = 1 << 20
MAX_CHUNKS = 8  # in which rows cross from one rank to another, between nodes of GPUs


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """Resources and limits of one Buffer; every rank of a group passes the same values.

    Attributes:
        backend: how rows travel: `"shared_memory"` (CPU ranks of one host), `"hierarchical"` (CPU
            ranks of several hosts), `"process_group"` (`torch.distributed`, any device, any number
            of hosts), `"cuda"` (GPUs, linked by NVLink inside a host and by NVSHMEM between
            hosts; only when asked for) or `"auto"`, which takes shared memory when all ranks are
            CPU ranks of one host, hierarchical when they are CPU ranks of several hosts and some
            host has more than one, and logs what it took.
        timeout: seconds a rank waits for the others inside one call before it raises.
        num_threads: threads that move rows on a CPU; None takes the cores this process may use,
            divided by the ranks on this host, at most four.
        initial_bytes: bytes of shared memory made ready (allocated and faulted in) at the start;
            growing later costs about a second per gigabyte.
        num_sms: most streaming multiprocessors that a kernel of the CUDA backend takes; fewer leave
            more to the computation beside it.
        max_bytes: most bytes of shared memory this rank may allocate for rows; None takes 80 % of
            what is free on the file system, divided by the ranks on this host.
        max_view_bytes: most bytes that may live in tensors handed out as views of shared memory;
            beyond it received rows are copied to ordinary tensors. None takes half of `max_bytes`.
        streaming_bytes: rows go out by non-temporal stores when all ranks of the host together
            write at least this many bytes in a call; None takes a quarter of the last-level cache.
        shm_dir: the memory file system for the segments.
        host_id: overrides the automatic answer to "which ranks share a host", as the environment
            variable `EP_MEGATRON_HOST_ID` does where this is None; equal texts share memory. The
            one value that may differ between ranks.
        float32_between_hosts: whether `hierarchical` and `cuda` return a host's sums in float32,
            twice the bytes, instead of rounded to the dtype of the rows.
        chunk_bytes_between_hosts: `cuda` sends rows to another host in chunks of at least so many
            bytes, at most eight from one rank to another, so that the first are put at their places
            while the others are on their way.
        reduce_before_combine: whether `cuda` sums a token's expert-major rows on their rank, rounds
            the sum to the dtype of the rows and sends back that one row, instead of all of them:
            fewer bytes over NVLink, other last bits than other backends'. Sums in float32 and
            float64 need no rounding; rows of these dtypes are so reduced wherever they have to be
            copied anyway.
        statistics_dir: folder to which each rank writes its statistics, at most once a second, for
            `ep-megatron doctor --live`; None takes the environment variable
            `EP_MEGATRON_STATISTICS_DIR`, and without it writes nothing.
        check_rows: debugging: hashes of rows follow them, and a RuntimeError names the first row
            that came changed (docs/operations.md has what is checked at which cost); None takes
            the environment variable `EP_MEGATRON_CHECK_ROWS` (1 for True). On CPUs.
    """

    backend: str = "auto"
    timeout: float = 100.0
    num_threads: int | None = None
    initial_bytes: int = 16 * MIB
    num_sms: int = 24
    max_bytes: int | None = None
    max_view_bytes: int | None = None
    streaming_bytes: int | None = None
    shm_dir: str = "/dev/shm"
    host_id: str | None = None
    float32_between_hosts: bool = False
    chunk_bytes_between_hosts: int = MIB
    reduce_before_combine: bool = False
    statistics_dir: str | None = None
    check_rows: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _require(self.backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", self.backend)
        _require(self.timeout > 0, "timeout", "a positive number of seconds", self.timeout)
        _require(
            self.num_threads is None or self.num_threads >= 1,
            "num_threads",
            "at least 1",
            self.num_threads,
        )
        _require(self.num_sms >= 1, "num_sms", "at least 1", self.num_sms)
        for name in (
            "initial_bytes",
            "max_bytes",
            "max_view_bytes",
            "streaming_bytes",
            "chunk_bytes_between_hosts",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, "a number of bytes >= 0", value)
        _require(Path(self.shm_dir).is_dir(), "shm_dir", "an existing folder", self.shm_dir)


def _require(is_met: bool, name: str, expected: str, actual: object) -> None:
    if not is_met:
        raise ValueError(f"BufferConfig: expected {name} to be {expected}, got {actual!r}")
