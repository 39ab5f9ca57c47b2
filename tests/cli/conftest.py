"""The shelf that all command-line tests share, and a place of its own for each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import NET, Run, run_surgeon
from .shelf import NETS, write_bert


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with models, data and saved surgeries that no test changes."""
    place = tmp_path_factory.mktemp("shelf")
    (place / "nets.py").write_text(NETS)
    write_bert(place)
    sys.path.insert(0, str(place))
    try:
        with contextlib.chdir(place):
            assert run_surgeon("apply", "--passes", "moeify", *NET, "-o", "masked").code == 0
            passes = "swap-activation,sparsify,moeify,lower"
            result = run_surgeon("apply", "--passes", passes, "--set", "moeify.experts=4", "bert", "-o", "bert-moe")
        assert result.code == 0, result.err
        (place / "apply.txt").write_text(result.out)
        yield place
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("nets", None)


@pytest.fixture
def run(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty directory from which the shelf's models can be reached."""
    monkeypatch.chdir(tmp_path)
    for name in ("bert", "bert-moe", "masked", "reviews.csv"):
        (tmp_path / name).symlink_to(shelf / name)
    return run_surgeon


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the real one takes longer than everything else here."""
    monkeypatch.setattr("surgeon.bench.timing.cache_size", lambda: 1024)
    monkeypatch.setattr("surgeon.bench.machine.cache_size", lambda: 1024)
    monkeypatch.setattr("surgeon.bench.machine._SIDE", {"cpu": 32})
    monkeypatch.setattr("surgeon.bench.machine._BUFFER", {"cpu": 1 << 16})
