"""Tables at any width: words stay whole, and nothing is lost."""

from __future__ import annotations

import pytest
from rich.table import Table
from rich.text import Text

from surgeon.text.layout import grid, indented
from surgeon.text.plain import plain_text

PATH = "encoder.layer.0.attention.output.dense"


def table() -> Table:
    made = grid("left", "left", "right", header=("site", "was → is", "ran"))
    made.add_row(PATH, "FFN 64→256→64 gelu → 8 experts × 32, router 8", "97%")
    made.add_row(Text("head", style="cyan"), "", "")
    return made


@pytest.mark.parametrize("width", range(len(PATH), 120))
def test_words_stay_whole_and_lines_fit(width: int) -> None:
    text = plain_text(table(), width)
    assert set(plain_text(table()).split()) <= {*text.split(), "site"}  # what every row begins with needs no name
    assert max(map(len, text.splitlines())) <= width


def test_a_wide_table_has_a_line_for_each_row() -> None:
    lines = plain_text(table()).splitlines()
    assert lines[0].split() == ["site", "was", "→", "is", "ran"]
    assert lines[1].startswith(f"{PATH}  FFN 64→256→64 gelu → 8 experts × 32, router 8  97%")
    assert lines[2] == "head"


def test_columns_share_the_room_by_their_words() -> None:
    lines = plain_text(table(), 66).splitlines()
    assert lines[1] == f"{PATH}  FFN 64→256→64 gelu →   97%"
    assert [line.strip() for line in lines[2:4]] == ["8 experts × 32,", "router 8"]


def test_a_narrow_table_has_a_paragraph_for_each_row() -> None:
    assert plain_text(table(), 46).splitlines() == [
        PATH,
        "    was → is FFN 64→256→64 gelu → 8 experts ×",
        "    32, router 8  ran 97%",
        "head",
    ]
    assert plain_text(indented(table(), 2), 48).splitlines()[0] == f"  {PATH}"


def test_parts_of_a_paragraph_stay_together_where_they_fit() -> None:
    made = grid("left", "left", "left", header=("", "before", "after"))
    made.add_row("a" * 20, "33.1 k", "33.7 k multiply-adds-per-token")
    assert plain_text(made, 40).splitlines() == [
        "a" * 20 + "  before 33.1 k",
        "    after 33.7 k multiply-adds-per-token",
    ]


def test_a_number_that_a_row_begins_with_has_its_name_and_headers_are_one_line() -> None:
    made = grid("left", "right", "right", header=("tau", "com-\npiled", "of\nlimit"))
    made.add_row("0.1", "2-milliseconds", "5%-of-memory")
    made.add_row("dense", "1-milliseconds", "7%-of-memory")
    assert plain_text(made, 32).splitlines() == [
        "tau 0.1  compiled 2-milliseconds",
        "    of limit 5%-of-memory",
        "dense  compiled 1-milliseconds",
        "    of limit 7%-of-memory",
    ]


def test_a_word_longer_than_a_line_is_all_there() -> None:
    assert "".join(plain_text(table(), 20).split()).startswith(PATH)
