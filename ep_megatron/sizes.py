"""DeepEP's chunk configuration and size hints: what its formulas give, for callers that ask.

Nothing here needs them: rows go to exact addresses, so there are no chunks to tune, and memory
grows by what arrives. The numbers are DeepEP's, to the byte, so that code which adds them up, or
compares them with what it has, goes on as it is.

Source: formulas and the table of configurations after DeepEP (MIT), `csrc/legacy/config.hpp` and
`deep_ep/buffers/legacy.py`.
"""

from dataclasses import dataclass

_RANKS_PER_NODE = 8
_MAX_TOPK, _MAX_SCALES = 128, 128
_TOPK_IDX_BYTES, _WEIGHT_BYTES, _SCALE_BYTES = 8, 4, 4
_SOURCE_BYTES = 8  # where a row came from
_ALIGNMENT = 128
_KINDS = ("dispatch", "combine")

# (send, receive) tokens per chunk over NVLink, then over RDMA, by number of ranks.
_CHUNKS: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "dispatch": {
        2: (24, 256, 6, 128),
        4: (6, 256, 6, 128),
        8: (6, 256, 6, 128),
        16: (36, 288, 20, 128),
        24: (32, 288, 8, 128),
        32: (32, 288, 8, 128),
        48: (32, 288, 8, 128),
        64: (32, 288, 8, 128),
        96: (20, 480, 12, 128),
        128: (20, 560, 12, 128),
        144: (32, 720, 12, 128),
        160: (28, 720, 12, 128),
    },
    "combine": {
        2: (10, 256, 6, 128),
        4: (9, 256, 6, 128),
        8: (4, 256, 6, 128),
        16: (4, 288, 12, 128),
        24: (1, 288, 8, 128),
        32: (1, 288, 8, 128),
        48: (1, 288, 8, 128),
        64: (1, 288, 8, 128),
        96: (1, 480, 8, 128),
        128: (1, 560, 8, 128),
        144: (2, 720, 8, 128),
        160: (2, 720, 8, 128),
    },
}


