"""The first frame of a command: on the screen before anything slow is imported."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from surgeon.__main__ import _begun

BEGIN = """
import sys
sys.stdout.isatty = sys.stderr.isatty = lambda: True
from surgeon.__main__ import _begun
_begun(["inspect", "bert"]).close()
slow = "torch", "typer", "wrapt", "transformers", "pydantic"
print(*(name for name in slow if name in sys.modules))
"""
SURROUNDINGS = {**os.environ, "TERM": "xterm-256color"}
SURROUNDINGS.pop("NO_COLOR", None)


def test_the_first_frame_waits_for_no_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN], capture_output=True, text=True, check=False, env=SURROUNDINGS
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loading PyTorch" in done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "words",
    [
        (), ("--help",), ("nosuch",), ("inspect", "x", "--quiet"), ("inspect", "x", "-h"), ("inspect", "x", "-vq"),
        ("inspect", "x", "--output", "json"), ("inspect", "x", "--output=plain"), ("../cli/inspect",),
    ],
)  # fmt: skip
def test_another_screen_is_not_begun_with(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert _begun(list(words)) is None


def test_pipes_have_no_frame() -> None:
    assert _begun(["inspect", "x"]) is None


@pytest.mark.parametrize(("words", "code", "shown"), [(("diff", "bert-moe"), 0, "moeify"), (("diff",), 2, "error: ")])
def test_on_a_terminal_frames_come_first_and_are_gone_at_the_end(
    shelf: Path, words: tuple[str, ...], code: int, shown: str
) -> None:
    reading, writing = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-m", "surgeon", *words], stdout=writing, stderr=writing, cwd=shelf, env=SURROUNDINGS
    )
    os.close(writing)
    found = b""
    try:
        while chunk := os.read(reading, 65536):
            found += chunk
    except OSError:  # the other side was closed
        pass
    os.close(reading)
    assert started.wait() == code
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.decode())
    assert re.match(r"\s*[\u2800-\u28ff] loading PyTorch", text)
    assert "loading PyTorch" not in text[text.index(shown) :]
    assert found.count(b"\x1b[?25l") == found.count(b"\x1b[?25h") > 0  # the cursor is there again
