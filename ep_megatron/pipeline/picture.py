"""Timelines as SVG, in the colours of DeepSeek's figures."""

import math
from collections.abc import Sequence
from html import escape

from ep_megatron.pipeline.cells import Cell, Half, cells_of, communication_of
from ep_megatron.pipeline.measures import length
from ep_megatron.pipeline.trace import Timeline

COLOURS = {"F": "#f5a742", "B": "#6cc24a", "I": "#a5dc8c", "W": "#7fb3e6"}
"""Forward orange, full backward green; of the halves, inputs light green and weights blue."""
DARK = {"F": "#c9741a", "B": "#37822a", "I": "#5aa845", "W": "#3c74b4"}
"""The same of chunks that hold later stages or run the other way."""
HIDDEN, EXPOSED = "#aab4c0", "#d62839"
MEANINGS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
}

_LABEL, _ROW, _STRIP, _GAP, _TOP = 62, 26, 6, 6, 44
_STYLE = (
    "text{font-family:DejaVu Sans,Verdana,sans-serif;font-size:11px;fill:#1c2430}"
    ".h{font-size:13px;font-weight:bold}.n{text-anchor:middle}.s{font-size:9px}.w{fill:#fff}"
    ".g{stroke:#e3e7ec}.c{stroke:#fff;stroke-width:.6}.p{fill:none;stroke:#1c2430}"
)


def to_svg(timeline: Timeline, width: float = 1200.0, duration: float | None = None) -> str:
    """Return a picture of a timeline: a row per rank, a cell per action.

    A pair's cell has its forward above its backward. Below the cells a strip shows when exchanges
    run: grey behind compute, red where the rank waits for them.

    Args:
        timeline: simulated or measured.
        width: pixels of the time axis.
        duration: microseconds of the time axis, to draw several on one; the timeline's without.
    """
    start = timeline.start
    whole = duration or (timeline.end - start) or 1.0
    scale = width / whole
    has_strip = any(span.lane == "comm" for span in timeline.spans)
    row = _ROW + (_STRIP if has_strip else 0) + _GAP
    height = _TOP + timeline.num_ranks * row + 26
    legend, legend_end = _legend(timeline, has_strip)
    total = max(_LABEL + width + 14, legend_end)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{height}" '
        f'viewBox="0 0 {total:.0f} {height}" role="img">',
        f"<title>{escape(timeline.title)}</title><style>{_STYLE}</style>",
        f'<rect width="{total:.0f}" height="{height}" fill="#fff"/>',
        f'<text class="h" x="4" y="15">{escape(timeline.title)}</text>',
        *legend,
        *_axis(whole, scale, _TOP + timeline.num_ranks * row),
    ]
    for rank in range(timeline.num_ranks):
        top = _TOP + rank * row
        parts.append(f'<text x="4" y="{top + 17}">rank {rank}</text>')
        for cell in cells_of(timeline, rank):
            parts += _cell(cell, _LABEL + (cell.start - start) * scale, top, scale)
        if has_strip:
            hidden, exposed = communication_of(timeline, rank)
            parts += _strip(hidden, HIDDEN, "communication behind compute", start, top, scale)
            parts += _strip(exposed, EXPOSED, "exposed communication", start, top, scale)
    return "\n".join([*parts, "</svg>", ""])


