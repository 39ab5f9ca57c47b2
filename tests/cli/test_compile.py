"""`surgeon compile`: the result runs with torch alone, in Python and in C++, and refuses what it does not take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.kernels import cpu

from .harness import Result, Run, run_surgeon

EXAMPLES = Path(__file__).parents[2] / "examples" / "compiled"
pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch, on the way through its compiler
]


@pytest.fixture(scope="module")
def compiled(shelf: Path) -> tuple[Path, Result]:
    """A compiled BERT with experts, and what the command said."""
    if cpu.load().path is None:
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    with contextlib.chdir(shelf):
        shutil.copytree("bert-moe", "to-compile")
        assert run_surgeon("set", "to-compile", "--tau", "0.5", "--rule", "cumulative").code == 0
        result = run_surgeon("-q", "compile", "to-compile", "--output", "json")
    assert result.code == 0, result.err
    return shelf / "to-compile-compiled", result


def test_what_it_says_and_writes(compiled: tuple[Path, Result]) -> None:
    directory, result = compiled
    assert {path.name for path in directory.iterdir()} == {
        *("model.pt2", "surgeon_cpu.so", "example.pt", "compiled.json")
    }
    found = result.json
    assert set(found) == {
        "model", "directory", "library", "inputs", "takes", "outputs", "tau", "max_error", "seconds", "bytes", "notes"
    }  # fmt: skip
    assert list(found["inputs"]) == ["input_ids", "attention_mask"]
    assert found["inputs"]["input_ids"] == "torch.int64"
    assert found["directory"] == "to-compile-compiled"
    taken = [(one["name"], one["shape"], one["numbers"]) for one in found["takes"]["inputs"]]
    assert taken == [(name, ["batch", "tokens"], "int") for name in ("input_ids", "attention_mask")]
    assert found["takes"]["sizes"]["batch"] == {"least": 1, "most": None, "multiple": 1}
    assert found["outputs"] == ["logits"]
    assert found["tau"] == {f"bert.encoder.layer.{index}.moe.tau": 0.5 for index in (0, 1)}
    assert found["max_error"] < 1e-5
    about = json.loads((directory / "compiled.json").read_text())
    assert about.items() >= {key: found[key] for key in ("inputs", "outputs", "tau")}.items()
    assert about["takes"].startswith("int(input_ids[batch, tokens]), int(attention_mask[batch, tokens]), 1 <= batch")


ALONE = """
import json, sys
for name in ("surgeon", "transformers"):
    sys.modules[name] = None
from pathlib import Path
import torch
place = Path(sys.argv[1])
torch.ops.load_library(place / "surgeon_cpu.so")
model = torch._inductor.aoti_load_package(str(place / "model.pt2"))
about = json.loads((place / "compiled.json").read_text())
given = dict(zip(about["inputs"], torch.load(place / "example.pt")["inputs"], strict=True))
before = model(**given)["logits"]
model.load_constants(dict.fromkeys(about["tau"], torch.tensor(0.0)), check_full_update=False)
torch.save((before, model(**given)["logits"]), str(place) + ".outputs")

def ids(*shape):
    return {name: torch.ones(shape, dtype=torch.int64) for name in given}

for shape in ((1, 1), (1, 32), (5, 3)):
    assert model(**ids(*shape))["logits"].shape == (shape[0], 2)
mask = torch.ones(2, 5, dtype=torch.int64)
for wrong in (
    ids(2, 33), ids(2, 0), ids(2),
    *(ids(2, 5) | {"attention_mask": m} for m in (mask.int(), mask.bool(), mask[:1], mask.t().contiguous().t())),
    ids(2, 5, 1),
):
    try:
        print("wrong:", model(**wrong))
    except RuntimeError as error:
        print(str(error).split(".")[0])