@dataclass(frozen=True)
class Config:
    """Chunk sizes, in tokens, as DeepEP's callers give them. Accepted everywhere, needed nowhere.

    Attributes:
        num_sms: SMs, two per channel.
        num_max_nvl_chunked_send_tokens: less than what is received.
        num_max_nvl_chunked_recv_tokens: tokens a receive queue holds.
        num_max_rdma_chunked_send_tokens: at most half of what is received.
        num_max_rdma_chunked_recv_tokens: rounded up to a multiple of the one before.

    Raises:
        ValueError: if the numbers do not fit together.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        """Round the RDMA queue up, and refuse what DeepEP refuses."""
        nvl_send, nvl_recv = (
            self.num_max_nvl_chunked_send_tokens,
            self.num_max_nvl_chunked_recv_tokens,
        )
        rdma_send, rdma_recv = (
            self.num_max_rdma_chunked_send_tokens,
            self.num_max_rdma_chunked_recv_tokens,
        )
        _require(self.num_sms >= 0, "num_sms", "at least 0", self.num_sms)
        for name, value in (("nvl", nvl_send), ("rdma", rdma_send)):
            _require(value > 0, f"num_max_{name}_chunked_send_tokens", "at least 1", value)
        name = "num_max_nvl_chunked_recv_tokens"
        _require(nvl_send < nvl_recv, name, f"more than {nvl_send}, what is sent", nvl_recv)
        name = "num_max_rdma_chunked_recv_tokens"
        _require(rdma_recv > 0, name, "at least 1", rdma_recv)
        rdma_recv = _round_up(rdma_recv, rdma_send)
        object.__setattr__(self, name, rdma_recv)
        expected = f"at least twice {rdma_send}, what is sent"
        _require(2 * rdma_send <= rdma_recv, name, expected, rdma_recv)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes that DeepEP's queues between the ranks of a node take.

        Args:
            hidden_bytes: of one row.
            num_ranks: of the group; any number from 1 up.
        """
        channels, peers, nodes = self._shape(num_ranks)
        num_bytes = channels * peers * (2 * nodes + 3) * 4
        row_bytes = hidden_bytes + _bytes_beside_row()
        num_bytes += channels * peers * self.num_max_nvl_chunked_recv_tokens * row_bytes
        return _round_up(num_bytes, _ALIGNMENT)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes that DeepEP's queues between nodes take; 0 for up to eight ranks."""
        if num_ranks <= _RANKS_PER_NODE:
            return 0
        channels, _, nodes = self._shape(num_ranks)
        num_bytes = channels * nodes * (_RANKS_PER_NODE * 2 + 2) * 4
        row_bytes = hidden_bytes + _bytes_beside_row() + 16
        num_bytes += channels * nodes * self.num_max_rdma_chunked_recv_tokens * row_bytes
        return _round_up(2 * num_bytes, _ALIGNMENT)

    def _shape(self, num_ranks: int) -> tuple[int, int, int]:
        """Return channels, ranks of a node and nodes, of which the last may be part of one."""
        _require(num_ranks >= 1, "num_ranks", "at least 1", num_ranks)
        nodes = max(-(-num_ranks // _RANKS_PER_NODE), 1)
        return self.num_sms // 2, min(num_ranks, _RANKS_PER_NODE), nodes


def default_config(kind: str, num_ranks: int, num_sms: int) -> Config:
    """Return DeepEP's configuration for `kind`, "dispatch" or "combine".

    For a number of ranks that is not in its table, that of the next larger one, or of the largest.
    """
    assert kind in _KINDS
    _require(num_ranks >= 1, "num_ranks", "at least 1", num_ranks)
    table = _CHUNKS[kind]
    size = min((known for known in table if known >= num_ranks), default=max(table))
    return Config(num_sms, *table[size])


def low_latency_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Return the bytes that DeepEP's low-latency buffer takes on each rank.

    Two buffers of everything: signals per expert, what is sent and what is received, by dispatch
    (16 bytes of header, then bfloat16, or FP8 with a float32 scale per 128 columns) or by combine
    (bfloat16 with 4 bytes per 128 columns).
    """
    for name, value in (
        ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
        ("hidden", hidden),
        ("num_ranks", num_ranks),
        ("num_experts", num_experts),
    ):
        _require(value >= 1, name, "at least 1", value, "get_low_latency_rdma_size_hint")
    tokens, num_scales = num_max_dispatch_tokens_per_rank, hidden // 128
    dispatched = 16 + max(2 * hidden, hidden + 4 * num_scales)
    combined = 4 * num_scales + 2 * hidden
    sent = max(tokens * dispatched, num_experts * tokens * combined)
    received = num_experts * tokens * max(dispatched, combined)
    signals = _round_up(4 * num_experts, _ALIGNMENT)
    total = 2 * (signals + sent + received)
    # One alignment more than needed where it fits already: the size is compared, not only used.
    return (total + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT


def elastic_size_hint(
    num_ranks: int, num_max_tokens_per_rank: int, hidden: int, num_topk: int, is_fp8: bool
) -> int:
    """Return the bytes of DeepEP's `ElasticBuffer` among ranks that reach each other's memory.

    A record of every token of every rank for dispatch (row, scales of 32 columns with FP8,
    routing), or of every token and contributing rank for combine; rounded up to 2 MiB.
    """
    row_bytes = _round_up(hidden if is_fp8 else 2 * hidden, 32)
    scale_bytes = _round_up(4 * (-(-hidden // 32)), 32) if is_fp8 else 0
    dispatched = row_bytes + scale_bytes + _round_up(8 * num_topk + 4 * (1 + num_topk), 32)
    combined = _round_up(2 * hidden, 32) + _round_up(8 * num_topk, 32)
    tokens = num_max_tokens_per_rank
    num_bytes = max(num_ranks * dispatched, min(num_ranks, num_topk) * combined) * tokens
    return _round_up(num_bytes, 2 << 20)


def _bytes_beside_row() -> int:
    weights, scales = _MAX_TOPK * _WEIGHT_BYTES, _MAX_SCALES * _SCALE_BYTES
    return _SOURCE_BYTES + _MAX_TOPK * _TOPK_IDX_BYTES + weights + scales


def _round_up(count: int, alignment: int) -> int:
    return (count + alignment - 1) // alignment * alignment


def _require(
    is_met: bool, name: str, expected: str, actual: object, operation: str = "Config"
) -> None:
    if not is_met:
        raise ValueError(f"{operation}: expected {name} to be {expected}, got {actual}")
