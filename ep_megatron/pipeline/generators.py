"""The published schedules, step by step: each function returns one rank's actions.

Letters as in the papers: F forward, B full backward, I its inputs' half, W its weights' half,
F&B a forward overlapped with a full backward. P ranks, M micro-batches.
"""

from collections.abc import Sequence

from ep_megatron.pipeline.action import Action, Kind


class _Writer:
    """Writes down one rank's actions; knows each chunk's next micro-batch and the waiting Ws."""

    def __init__(self, first_microbatches: Sequence[int]) -> None:
        self.actions: list[Action] = []
        self.forwards = list(first_microbatches)
        self._backwards = list(first_microbatches)
        self._waiting: list[tuple[int, int]] = []

    def _next(self, counters: list[int], chunk: int) -> int:
        counters[chunk] += 1
        return counters[chunk] - 1

    def forward(self, *chunks: int) -> None:
        for chunk in chunks:
            self.actions.append(Action(Kind.F, chunk, self._next(self.forwards, chunk)))

    def backward(self, chunk: int, split: bool = False) -> None:
        """Append a full backward, or its inputs' half with the weights' half waiting."""
        microbatch = self._next(self._backwards, chunk)
        self.actions.append(Action(Kind.I if split else Kind.B, chunk, microbatch))
        if split:
            self._waiting.append((chunk, microbatch))

    def weights(self, chunk: int | None = None) -> None:
        """Append the W that has waited longest, if one waits; of one chunk where given."""
        for waiting in self._waiting:
            if chunk is None or waiting[0] == chunk:
                self._waiting.remove(waiting)
                self.actions.append(Action(Kind.W, *waiting))
                return

    def all_weights(self, chunk: int | None = None) -> None:
        for _ in range(len(self._waiting)):
            self.weights(chunk)

    def pair(self, forward_chunk: int, backward_chunk: int) -> None:
        forward = self._next(self.forwards, forward_chunk)
        backward = self._next(self._backwards, backward_chunk)
        self.actions.append(Action(Kind.FB, forward_chunk, forward, backward_chunk, backward))


def one_f_one_b(num_ranks: int, rank: int, num_microbatches: int, split: bool) -> list[Action]:
    """1F1B, or with `split` ZB-H1: the same order, each W `rank` backwards behind its I.

    Source: arXiv:2104.04473 (1F1B); arXiv:2401.10241, section 2 (ZB-H1).
    """
    write = _Writer([0])
    num_warmup = min(num_ranks - rank - 1, num_microbatches)
    write.forward(*[0] * num_warmup)
    for index in range(num_microbatches):
        if index < num_microbatches - num_warmup:
            write.forward(0)
        write.backward(0, split)
        if index >= rank:
            write.weights()
    write.all_weights()
    return write.actions


def interleaved(
    num_ranks: int, rank: int, num_microbatches: int, num_chunks: int, overlap: bool
) -> list[Action]:
    """Interleaved 1F1B; with `overlap` every steady step is a pair.

    A pair needs a forward that does not feed its backward, hence one more forward before the first.

    Source: arXiv:2104.04473, section 2.2; Megatron-LM's combined 1F1B.
    """
    rounds = [
        (chunk, first + index)
        for first in range(0, num_microbatches, num_ranks)
        for chunk in range(num_chunks)
        for index in range(num_ranks)
    ]
    forwards = rounds
    backwards = [(num_chunks - 1 - chunk, microbatch) for chunk, microbatch in rounds]
    num_warmup = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks + overlap
    num_warmup = min(num_warmup, len(rounds))
    actions = [Action(Kind.F, *forward) for forward in forwards[:num_warmup]]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        if overlap:
            actions.append(Action(Kind.FB, *forward, *backward))
        else:
            actions += [Action(Kind.F, *forward), Action(Kind.B, *backward)]
    rest = backwards[len(rounds) - num_warmup :]
    return actions + [Action(Kind.B, *backward) for backward in rest]


def zero_bubble_v(num_ranks: int, rank: int, num_microbatches: int) -> list[Action]:
    """ZB-V in its form for equal F, I and W.

    Written for at least 2 P - 1 micro-batches; of fewer, the steps of those that are not there
    are left out.

    Source: arXiv:2401.10241, section 6.
    """
    write = _Writer([0, 0])
    enough = max(num_microbatches, 2 * num_ranks - 1)
    write.forward(*[0] * (2 * (num_ranks - rank) - 1))
    write.forward(*[1, 0] * rank)
    for _ in range(num_ranks - rank):
        write.forward(1)
        write.backward(1, split=True)
        write.weights()
    while write.forwards[1] < enough:
        if write.forwards[0] < enough:
            write.forward(0)
        write.backward(0, split=True)
        write.weights()
        write.forward(1)
        write.backward(1, split=True)
        write.weights()
    for _ in range(rank):
        write.backward(0, split=True)
        write.backward(1, split=True)
    for _ in range(num_ranks - rank):
        write.backward(0, split=True)
        write.weights(0)
    write.all_weights(1)
    write.all_weights()
    return [action for action in write.actions if action.microbatch < num_microbatches]


def dual_pipe(
    half: int, position: int, num_microbatches: int, first_microbatches: Sequence[int], near: int
) -> list[Action]:
    """DualPipe's eight steps, for both of its forms.

    Seen from one rank the two forms are one: micro-batches pass its two chunks as they would a V
    of `2 * half` stages, of which the rank is `position` away from the open end.

    Args:
        half: P for DualPipeV, P / 2 for the bidirectional form.
        position: distance to the nearer end of the pipeline (the open end of the V).
        num_microbatches: that pass each chunk, at least `2 * half`.
        first_microbatches: `[chunk]`.
        near: the chunk whose micro-batches reach this rank first.

    Source: arXiv:2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe (both forms); "cut in
    half", huggingface.co/blog/ufotalent (the V).
    """
    far, before_turn = 1 - near, half - position - 1
    write = _Writer(first_microbatches)
    write.forward(*[near] * 2 * before_turn)  # 1
    write.forward(*[near, far] * (position + 1))  # 2
    for _ in range(before_turn):  # 3
        write.backward(far, split=True)
        write.weights()
        write.forward(far)
    for index in range(num_microbatches - 2 * half + position + 1):  # 4
        if index == 0 and before_turn == 0:
            # The rank at the turn does not overlap its first two: its backward is waited for.
            write.forward(near)
            write.backward(far)
        else:
            write.pair(near, far)
        write.pair(far, near)
    for _ in range(before_turn):  # 5
        write.backward(far)
        write.pair(far, near)
    # 6: in the second half the Ws are kept for later, from the middle of the order on.
    split_from = 2 * ((position + 1) // 2) + (position % 2 == 0)
    for index in range(2 * (position + 1)):
        write.backward((far, near)[index % 2], split=index >= split_from)
    for _ in range(before_turn):  # 7
        write.weights()
        write.backward(near, split=True)
    write.all_weights()  # 8
    return write.actions
