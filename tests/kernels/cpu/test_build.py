"""How the library of the native kernels is built and found, and what is measured and chosen when it is loaded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from surgeon.kernels import cpu
from surgeon.kernels.cpu import build, crossover

ops = torch.ops.surgeon


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")


CALL = """
import torch
from surgeon.kernels import cpu
from surgeon.kernels.dynamic_k import dynamic_k_ffn
x, scores, w = torch.ones(3, 8), torch.ones(3, 2), torch.ones(2, 4, 8)
print(float(dynamic_k_ffn(x, scores, torch.zeros(3), w, None, None, None, w, None, "relu").sum()))
print(cpu.load().instruction_set)
"""


def call(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CALL],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"SURGEON_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_without_a_compiler_torch_runs_and_says_so(tmp_path: Path) -> None:
    done = call(tmp_path, CXX="no-such-compiler")
    assert done.stdout.split() == ["1536.0"]
    assert (
        "The torch backend runs instead of the native kernels: there is no C++ compiler (no-such-compiler)."
        in done.stderr
    )
    assert done.stderr.count("torch backend") == 1


@pytest.mark.parametrize("command", ["{}", "env {}"], ids=["a program", "several words"])
def test_a_compiler_that_fails_is_told_and_nothing_is_left(tmp_path: Path, command: str) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *" -c "*) echo "layer.h:1: error: this compiler is broken" >&2; exit 1;; esac\n'
    )
    broken.chmod(0o755)
    done = call(tmp_path, CXX=command.format(broken))
    assert done.stdout.split() == ["1536.0"]
    assert f"the compiler {command.format(broken)} failed: layer.h:1: error: this compiler is broken" in done.stderr
    assert not list(tmp_path.rglob("build-*"))
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = call(file)
    assert done.stdout.split() == ["1536.0"]
    assert "Set SURGEON_CACHE to another directory" in done.stderr


def test_they_can_be_switched_off(tmp_path: Path) -> None:
    done = call(tmp_path, SURGEON_CPU="torch")
    assert done.stdout.split() == ["1536.0"]
    assert done.stderr == ""


def test_a_crossover_is_measured_near_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def dense_over_kernels(_: object, share: float) -> float:
        tried.append(share)
        return 0.2 / (0.06 + share)  # they cross at 0.14

    monkeypatch.setattr(crossover, "TOKENS", (2048,))
    monkeypatch.setattr(crossover, "NEURONS", (8, 128))
    monkeypatch.setattr(crossover, "dense_over_ours", dense_over_kernels)
    found = list(crossover.measure())
    assert [(tokens, neurons) for _, tokens, neurons, _ in found] == 2 * [(2048, 8), (2048, 128)]
    assert tried == 2 * [0.5, 46 / 256, 0.5, 3 / 16]
    assert all(0.14 < share < 0.16 for *_, share in found)


def test_crossovers_are_measured_once_for_all_that_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure() -> Iterator[tuple[bool, int, int, float]]:
        measured.append(None)
        yield False, 8, 8, 0.75

    before = ops.cpu_get_crossover(False, 8, 8)
    monkeypatch.setattr(crossover, "measure", measure)
    try:
        for _ in range(2):
            ops.cpu_set_crossover(False, 8, 8, 0.25)
            crossover.load(tmp_path)
            assert ops.cpu_get_crossover(False, 8, 8) == 0.75
        assert len(measured) == 1
        # Where oneDNN may use fewer instructions, dense is slower; and what was known stays known.
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        crossover.load(tmp_path)
        monkeypatch.setenv("SURGEON_CPU", "portable")
        crossover.load(tmp_path)
        assert len(measured) == 3
        monkeypatch.delenv("SURGEON_CPU")
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
        crossover.load(tmp_path)
        assert len(measured) == 3
        (tmp_path / "crossover.json").write_text("[")
        crossover.load(tmp_path)
        assert len(measured) == 4
    finally:
        ops.cpu_set_crossover(False, 8, 8, before)


def test_an_instruction_set_can_be_chosen_and_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache of its own, in which the slow kernels are measured already.
    cache = tmp_path / "cpu" / build.directory().name
    shutil.copytree(build.directory(), cache)
    known = json.loads((cache / "crossover.json").read_text())
    shares = next(iter(known.values()))
    monkeypatch.setenv("SURGEON_CPU", "portable")
    (cache / "crossover.json").write_text(json.dumps({**known, crossover._measured_on(): shares}))
    assert call(tmp_path).stdout.split() == ["1536.0", "portable"]
    done = call(tmp_path, SURGEON_CPU="sse9")
    assert done.returncode != 0
    assert "SURGEON_CPU=sse9: this CPU has" in done.stderr


def test_loaded_before_the_operators_are_there_says_what_to_import() -> None:
    script = "from surgeon.kernels import cpu; cpu.load()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Import surgeon.kernels.dynamic_k before the native kernels are loaded." in done.stderr


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (apt install qemu-user)")
@pytest.mark.parametrize(
    ("processor", "has"), [("Haswell", ["avx2", "portable"]), ("Nehalem", ["portable"])], ids=["AVX2", "SSE"]
)
def test_an_older_processor_meets_no_instruction_it_lacks(processor: str, has: list[str]) -> None:
    script = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.surgeon.cpu_instruction_sets())"
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", processor, sys.executable, "-c", script, str(cpu.load().path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OPENBLAS_CORETYPE": processor},
    )
    assert done.stdout.split() == str(has).split(), done.stderr


def test_a_build_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    """The first build is killed while its compiler runs; the next one finds no lock and clears what it left."""
    slow = tmp_path / "c++"
    slow.write_text('#!/bin/sh\ncase "$*" in *" -c "*) sleep 100;; esac\n')
    slow.chmod(0o755)
    environment = os.environ | {
        "SURGEON_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CXX": str(slow),
    }
    first = subprocess.Popen(
        [sys.executable, "-c", CALL], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("int8/*/build-*")):  # what is compiled first
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert list(tmp_path.rglob("build-*"))
    slow.write_text('#!/bin/sh\ncase "$*" in *" -c "*) echo "error: now it fails" >&2; exit 1;; esac\n')
    done = call(tmp_path, CXX=str(slow))
    assert done.stdout.split() == ["1536.0"]
    assert "error: now it fails" in done.stderr
    assert not list(tmp_path.rglob("build-*"))
