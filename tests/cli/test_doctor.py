"""`surgeon doctor`: what it checks, and what it says about what is broken."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from surgeon.kernels.cpu import State

from .harness import run_surgeon


def test_doctor_checks_from_python_to_a_surgery() -> None:
    result = run_surgeon("-q", "doctor")
    assert result.code == 0, result.out
    names = [
        "surgeon",
        "python",
        "torch",
        "gpu",
        "packages",
        "triton",
        "cpu kernels",
        "disk",
        "temporary files",
        "a tiny surgery",
    ]
    assert all(re.search(rf"^[✓·]  {name} ", result.out, re.MULTILINE) for name in names)
    assert result.out.splitlines()[-2:] == ["Everything works.", "To report a problem, paste this."]


def test_doctor_says_what_to_do_about_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *args: object, **options: object) -> None:
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr("surgeon.jobs.doctor.Pipeline.run", fail)
    monkeypatch.setattr("surgeon.jobs.doctor.shutil.disk_usage", lambda path: SimpleNamespace(free=12_000_000))
    monkeypatch.setattr("surgeon.jobs.doctor._PACKAGES", ("torch", "no-such-package"))
    result = run_surgeon("-q", "doctor")
    assert result.code == 1
    assert re.search(r"^✗  a tiny surgery +RuntimeError: no kernel\n +Reinstall torch", result.out, re.MULTILINE)
    assert re.search(r"^✗  disk +0\.0 GB free", result.out, re.MULTILINE)
    assert re.search(r"^✗  packages +missing: no-such-package\n +pip install no-such-package", result.out, re.MULTILINE)
    assert "3 problem(s) found." in result.out
    states = {one["name"]: one["state"] for one in run_surgeon("-q", "doctor", "--output", "json").json["checks"]}
    assert states["a tiny surgery"] == "failed"


def test_doctor_builds_the_native_kernels_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.jobs.doctor.cpu.built", lambda: False)
    monkeypatch.setattr("surgeon.jobs.doctor.cpu.load", lambda: State(None, "there is no C++ compiler (c++)."))
    monkeypatch.delenv("SURGEON_CPU", raising=False)
    waits = run_surgeon("-q", "doctor").out
    assert re.search(
        r"^·  cpu kernels +not built yet\n +The first call of a lowered model builds them", waits, re.MULTILINE
    )
    built = run_surgeon("-q", "doctor", "--build").out
    assert re.search(
        r"^·  cpu kernels +the torch backend runs instead: there is no C\+\+ compiler", built, re.MULTILINE
    )
