"""data/table.py: the tables that --explain prints."""

import re
import sys

import pytest

from data.table import Column, print_columns

COLUMNS = [Column("token", ["·fox", "x" * 120, ""]),
           Column("r̂", [0.5, -2.0, None], ".3f", signed=True), Column("V", [1.0, 2.0, 3.0], ".3f")]


def test_no_row_is_wider_than_the_screen(capsys):
    """A long text pushed the numbers off the screen; the hat of r̂, a character without a column,
    shifted them."""
    print_columns(COLUMNS, ["a legend"])
    head, *rows, legend = capsys.readouterr().out.splitlines()
    assert head.replace("\u0302", "").index("V") == rows[0].index("1.000") + len("1.000") - 1
    assert len(rows[1]) == 100 and "x…" in rows[1] and rows[1].endswith("-2.000  2.000")
    assert rows[2].split() == ["3.000"] and legend == "a legend"


@pytest.mark.parametrize("terminal, no_color", [(True, ""), (True, "1"), (False, "")])
def test_shades_are_for_terminals_only(monkeypatch, capsys, terminal, no_color):
    """Escapes in a file; NO_COLOR ignored; a cell shaded by another one's size, or no sign."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    print_columns(COLUMNS)
    shades = re.findall(r"\033\[30;48;5;(\d+)m *(-?\d\.\d+)\033", capsys.readouterr().out)
    shaded = terminal and not no_color
    assert shades == ([("194", "0.500"), ("210", "-2.000")] if shaded else [])  # faint green, red
