"""A pass of another package: the one of docs/passes.md, as a user would write, test and offer it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A directory with the files of the page, which offers the pass and one that cannot be imported."""
    for name, text in re.findall(r"```python file=(\S+)\n(.*?)```", PAGE, flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    info = tmp_path / "clip_hidden-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clip-hidden\nVersion: 1.0\n")
    (points,) = re.findall(r"```toml\n\[project\.entry-points\.\"surgeon\.passes\"\]\n(.*?)```", PAGE, flags=re.DOTALL)
    broken = 'missing = "no_such_module:Nothing"\nnumber = "math:pi"\nlower = "clip_hidden:Lower"\n'
    (info / "entry_points.txt").write_text(
        f"[surgeon.passes]\n{points.replace(chr(34), '')}{broken.replace(chr(34), '')}"
    )
    with (tmp_path / "clip_hidden.py").open("a", encoding="utf-8") as file:
        file.write("\n\nclass Lower(ClipHidden):\n    name = 'lower'\n")
    return tmp_path


def run(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=package, env=environment, check=False
    )


def test_the_page_is_whole_and_the_pass_is_short(package: Path) -> None:
    code = re.findall(r"```python file=clip_hidden.py\n(.*?)```", PAGE, flags=re.DOTALL)[0]
    assert len(code.splitlines()) < 40
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    done = run(package, "-c", example)
    assert done.returncode == 0, done.stderr
    assert "hidden values within ±0.5" in done.stdout


def test_it_passes_the_conformance_suite(package: Path) -> None:
    done = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_clip_hidden.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d passed", done.stdout)


def test_the_command_line_knows_it(package: Path) -> None:
    shown = json.loads(run(package, "-m", "surgeon", "passes", "clip-hidden", "--example", "--output", "json").stdout)
    assert shown["options"][0]["name"] == "limit"
    assert shown["options"][0]["type"] == "number above 0"
    assert shown["example"]["report"]["matched"]
    known = json.loads(run(package, "-m", "surgeon", "passes", "--output", "json").stdout)
    assert "clip-hidden" in [one["name"] for one in known["passes"]]
    assert known["broken"] == {
        "missing": "no_such_module:Nothing cannot be imported (ModuleNotFoundError: No module named 'no_such_module')",
        "number": "math:pi is not a pass: it has no name, or a method is missing",
        "lower": "there is another pass called lower",
    }
    listed = run(package, "-m", "surgeon", "passes").stdout
    assert "The pass 'number' cannot be used: math:pi is not a pass" in " ".join(listed.split())
    wrong = run(package, "-m", "surgeon", "explain", "x", "--passes", "missing")
    assert wrong.returncode == 2
    assert "of another package cannot be used: no_such_module:Nothing cannot be imported" in wrong.stderr
