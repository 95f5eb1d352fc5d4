"""The compiled CPU side (csrc/bindings_cpu.cpp). Addresses are not checked."""

from collections.abc import Callable, Sequence

def row_kernel_names() -> list[str]:
    """Name the builds of the row kernels that this CPU runs, slowest first."""

def reduce_rows(
    isa: str,
    dtype: str,
    out_ptr: int,
    row_ptrs: list[int],
    group_ends: list[int],
    bias_ptrs: list[int],
    hidden: int,
    streaming: bool,
) -> None:
    """Sum groups of rows with one build of the kernels, for tests; see csrc/cpu/rows.h."""

def copy_row(isa: str, out_ptr: int, row_ptr: int, num_bytes: int, streaming: bool) -> None:
    """Copy a row with one build of the kernels, for tests; see csrc/cpu/rows.h."""

def quantize_rows(
    isa: str,
    dtype: str,
    format: tuple[int, int, float],
    data_ptr: int,
    scales_ptr: int,
    scale_strides: tuple[int, int],
    x_ptr: int,
    num_rows: int,
    hidden: int,
) -> None:
    """Cast rows to e4m3 by (block, kind of scales, min_amax); isa "" is the fastest build."""

def dequantize_rows(
    isa: str,
    dtype: str,
    format: tuple[int, int, float],
    out_ptr: int,
    data_ptr: int,
    scales_ptr: int,
    scale_strides: tuple[int, int],
    num_rows: int,
    hidden: int,
) -> None:
    """Widen e4m3 rows to `dtype`; strides of scales are bytes."""

def encode_logfmt(
    isa: str, extremes_ptr: int, data_ptr: int, x_ptr: int, num_rows: int, hidden: int
) -> int:
    """Cast bfloat16 rows to LogFMT; return the bytes of the data, at most 2 x rows x hidden."""

def decode_logfmt(
    isa: str, out_ptr: int, extremes_ptr: int, data_ptr: int, num_rows: int, hidden: int
) -> None:
    """Write the numbers of LogFMT rows as float32."""

MAX_EXPERTS: int

class Block:
    """Memory of the arena; returned when the object and all tensors of it have died."""

    def __len__(self) -> int: ...
    def tensor(self, offset: int, dtype: tuple[int, int], shape: Sequence[int], /) -> object:
        """Return a dense tensor in the block as a DLPack capsule; dtype is (code, bits) there."""

class Dispatched:
    """What a dispatch found out, and the block its rows lie in."""

    is_agreed: bool
    block: Block
    must_copy: bool
    num_rows_per_rank: list[int]
    num_tokens_per_rank: list[int]
    num_recv_tokens_per_rank: list[int]
    valid_per_expert: list[int]
    def routes(self) -> object:
        """Return `[3, T, K]` int32 of a fresh dispatch as a DLPack capsule; filled as rows are."""
    def topk_idx(self) -> object | None:
        """Return the copy of topk_idx likewise; None with `expand`."""

class Report:
    """One rank's word on a call."""

    call: list[int]
    error: str
    is_out_of_memory: bool

class PeerStatistics:
    """See csrc/cpu/statistics.h."""

    num_last: int
    seconds_behind: float
    seconds_waited: float
    num_bytes: int

class CallStatistics:
    """See csrc/cpu/statistics.h."""

    num_calls: int
    seconds_waiting: float
    seconds_finishing: float
    peers: list[PeerStatistics]

class Exchange:
    """One rank's end of the shared-memory backend; see csrc/cpu/exchange.h."""

    def __init__(
        self,
        folder: str,
        name: str,
        rank: int,
        num_ranks: int,
        max_bytes: int,
        max_view_bytes: int,
        streaming_bytes: int,
        num_threads: int,
        timeout: float,
        has_core_per_rank: bool,
    ) -> None: ...
    def attach(self, names: Sequence[str]) -> None: ...
    def unlink(self) -> None: ...
    def reserve(self, num_bytes: int) -> None: ...
    def dispatch(
        self,
        call: Sequence[int],
        topk_idx: int,
        idx_item_bytes: int,
        routing: tuple[int, int, int, bool, int],
        rows: tuple[int, int, int],
        row_bytes: tuple[int, int, int, int],
        routes: int,
        num_rows_per_rank: Sequence[int] | None,
        valid_per_expert: Sequence[int] | None,
        cast: tuple[str, int, tuple[int, int, float], bool] | None,
        block: Block | None,
        on_planned: Callable[[Dispatched], None] | None,
        /,
    ) -> Dispatched:
        """Dispatch rows (x, scales, weights), routed by (T, K, E, expand, alignment).

        `row_bytes` has a fourth number: bytes of one expert id, 0 where ids do not travel.
        `cast`: dtype and hidden of x, its format as FP8, and whether scales arrive by column.
        """

    def widen(
        self,
        dtype: str,
        format: tuple[int, int, float],
        out: int,
        data: int,
        scales: int,
        scale_strides: tuple[int, int],
        num_rows: int,
        hidden: int,
        /,
    ) -> None:
        """Widen received rows; see dequantize_rows."""

    def combine(
        self,
        call: Sequence[int],
        sizes: tuple[int, int, bool, int],
        num_rows_per_rank: Sequence[int],
        dtype: int,
        hidden: int,
        weight_bytes: int,
        inputs: tuple[int, int, int, int, int],
        out: int,
        out_weights: int,
        /,
    ) -> bool:
        """Combine (routes, x, weights, bias, bias) of sizes (T, K, expand, N)."""

    def report_failure(self, operation: int, error: str) -> None: ...
    def reports(self) -> list[Report]: ...
    def allocate(self, num_bytes: int) -> Block | None: ...
    def interrupt(self) -> None: ...
    def limit_threads(self, num_threads: int) -> None: ...
    def statistics(self) -> list[CallStatistics]:
        """Return what was counted, by operation; from any thread, at any time."""

    def close(self) -> None: ...
    @property
    def is_broken(self) -> bool: ...
    @property
    def committed(self) -> int: ...
    @property
    def num_bytes_in_use(self) -> int: ...

