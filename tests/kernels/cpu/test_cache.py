"""What is loaded beside the built library: measurements, and a library that the system refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgeon.kernels.cpu import crossover

DAMAGED = [
    "[",
    "[1]",
    "null",
    "[" * 100_000,
    *(
        json.dumps({"here": value})
        for value in (
            None,
            3,
            "abc",
            [],
            {},
            [3],
            [[False, 8, 8]],
            [[False, 8, 8, 0.5, 1]],
            [[False, 8, 8, "0.5"]],
            [[False, 8, 8, float("nan")]],
            [[False, 8, 8, float("inf")]],
            [[False, 8, 8, -0.5]],
            [[False, 8, 9, 0.5]],
            [[False, 2**70, 8, 0.5]],
            [[0, 8, 8, 0.5]],
            [[False, 8, 8, 0.5], None],
        )
    ),
]


def test_a_damaged_measurement_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, ...]] = []

    def measure() -> Iterator[tuple[bool, int, int, float]]:
        yield False, 8, 8, 0.75

    monkeypatch.setattr(crossover, "measure", measure)
    monkeypatch.setattr(crossover, "_measured_on", lambda: "here")
    monkeypatch.setattr(crossover, "_give", lambda *values: given.append(values))
    for text in DAMAGED:
        (tmp_path / "crossover.json").write_text(text)
        crossover.load(tmp_path)
        assert given.pop() == (False, 8, 8, 0.75), text
        assert json.loads((tmp_path / "crossover.json").read_text())["here"] == [[False, 8, 8, 0.75]]
    (tmp_path / "crossover.json").write_text(json.dumps({"here": [[False, 8, 8, 0.25]]}))
    crossover.load(tmp_path)
    assert given == [(False, 8, 8, 0.25)]


UNLOADABLE = """
import torch
from pathlib import Path
from surgeon.kernels import cpu
from surgeon.kernels.dynamic_k import dynamic_k_ffn
Path("no_library.so").write_text("text")
cpu.library = lambda: Path("no_library.so").resolve()
x, scores, w = torch.ones(3, 8), torch.ones(3, 2), torch.ones(2, 4, 8)
for _ in range(2):
    print(float(dynamic_k_ffn(x, scores, torch.zeros(3), w, None, None, None, w, None, "relu").sum()))
"""


def test_a_library_that_the_system_refuses_is_told_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNLOADABLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.stdout.split() == ["1536.0", "1536.0"]
    assert done.stderr.count("no_library.so cannot be loaded") == 1
