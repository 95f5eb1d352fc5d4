"""What a low-latency call's report says went wrong, in the words of the CPU backends."""

from collections.abc import Sequence

from ep_megatron import _cuda
from ep_megatron.backends.base import PeerReport
from ep_megatron.backends.packed import (
    NUM_FIELDS,
    LowLatencyCall,
    check_low_latency_agreement,
    other_routing,
)


def raise_disagreement(name: str, status: int, words: Sequence[_cuda.PackedWord]) -> None:
    """Raise what the ranks that are there do not agree in; the same on every rank, or nothing.

    Args:
        name: the operation.
        status: of the report.
        words: by rank.
    """
    if status == _cuda.PACKED_OTHER_ROUTING:  # this rank's alone
        raise other_routing(name, [r for r, word in enumerate(words) if word.has_other_routing])
    if status == _cuda.PACKED_DISAGREED:
        reports = {rank: _said(word) for rank, word in enumerate(words) if word.is_there}
        check_low_latency_agreement(name, reports, len(words))
        raise AssertionError(f"{name}: the ranks disagree in nothing that is named")


def raise_failure(
    name: str, status: int, words: Sequence[_cuda.PackedWord], rank: int, timeout: float
) -> None:
    """Raise what a replayed call failed in.

    Args:
        name: the operation.
        status: of the report.
        words: by rank.
        rank: this one.
        timeout: seconds that it waits for the others.
    """
    name = f"{name} of a CUDA graph"
    if status == _cuda.PACKED_TIMED_OUT:
        raise did_not_come(name, words, rank, timeout)
    if status == _cuda.PACKED_AGAIN:
        others = ", ".join(str(r) for r, word in enumerate(words) if word.is_masked and r != rank)
        raise RuntimeError(
            f"{name}: expected no rank to mask rank {rank} while it read, got a mask by one of "
            f"rank {others}; do not use what that replay gave, later ones do without"
        )
    raise_disagreement(name, status, words)


def did_not_come(
    name: str, words: Sequence[_cuda.PackedWord], rank: int, timeout: float
) -> RuntimeError:
    """Return the error of ranks that were late, where that is one. Arguments: `raise_failure`."""
    late = ", ".join(str(r) for r, word in enumerate(words) if word.is_late)
    return RuntimeError(
        f"{name}: rank {rank} expected all {len(words)} ranks within {timeout:g} s, got no answer "
        f"from rank {late}; make a new Buffer once all ranks are back"
    )


def _said(word: _cuda.PackedWord) -> PeerReport:
    """Return a rank's word; what its kernels found wrong in the words of the other backends."""
    call, error = LowLatencyCall(*word.call[:NUM_FIELDS]), word.error
    if word.kind == _cuda.PACKED_BAD_INDEX:
        error = (
            f"expected topk_idx to be in [-1, {call.num_experts}), got {word.error_value} for "
            f"token {word.error_at}"
        )
    if word.kind == _cuda.PACKED_TOO_MANY:
        error = (
            f"expected expert {word.error_at} to be named at most "
            f"{call.num_max_dispatch_tokens_per_rank} times, got {word.error_value}"
        )
    if word.kind == _cuda.PACKED_BAD_RANGE:
        begin, count = word.error_value >> 32, word.error_value & 0xFFFFFFFF
        error = (
            "expected the handle's packed_recv_layout_range to be as dispatch wrote it, got rows "
            f"{begin} to {begin + count}"
        )
    return PeerReport(call, error)
