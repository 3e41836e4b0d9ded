"""Tables of one example, for --explain: a row a token, a column a quantity of the slides.

Plain text on a pipe; on a terminal the cells of signed quantities are shaded by their size.
"""

import os
import sys
import unicodedata
from typing import NamedTuple

WIDTH = 100  # columns of the screen
GREEN = (194, 157, 114)  # numbers of ANSI's 256 colours, from small to large values above 0
RED = (224, 217, 210)  # below 0


class Column(NamedTuple):
    """One quantity. None among its values is an empty cell."""
    name: str
    values: list
    form: str = "s"         # as for format(); "s" is text, which stands on the left
    signed: bool = False    # shaded on a terminal, by size against the column's largest


def print_columns(columns, legend=()):
    """Print columns of equal length side by side, at most 100 wide, and the legend's lines under
    them. Texts that have no room are cut, and end in "…"."""
    cells = []
    for column in columns:
        texts = ["" if value is None else format(value, column.form) for value in column.values]
        cells.append([column.name, *texts])
    widths = [max(columns_of(text) for text in texts) for texts in cells]
    widest = max(range(len(columns)), key=lambda i: (columns[i].form == "s", widths[i]))
    room = WIDTH - sum(widths) - 2 * (len(widths) - 1)
    widths[widest] = max(1, widths[widest] + min(room, 0))

    shaded = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for row in range(len(cells[0])):
        line = []
        for column, texts, width in zip(columns, cells, widths):
            text = texts[row]
            if columns_of(text) > width:
                text = text[:width - 1] + "…"
            blanks = " " * (width - columns_of(text))
            text = text + blanks if column.form == "s" else blanks + text
            if shaded and column.signed and row > 0:
                text = shade(text, column.values[row - 1], column.values)
            line.append(text)
        print("  ".join(line).rstrip())
    for line in legend:
        print(line)


def columns_of(text):
    """How many columns of the screen a text takes: the hat of r̂ is a character, but has none."""
    return sum(not unicodedata.combining(character) for character in text)


def shade(text, value, values):
    """The text on a coloured ground: green for a value above 0, red below, stronger for larger
    ones."""
    largest = max((abs(x) for x in values if x is not None), default=0)
    if not value or largest == 0:
        return text
    colours = GREEN if value > 0 else RED
    strength = min(int(len(colours) * abs(value) / largest), len(colours) - 1)
    return f"\033[30;48;5;{colours[strength]}m{text}\033[0m"
