"""The codes of refusals: each that the code uses is explained, in the table and on the page of the documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from surgeon.sites.rejection import CODES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
# Calls that make a refusal, and where its code stands among their arguments.
MAKERS = {"Rejection": 0, "SiteRefused": 0, "NotElementwise": 0, "_Unfit": 0, "_refuse": 0, "_reject": 2}


def used() -> Iterator[str]:
    for folder in ("surgeon/sites", "passes", "surgeon/exits", "surgeon/grafting"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in MAKERS and len(node.args) > MAKERS[name]:
                    code = node.args[MAKERS[name]]
                    if isinstance(code, ast.Constant):
                        yield str(code.value)


def test_every_code_that_is_used_is_explained_and_no_other() -> None:
    assert set(used()) == set(CODES)


def test_the_page_has_all_codes_with_what_to_do() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert {code: advice for code, _, advice in rows} == CODES
    assert len(rows) == len(CODES)
