"""Which low-latency calls of a rank are under way, and what may come next.

Kernels count calls by themselves, so that a CUDA graph can make them again and again; the host only
chooses where a call's number is kept until its receiving half is launched. Calls that are captured
are made by replays alone: they are another sequence than those the host makes.
"""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ep_megatron.backends.packed import too_many_pending

_AT_ONCE = 2  # calls of one sequence that may lack their receiving half


@dataclass(frozen=True)
class Turn:
    """One call of this rank.

    Attributes:
        number: as the host counts, for its messages; graphs make others that it does not know of.
        index: where kernels keep theirs; see `PackedState::calls`.
        graph: what it is captured into; 0 for a call that is made now.
    """

    number: int
    index: int
    graph: int


@dataclass
class _Sequence:
    """Calls that come one after the other on the device."""

    num_calls: int = 0
    last: deque[int] = field(default_factory=lambda: deque(maxlen=_AT_ONCE))


class CallOrder:
    """The calls of one rank.

    Args:
        graph_id: see `Device.graph_id`.
    """

    def __init__(self, graph_id: Callable[[], int]) -> None:
        self._graph_id = graph_id
        self._num_calls = 0
        self._made, self._captured = _Sequence(), _Sequence()
        self._graph = 0  # whose calls `_captured` are
        self._under_way: dict[int, tuple[Turn, object]] = {}

    @property
    def under_way(self) -> Collection[int]:
        """The calls that lack their receiving half, by number."""
        return self._under_way.keys()

    def begin(self, name: str) -> Turn:
        """Return the next call.

        Raises:
            ValueError: if the call before last lacks its receiving half.
            RuntimeError: if a graph was captured with a sending half alone; once.
        """
        graph = self._graph_id()
        lost = [n for n, (turn, _) in self._under_way.items() if turn.graph not in (0, graph)]
        for number in lost:
            del self._under_way[number]
        if lost:
            raise RuntimeError(
                f"{name}: expected both halves of a low-latency call in a CUDA graph, got a "
                "captured call whose hook was not; never replay that graph, capture the hook too"
            )
        if graph not in (0, self._graph):
            self._captured, self._graph = _Sequence(), graph
        sequence = self._captured if graph else self._made
        if len(sequence.last) == _AT_ONCE and sequence.last[0] in self._under_way:
            raise too_many_pending(name)
        self._num_calls += 1
        sequence.num_calls += 1
        sequence.last.append(self._num_calls)
        index = _AT_ONCE * bool(graph) + sequence.num_calls % _AT_ONCE
        return Turn(self._num_calls, index, graph)

    def keep(self, turn: Turn, inputs: object) -> None:
        """Note that a sending half was launched; its inputs live until the receiving half is."""
        self._under_way[turn.number] = turn, inputs

    def receive(self, name: str, number: int) -> Turn:
        """Return the call whose receiving half is launched now.

        Raises:
            RuntimeError: if one half goes into a graph, and the other does not.
        """
        turn, _ = self._under_way[number]
        if turn.graph != self._graph_id():
            raise RuntimeError(
                f"{name}: expected both halves of a low-latency call in one CUDA graph or in none, "
                "got a hook that runs elsewhere than its call; call it where the call was made"
            )
        del self._under_way[number]
        return turn
