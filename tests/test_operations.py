"""docs/operations.md promises what tests show: every fault in its table names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_table_of_faults_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    (first, *_) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)  # of the page's tables
    rows = [line for line in first.splitlines() if line.startswith("| ")]
    header, rows = rows[0], rows[1:]
    assert header.split("|")[1].strip() == "fault"
    assert len(rows) > 10
    known = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert names, row
        assert set(names) <= known, set(names) - known