def sections(
    row_bytes: tuple[int, int, int, int],
    num_rows: int,
    num_topk: int,
    expand: bool,
    scales_by_column: bool,
    /,
) -> tuple[int, int, int, int]:
    """Return where (scales, weights, idx) of received rows start, and where the last end."""

def control_layout() -> dict[str, int]:
    """Return where the words of csrc/cpu/control.h lie in a segment, in bytes."""

def remove_stale_segments(folder: str, prefix: str) -> int:
    """Remove segments whose owner died before it could; return how many."""

def count_tokens(
    topk_idx: int,
    idx_item_bytes: int,
    sizes: tuple[int, int, int, int, bool, int],
    per_rank: int,
    per_expert: int,
) -> int:
    """Add one rank's counts to zeroed `[R]` and `[E]` int32; see csrc/cpu/plan.h.

    `sizes` are (T, K, E, R, expand, alignment). Returns -1, or the first number out of range.
    """

def make_routes(
    topk_idx: int,
    idx_item_bytes: int,
    sizes: tuple[int, int, int, int, bool, int],
    counts: tuple[int, int, int],
    source: int,
    routes: tuple[int, int, int],
) -> None:
    """Address one source's rows; `counts` are all sources' `[S, R]`, `[S, E]` int32, and S."""

def sum_parts(
    sizes: tuple[int, int, int],
    parts: Sequence[int],
    rows: int,
    biases: tuple[int, int],
    out: int,
) -> None:
    """Sum each token's rows, one of each part at most, in the order of the parts.

    `sizes` are (index of the dtype, H, T); `rows` is `[T, parts]` int32, -1 where there is none.
    Sums and rounds as `RowKernels.reduce` does.
    """

class LowLatencyReport:
    """One rank's word on a low-latency call."""

    rank: int
    call: list[int]
    error: str

class LowLatency:
    """One rank's end of low-latency calls over shared memory; see csrc/cpu/low_latency.h."""

    def __init__(
        self,
        folder: str,
        name: str,
        rank: int,
        num_ranks: int,
        max_bytes: int,
        num_threads: int,
        timeout: float,
        has_core_per_rank: bool,
        enable_shrink: bool,
    ) -> None: ...
    def attach(self, names: Sequence[str]) -> None: ...
    def unlink(self) -> None: ...
    def close(self) -> None: ...
    def send_dispatch(
        self,
        call: Sequence[int],
        x: int,
        topk: tuple[int, int, int, int],
        format: tuple[int, int, float] | None,
        /,
    ) -> int:
        """Sending half; `topk`: address, bytes of an index, T, K. Returns the call's number."""

    def send_combine(
        self,
        call: Sequence[int],
        x: int,
        layout_range: int,
        topk: tuple[int, int, int, int],
        place: Block | None,
        /,
    ) -> int:
        """Sending half; `place` is the block that x is in, where peers may read it there."""

    def send_nothing(self, operation: int, call: Sequence[int], /) -> int: ...
    def report_failure(self, operation: int, error: str, /) -> None: ...
    def receive_dispatch(
        self,
        number: int,
        call: Sequence[int],
        format: tuple[int, int, float] | None,
        out: tuple[int, ...],
        /,
    ) -> bool:
        """Receiving half into (x, scales, count, src_info, layout_range, waited)."""

    def receive_combine(
        self,
        number: int,
        call: Sequence[int],
        topk: tuple[int, int, int, int],
        weights: int,
        out: int,
        waited: int,
        num_bytes: int,
        /,
    ) -> tuple[bool, list[int]]:
        """Receiving half; the ranks whose rows are not those that `topk` names."""

    def receive_nothing(self, operation: int, number: int, /) -> bool: ...
    def limit_threads(self, num_threads: int) -> None: ...
    def reports(self) -> list[LowLatencyReport]: ...
    def allocate(self, num_bytes: int) -> Block: ...
    def mask(self, rank: int, is_masked: bool, /) -> None: ...
    def masks(self) -> list[int]: ...
    def interrupt(self) -> None: ...
    @property
    def committed(self) -> int: ...
