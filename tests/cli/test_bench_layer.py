"""`surgeon bench layer`: a layer by every method."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.bench.engines import ENGINES
from surgeon.bench.methods import METHODS
from surgeon.bench.timing import median_seconds

from .harness import Run, answer_in

pytestmark = pytest.mark.usefixtures("small_machine")
SMALL = ("--width", "8", "--hidden", "32", "--seconds", "0.0001")
METHODS_BUT_COMPILED = ",".join(
    name for name in METHODS if name not in ("compiled", "ours_int8", "ours_int4", "ours_fp8", *ENGINES)
)


def test_a_layer_is_timed_by_every_method(run: Run, tmp_path: Path) -> None:
    grid = ("--tokens", "1, 20", "--size", "8,4", "--share", "0.25,1", "--mask", "uniform,skewed", "--dtype", "float32")
    files = ("-o", "times.json", "-o", "times.png")
    result = run(
        "bench",
        "layer",
        *SMALL,
        *grid,
        "--methods",
        METHODS_BUT_COMPILED,
        *files,
        "--device",
        "cpu",
        "--output",
        "json",
    )
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"machine", "width", "hidden", "gated", "activation", "cells", "untimed"}
    assert found["untimed"] == 0
    assert len(found["cells"]) == 2 * 2 * 2 * 2
    assert [(c["tokens"], c["size"], c["mask"]) for c in found["cells"][::2]] == [
        (tokens, size, mask) for tokens in (1, 20) for size in (8, 4) for mask in ("uniform", "skewed")
    ]
    for cell in found["cells"]:
        assert list(cell["methods"]) == METHODS_BUT_COMPILED.split(",")
        for timing in cell["methods"].values():
            assert timing["milliseconds"] > 0
            assert timing["error"] < 1e-5
        assert cell["gain"] == cell["methods"]["dense"]["milliseconds"] / cell["methods"]["ours"]["milliseconds"]
        assert cell["ceiling"] == 1 / cell["executed"]
    assert answer_in((tmp_path / "times.json").read_text()) == found
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert "Written to times.png." in result.err
    assert "bench  16/16" in result.err


GRID = ("--tokens", "1,20", "--size", "4", "--share", "0.25,1", "--dtype", "float32", "--device", "cpu")
ASKED = ("bench", "layer", *SMALL, *GRID, "--methods", "dense,ours", "-o", "times.json", "-o", "times.png")


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, signal.Signals], None]]:
    """`stop(layers, signal)`: do what the signal does while the layer after so many is timed.

    The handler is called: a signal that is really sent could end a process that runs tests.
    """

    # A process in the background may have been told to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(layers: int, number: signal.Signals) -> None:
        timed = 0

        def stopping(*args: Any, **options: Any) -> dict[str, float]:
            nonlocal timed
            timed += 1
            if timed > layers:
                handler = signal.getsignal(number)
                assert callable(handler), "nothing handles the signal"
                handler(number, None)
            return median_seconds(*args, **options)

        monkeypatch.setattr("surgeon.bench.grid.median_seconds", stopping)

    yield at
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_what_is_done_and_goes_on(
    run: Run, tmp_path: Path, stop: Callable[[int, signal.Signals], None], number: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop(3, number)
    stopped = run(*ASKED)
    assert stopped.code == 130
    assert "Incomplete: 1 of 4 layers were not timed." in stopped.out
    assert "warning: interrupted; 1 of 4 layers were not timed. To continue, run:\n  surgeon bench" in stopped.err
    kept = answer_in((tmp_path / "times.json").read_text())
    assert (len(kept["cells"]), kept["untimed"]) == (3, 1)
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert signal.getsignal(signal.SIGTERM) is before
    stop(1, number)
    rest = run(*ASKED, "--resume", "--output", "json")
    assert rest.code == 0, rest.err
    assert rest.json["cells"][:3] == kept["cells"]
    assert [(cell["tokens"], cell["share"]) for cell in rest.json["cells"]] == [
        (tokens, share) for tokens in (1, 20) for share in (0.25, 1)
    ]
    assert rest.json["untimed"] == 0
    assert rest.json["machine"] == kept["machine"]
    assert answer_in((tmp_path / "times.json").read_text()) == rest.json
    assert not list(tmp_path.glob(".times*"))
    complete = run(*ASKED, "--resume")
    assert (complete.code, "times.json is complete" in complete.err) == (2, True)


def test_a_run_that_is_stopped_before_a_layer_is_done_writes_nothing(
    run: Run, tmp_path: Path, stop: Callable[[int, signal.Signals], None]
) -> None:
    stop(0, signal.SIGTERM)
    result = run(*ASKED)
    assert (result.code, "interrupted; nothing was saved" in result.err) == (130, True)
    assert not list(tmp_path.glob("*times*"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--hidden", "64"), "Its hidden: 32; now: 64."),
        (
            ("--share", "0.25,0.5"),
            "Its layer: ('float32', 1, 4, 'uniform', 1.0); now: ('float32', 1, 4, 'uniform', 0.5).",
        ),
        (("--methods", "ours"), "Its methods: ('dense', 'ours'); now: ('ours',)."),
        (("--threads", "2"), "Its threads: 1; now: 2."),
    ],
)
def test_only_the_same_run_goes_on(
    run: Run, stop: Callable[[int, signal.Signals], None], changed: tuple[str, str], words: str
) -> None:
    nothing = run(*ASKED, "--resume")
    assert (nothing.code, "There is nothing to resume: no times.json" in nothing.err) == (2, True)
    stop(2, signal.SIGINT)
    assert run(*ASKED).code == 130
    other = run(*ASKED, *changed, "--resume")
    assert other.code == 2
    assert words in other.err


def test_chosen_methods_are_shown(run: Run) -> None:
    args = ("--tokens", "2", "--size", "4", "--share", "0.5", "--gated", "--methods", "ours-dense, published,ours")
    result = run("-q", "bench", "layer", *SMALL, *args, "--device", "cpu", "--activation", "silu")
    assert (result.code, result.err) == (0, "")
    assert "float32, 2 tokens, 8 experts × 4" in result.out
    assert "bfloat16, 2 tokens" in result.out
    assert "published did not run: the published method has no gated layers" in result.out
    assert "dense\n/ours" not in result.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--size", "100"),
            "Experts of 100 neurons do not divide a hidden width of 3072: 72 neurons would be left over. "
            "Give another --size. Nearest: 96, 128.",
        ),
        (("--width", "0"), "A layer's width, hidden width and expert size must be at least 1."),
        (("--size", "6.5"), "--size 6.5: give whole numbers of at least 1, separated by commas."),
        (("--tokens", "0"), "--tokens 0: give whole numbers of at least 1"),
        (("--share", "0.1,2"), "--share 0.1,2: give numbers above 0 and up to 1, separated by commas."),
        (("--share", "nan"), "--share nan: give numbers"),
        (("--dtype", "int8"), "--dtype int8: choose from float32, bfloat16, float16."),
        (("--mask", "random"), "--mask random: choose from uniform, skewed, clustered."),
        (("--methods", "best"), "--methods best: choose from dense, compiled, masked"),
        (("--against", "best"), "--against best: choose from openvino, openvino_weights, onnxruntime, torchao"),
        (("--activation", "step"), "unknown activation 'step'"),
        (("--threads", "0"), "--threads must be at least 1"),
        (("--seconds", "0"), "--seconds above 0"),
        (("--device", "tpu"), "--device tpu: give cpu or cuda."),
        (("--batch", "3"), "No such option: --batch"),
        (("-o", "times.csv"), "Cannot write times.csv: give a name that ends in .json (numbers)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused(run: Run, args: tuple[str, ...], words: str) -> None:
    result = run("bench", "layer", *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_an_engine_that_is_not_installed_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.jobs.bench_layer.find_spec", lambda name: None)
    result = run("bench", "layer", "--against", "torchao")
    assert result.code == 2
    assert "--against torchao: torchao is not installed. Install it: pip install torchao." in result.err


def test_a_gpu_that_is_not_there_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "layer", "--device", "cuda")
    assert result.code == 2
    assert "--device cuda: torch finds no GPU. surgeon bench predict h100 predicts times without one." in result.err
