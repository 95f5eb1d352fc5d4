"""Pictures and the page: what they show is what was simulated, in a browser where there is one."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from ep_megatron.cli import app
from ep_megatron.pipeline.cells import cells_of
from ep_megatron.pipeline.page import Entry, to_html
from ep_megatron.pipeline.picture import COLOURS, DARK, to_svg
from ep_megatron.pipeline.plan import Case, run_case
from ep_megatron.pipeline.profile import load_profile
from ep_megatron.pipeline.program import Options
from ep_megatron.pipeline.schedule import SCHEDULES, make_schedule
from ep_megatron.pipeline.trace import Timeline, read_trace

SVG = "{http://www.w3.org/2000/svg}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def simulated(name: str, profile: str = "unit", ranks: int = 2) -> Timeline:
    simulation = run_case(Case(name, ranks, 4 * ranks), load_profile(profile), Options()).simulation
    assert simulation is not None
    return simulation.timeline


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("profile", ["unit", "deepseek-v3-h800"])
def test_cells_are_the_schedules_actions(name: str, profile: str) -> None:
    timeline = simulated(name, profile)
    schedule = make_schedule(name, 2, 8)
    for rank in range(2):
        cells = cells_of(timeline, rank)
        shown = [
            "&".join(f"{h.kind}{h.chunk}.{h.microbatch}" for h in cell.halves) for cell in cells
        ]
        assert shown == [str(action) for action in schedule.actions[rank]]


def rectangles(svg: str) -> Iterator[tuple[str, float, float]]:
    """Yield colour, left and width of every cell's rectangle."""
    for node in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if node.get("class") == "c":
            fill, x, width = (node.get(key) or "" for key in ("fill", "x", "width"))
            yield fill, float(x), float(width)


def test_a_picture_has_every_action_where_and_as_long_as_it_ran() -> None:
    timeline = simulated("dualpipev", ranks=4)
    found = sorted(rectangles(to_svg(timeline, width=1000)))
    scale = 1000 / timeline.end
    expected = sorted(
        ((DARK if h.chunk else COLOURS)[h.kind], 62 + c.start * scale, (c.end - c.start) * scale)
        for rank in range(4)
        for c in cells_of(timeline, rank)
        for h in c.halves
    )
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        assert one[1:] == pytest.approx(other[1:], abs=0.01)


def test_exposed_communication_is_red() -> None:
    assert "exposed communication" not in to_svg(simulated("1f1b"))
    svg = to_svg(simulated("1f1b", "deepseek-v3-h800"))
    assert svg.count("<title>exposed communication,") == 2
    assert svg.count("<title>communication behind compute,") == 2


def test_titles_are_escaped() -> None:
    timeline = replace(simulated("1f1b"), title="<script>alert(1)</script> & more")
    page = to_html("a < b", [Entry(timeline, (("x<y", "<b>"),))])
    assert page.count("<script>") == 1
    assert "alert(1)&lt;/script&gt; &amp; more" in page
    ElementTree.fromstring(to_svg(timeline))


class _Page(HTMLParser):
    """Collects open elements and refuses crossed ones and anything loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    timelines = [simulated(name) for name in ("dualpipev", "1f1b")]
    page = to_html("Two", [Entry(t, (("peak", "9"),)) for t in timelines])
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.counts["svg"] == 2
    assert "@import" not in page
    assert "url(" not in page
    with pytest.raises(ValueError, match="at least one timeline, got none"):
        to_html("none", [])


def test_timelines_of_a_page_share_their_axis() -> None:
    short, long = simulated("dualpipev"), simulated("1f1b")
    page = to_html("Two", [Entry(short), Entry(long)])
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    widest = [max(x + width for _, x, width in rectangles(svg)) - 62 for svg in svgs]
    assert widest[0] / widest[1] == pytest.approx(short.end / long.end, rel=1e-3)


def test_a_browser_shows_and_zooms_the_page(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}; the page is parsed by other tests")
    page = to_html("Two", [Entry(simulated(n)) for n in ("dualpipev", "1f1b")])
    probe = """<script>
    const failures = [];
    addEventListener("error", (event) => failures.push(event.message));
    addEventListener("load", () => {
      const cells = [...document.querySelectorAll("rect.c")];
      const before = cells.map((cell) => cell.getBoundingClientRect());
      slider.value = "1";
      slider.dispatchEvent(new Event("input"));
      const after = cells.map((cell) => cell.getBoundingClientRect());
      const wider = after.every((box, i) => Math.abs(box.width / before[i].width - 2) < 0.05);
      const visible = before.every((box) => box.width > 0 && box.height > 0);
      const first = document.querySelector(".timeline svg").getBoundingClientRect();
      const inside = before[0].left >= first.left && before[0].top >= first.top;
      document.body.dataset.probe = JSON.stringify(
        {cells: cells.length, wider, visible, inside, failures, ...document.body.dataset});
    });
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r'data-probe="([^"]*)"', result.stdout)
    assert found is not None, result.stdout[-2000:]
    probed = json.loads(found[1].replace("&quot;", '"'))
    cells = sum(
        len(cell.halves)
        for name in ("dualpipev", "1f1b")
        for rank in range(2)
        for cell in cells_of(simulated(name), rank)
    )
    assert probed == {
        "cells": cells,
        "wider": True,
        "visible": True,
        "inside": True,
        "failures": [],
        "ready": "yes",
    }


