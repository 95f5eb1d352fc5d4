"""One self-contained HTML page: timelines on one time axis, and what they come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ep_megatron.pipeline.measures import measure
from ep_megatron.pipeline.picture import comfortable_width, format_time, to_svg
from ep_megatron.pipeline.trace import Timeline


@dataclass(frozen=True)
class Entry:
    """A timeline of the page, and more columns for its row of the table."""

    timeline: Timeline
    facts: tuple[tuple[str, str], ...] = ()


_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 14px/1.45 DejaVu Sans, Verdana, sans-serif; color: #1c2430; margin: 24px; }}
h1 {{ font-size: 20px; }}
table {{ border-collapse: collapse; margin: 8px 0 16px; }}
th, td {{ padding: 3px 12px; border-bottom: 1px solid #e3e7ec; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.best td {{ font-weight: bold; }}
.timeline {{ overflow-x: auto; border: 1px solid #e3e7ec; margin: 12px 0 4px; }}
.timeline svg {{ display: block; }}
summary {{ cursor: pointer; color: #4a5768; }}
.zoom {{ position: sticky; top: 0; background: #fff; padding: 6px 0; z-index: 1; }}
</style></head><body>
"""

# Zooming keeps heights and letters: positions and widths are stretched, numbers that do not fit
# are hidden. All timelines scroll together, since they share their time axis.
_SCRIPT = """<script>
"use strict";
const LEFT = 62;
const boxes = [...document.querySelectorAll(".timeline")];
const items = [];
const strips = [...document.querySelectorAll(".timeline path.t")];
for (const svg of document.querySelectorAll(".timeline svg")) {
  const full = svg.width.baseVal.value;
  items.push({node: svg, full});
  for (const node of svg.querySelectorAll("g > rect, g > text, .g, .n")) {
    const text = node.tagName === "text";
    const x = parseFloat(node.getAttribute(node.tagName === "line" ? "x1" : "x"));
    items.push({node, x, text, width: parseFloat(node.getAttribute("width") || "0")});
  }
}
function zoom(factor) {
  for (const item of items) {
    if (item.full) {
      const wide = LEFT + (item.full - LEFT) * factor;
      item.node.setAttribute("width", wide);
      item.node.setAttribute("viewBox", `0 0 ${wide} ${item.node.height.baseVal.value}`);
      continue;
    }
    const x = LEFT + (item.x - LEFT) * factor;
    for (const name of item.node.tagName === "line" ? ["x1", "x2"] : ["x"]) {
      item.node.setAttribute(name, x);
    }
    if (item.width) item.node.setAttribute("width", item.width * factor);
    if (item.text && item.node.parentNode.tagName === "g") {
      const room = item.node.previousElementSibling.width.baseVal.value;
      item.node.style.display = room < 6 * item.node.textContent.length + 2 ? "none" : "";
    }
  }
  for (const strip of strips) strip.setAttribute("transform", `scale(${factor} 1)`);
  document.getElementById("factor").textContent = factor.toFixed(2) + "x";
}
const slider = document.getElementById("zoom");
slider.addEventListener("input", () => zoom(2 ** parseFloat(slider.value)));
let leader = null;
for (const box of boxes) {
  box.addEventListener("scroll", () => {
    if (leader && leader !== box) return;
    leader = box;
    for (const other of boxes) other.scrollLeft = box.scrollLeft;
    requestAnimationFrame(() => { leader = null; });
  });
}
document.body.dataset.ready = "yes";
</script></body></html>
"""


def to_html(title: str, entries: Sequence[Entry]) -> str:
    """Return a page with a table and every timeline, the shortest step marked.

    Needs no network and no other file. Times are on one axis, so that a simulated and a measured
    run can be compared by eye.

    Raises:
        ValueError: when there is nothing to show.
    """
    if not entries:
        raise ValueError("to_html: expected entries to be at least one timeline, got none")
    timelines = [entry.timeline for entry in entries]
    duration = max(timeline.end - timeline.start for timeline in timelines)
    width = comfortable_width(timelines)
    parts = [_HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>", *_table(entries)]
    parts.append(
        '<div class="zoom">Zoom <input id="zoom" type="range" min="-3" max="3" step="0.1" '
        'value="0" aria-label="Zoom"> <span id="factor">1.00x</span></div>'
    )
    for timeline in timelines:
        parts.append(f'<div class="timeline">{to_svg(timeline, width, duration)}</div>')
        parts += _ranks(timeline)
    return "\n".join([*parts, _SCRIPT])


def _table(entries: Sequence[Entry]) -> list[str]:
    names = list(dict.fromkeys(name for entry in entries for name, _ in entry.facts))
    columns = ["", "step", "bubble", "exposed communication", *names]
    rows = []
    shortest = min(entry.timeline.end - entry.timeline.start for entry in entries)
    for entry in entries:
        timeline = entry.timeline
        step = timeline.end - timeline.start
        ranks = measure(timeline)
        facts = dict(entry.facts)
        values = [
            timeline.title,
            format_time(step),
            _share(sum(rank.idle for rank in ranks), step * len(ranks)),
            _share(sum(rank.exposed for rank in ranks), step * len(ranks)),
            *(facts.get(name, "") for name in names),
        ]
        mark = ' class="best"' if step == shortest and len(entries) > 1 else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>")
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return [f"<table><thead><tr>{head}</tr></thead><tbody>", *rows, "</tbody></table>"]


def _ranks(timeline: Timeline) -> list[str]:
    rows = [
        f"<tr><td>rank {rank.rank}</td><td>{format_time(rank.compute)}</td>"
        f"<td>{format_time(rank.communication)}</td><td>{format_time(rank.exposed)}</td>"
        f"<td>{format_time(rank.idle)}</td></tr>"
        for rank in measure(timeline)
    ]
    head = "".join(f"<th>{c}</th>" for c in ("", "compute", "communication", "exposed", "idle"))
    return [
        "<details><summary>per rank</summary>",
        f"<table><thead><tr>{head}</tr></thead><tbody>",
        *rows,
        "</tbody></table></details>",
    ]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