def comfortable_width(timelines: Sequence[Timeline]) -> float:
    """Return a width in which most cells have room for their number: 1000 to 6000 pixels."""
    widths = []
    for timeline in timelines:
        cells = cells_of(timeline, 0)
        if cells:
            lengths = sorted(cell.end - cell.start for cell in cells)
            widths.append(13.0 * (timeline.end - timeline.start) / max(lengths[len(cells) // 4], 1))
    return min(6000.0, max(1000.0, *widths, 0.0))


def format_time(microseconds: float) -> str:
    """Return a time with a unit that suits it."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.4g} {unit}"
    return f"{microseconds:.3g} us"


def _cell(cell: Cell, x: float, y: float, scale: float) -> list[str]:
    wide = (cell.end - cell.start) * scale
    what = f"{cell}, {format_time(cell.end - cell.start)}"
    if cell.busy < 0.995 * (cell.end - cell.start):
        what += f" of which {format_time(cell.busy)} compute"
    parts = [f"<g><title>{escape(what)}</title>"]
    high = _ROW / len(cell.halves)
    for index, half in enumerate(cell.halves):
        top = y + index * high
        parts.append(
            f'<rect class="c" x="{x:.2f}" y="{top:.1f}" width="{wide:.2f}" height="{high:.1f}" '
            f'fill="{_colour(half)}"/>'
        )
        text = str(half.microbatch)
        small = len(cell.halves) > 1
        if wide >= (5.0 if small else 6.2) * len(text) + 2:
            classes = "n" + (" s" if small else "") + (" w" if half.chunk % 2 else "")
            parts.append(
                f'<text class="{classes}" x="{x + wide / 2:.2f}" '
                f'y="{top + high / 2 + (3.5 if small else 4):.1f}">{text}</text>'
            )
    if len(cell.halves) > 1:
        parts.append(
            f'<rect class="p" x="{x:.2f}" y="{y:.1f}" width="{wide:.2f}" height="{_ROW}"/>'
        )
    return [*parts, "</g>"]


def _strip(
    intervals: list[tuple[float, float]],
    colour: str,
    word: str,
    start: float,
    top: float,
    scale: float,
) -> list[str]:
    """Return one path for all intervals: a rank has thousands."""
    if not intervals:
        return []
    steps = "".join(
        f"M{(begin - start) * scale:.2f} 0h{(end - begin) * scale:.2f}v{_STRIP}"
        f"h-{(end - begin) * scale:.2f}z"
        for begin, end in intervals
    )
    return [
        f'<g transform="translate({_LABEL} {top + _ROW + 1})"><path class="t" fill="{colour}" '
        f'd="{steps}"><title>{word}, {format_time(length(intervals))} in all</title></path></g>'
    ]


def _colour(half: Half) -> str:
    return (DARK if half.chunk % 2 else COLOURS)[half.kind]


def _legend(timeline: Timeline, has_strip: bool) -> tuple[list[str], float]:
    """Return the legend and where it ends."""
    kinds = set()
    chunks = set()
    most = 0
    has_pair = False
    for rank in range(timeline.num_ranks):
        for cell in cells_of(timeline, rank):
            kinds |= {half.kind for half in cell.halves}
            chunks |= {half.chunk % 2 for half in cell.halves}
            most = max(most, *(half.chunk for half in cell.halves))
            has_pair |= len(cell.halves) > 1
    parts, x = [], _LABEL
    entries: list[tuple[str, str | None, str]] = [
        (COLOURS[kind], DARK[kind], word) for kind, word in MEANINGS.items() if kind in kinds
    ]
    if has_strip:
        entries += [(HIDDEN, None, "communication, hidden"), (EXPOSED, None, "exposed")]
    for colour, dark, word in entries:
        for index, fill in enumerate([colour, dark] if dark and 1 in chunks else [colour]):
            parts.append(
                f'<rect x="{x + 10 * index}" y="22" width="10" height="10" fill="{fill}"/>'
            )
        x += 24 if dark and 1 in chunks else 14
        parts.append(f'<text x="{x}" y="31">{word}</text>')
        x += round(6.4 * len(word)) + 16
    if has_pair:
        parts.append(
            f'<rect class="p" x="{x}" y="22" width="10" height="10"/>'
            f'<text x="{x + 14}" y="31">a pair, overlapped</text>'
        )
        x += 132
    if 1 in chunks:
        names = ("chunk 0", "chunk 1") if most < 2 else ("even chunks", "odd chunks")
        word = f"(light: {names[0]}, dark: {names[1]})"
        parts.append(f'<text x="{x}" y="31">{word}</text>')
        x += 7 * len(word)
    return parts, x


def _axis(whole: float, scale: float, y: float) -> list[str]:
    """Return ticks at round times, about one per 90 pixels."""
    rough = 90 / scale
    unit = 10 ** math.floor(math.log10(rough))
    tick = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    parts = []
    for index in range(math.floor(whole / tick + 1e-9) + 1):
        x, words = _LABEL + index * tick * scale, format_time(index * tick)
        parts.append(
            f'<line class="g" x1="{x:.2f}" x2="{x:.2f}" y1="{_TOP - 4}" y2="{y}"/>'
            f'<text class="n s" x="{x:.2f}" y="{y + 14}">{words if index else 0}</text>'
        )
    return parts