def run_cli(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *words], env={"COLUMNS": "160"})
    return result.exit_code, result.output


def test_the_command_compares_schedules_and_writes_files(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "svg", "trace", "json")}
    words = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    code, output = run_cli(
        "--compare", "--pipeline-parallel", "2,3", "--num-microbatches", "8", *words
    )
    assert code == 0, output
    for name in SCHEDULES:
        assert f"{name} " in output
    assert "left out dualpipe, PP 3, M 8: make_schedule: expected pipeline_parallel" in output
    rows = json.loads(files["json"].read_text())
    done = [row for row in rows if "step_time" in row]
    assert len(rows) == 14
    assert len(done) == 11  # dualpipe, and the interleaved ones, whose M must be a multiple of P
    speeds = [row["tokens_per_second"] for row in done]
    assert speeds == sorted(speeds, reverse=True)
    best = read_trace(files["trace"])
    assert best.end - best.start == pytest.approx(done[0]["step_time"])
    ElementTree.parse(files["svg"])
    assert files["html"].read_text().count("<svg") == 11


def test_the_command_lays_a_measured_run_over_its_simulation(tmp_path: Path) -> None:
    run, page = tmp_path / "run.json", tmp_path / "page.html"
    common = ["--profile", "deepseek-v3-h800", "--pipeline-parallel", "2"]
    code, output = run_cli("--schedule", "zb1p", *common, "--trace", str(run))
    assert code == 0, output
    code, output = run_cli("--from-trace", str(run), "--html", str(page))
    assert code == 0, output
    (step,) = [line for line in output.splitlines() if line.startswith("│ step ")]
    assert step.split("│")[4].strip() == "1.000"
    assert page.read_text().count("<svg") == 2
    other = tmp_path / "other.json"  # the same stages in another order
    code, output = run_cli("--schedule", "1f1b", *common, "--trace", str(other))
    assert code == 0, output
    code, output = run_cli("--from-trace", str(run), "--against", str(other))
    assert code == 0, output
    (step,) = [line for line in output.splitlines() if line.startswith("│ step ")]
    assert step.split("│")[4].strip() == "1.000"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--schedule", "x"], 2, "--schedule: expected one of 1f1b, interleaved"),
        (
            ["--pipeline-parallel", "0"],
            2,
            "--pipeline-parallel: expected positive numbers, got '0'",
        ),
        (["--overlap", "some"], 2, "--overlap: expected one of pairs, weights, none, got 'some'"),
        (
            ["--schedule", "dualpipe", "--pipeline-parallel", "3"],
            1,
            "error: make_schedule: expected",
        ),
        (["--profile", "nowhere"], 1, "error: load_profile: expected profile to be a file or one"),
        (["--expert-parallel", "7"], 1, "error: simulate: expected expert_parallel to be one of"),
        (["--from-trace", "nowhere.json"], 1, "error: "),
        (["--html", "/no/such/place.html"], 1, "error: "),
    ],
)
def test_what_cannot_be_simulated_is_one_line(words: list[str], code: int, message: str) -> None:
    found, output = run_cli(*words)
    assert found == code
    assert message in output.replace("│", "").replace("\n", " ").replace("  ", " ")
    assert "Traceback" not in output