"""


@pytest.fixture(scope="module")
def printed(compiled: tuple[Path, Result]) -> str:
    """What `ALONE` prints, in a process that cannot import this package. It writes the model's outputs to a file."""
    environment = {key: value for key, value in os.environ.items() if key != "AOTI_RUNTIME_CHECK_INPUTS"}
    command = [sys.executable, "-c", ALONE, str(compiled[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("printed")
def test_tau_can_be_set_in_the_package(compiled: tuple[Path, Result], shelf: Path) -> None:
    directory, result = compiled
    before, after = torch.load(f"{directory}.outputs")
    graph = surgeon.load(shelf / "to-compile")
    example = torch.load(directory / "example.pt")
    given = dict(zip(result.json["inputs"], example["inputs"], strict=True))
    with torch.no_grad():
        torch.testing.assert_close(before, graph(**given).logits)
        surgeon.set_tau(graph, 0.0)
        torch.testing.assert_close(after, graph(**given).logits)
    assert not torch.allclose(before, after)


def test_other_sizes_and_what_is_refused(printed: str) -> None:
    assert printed.splitlines() == [
        "Wrong inputs: tokens is not 1 to 32",
        "Wrong inputs: tokens is not 1 to 32",
        "Wrong inputs: input_ids has 1 dimensions, not 2",
        "Wrong inputs: attention_mask is of another dtype than int64",
        "Wrong inputs: attention_mask is of another dtype than int64",
        "Wrong inputs: dimension 0 of attention_mask is not batch",
        "Wrong inputs: attention_mask is not contiguous; give x",
        "Wrong inputs: input_ids has 3 dimensions, not 2",
    ]


def test_the_python_example(compiled: tuple[Path, Result]) -> None:
    def off(*tau: str) -> float:
        command = [sys.executable, str(EXAMPLES / "run.py"), str(compiled[0]), *tau]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        return float(json.loads(done.stdout)["off"])

    assert off() < 1e-5 < off("0")


def test_the_cpp_example(compiled: tuple[Path, Result], tmp_path: Path) -> None:
    directory, result = compiled
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    build = str(tmp_path / "build")
    for command in (["cmake", "-S", str(EXAMPLES), "-B", build, prefix], ["cmake", "--build", build]):
        subprocess.run(command, capture_output=True, check=True)

    def run(place: Path, *more: str) -> Any:
        return subprocess.run([f"{build}/run", str(place), *more], capture_output=True, text=True)

    assert float(run(directory).stdout) < 1e-5
    assert float(run(directory, "0", *result.json["tau"]).stdout) > 1e-5
    wrong = shutil.copytree(directory, tmp_path / "wrong")
    example = torch.load(wrong / "example.pt")
    torch.save({**example, "inputs": [leaf.int() for leaf in example["inputs"]]}, wrong / "example.pt")
    done = run(wrong)
    assert (done.returncode, done.stdout) == (1, "")
    assert "input_ids is of another dtype than int64. The model takes int(input_ids[batch, tokens])" in done.stderr


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "no surgery": (lambda place: None, ("bert",), "bert is not a saved surgery"),
    "the surgery itself": (lambda place: None, ("bert-moe", "-o", "bert-moe/x"), "is in the surgery itself"),
    "a file": (lambda place: (place / "out").write_text(""), ("bert-moe", "-o", "out"), "out is a file"),
    "something else": (
        lambda place: (place / "out/x").mkdir(parents=True),
        ("bert-moe", "-o", "out", "--overwrite"),
        "out is not empty and not a compiled model",
    ),
    "an earlier one": (
        lambda place: ((place / "out").mkdir(), (place / "out" / "compiled.json").write_text("")),
        ("bert-moe", "-o", "out"),
        "replace it with --overwrite",
    ),
    "a needed input": (
        lambda place: None,
        ("bert-moe", "-o", "out", "--leave-out", "input_ids"),
        "input_ids cannot be left out. Optional inputs of this graph: attention_mask.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(run: Run, tmp_path: Path, kind: str) -> None:
    prepare, arguments, words = REFUSED[kind]
    prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run("compile", *arguments)
    assert result.code > 1
    assert words in " ".join(result.err.split())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
