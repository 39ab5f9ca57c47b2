"""What a shell is told can stand in place of an unfinished word."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from surgeon.bench.layer import DTYPES, MASKS
from surgeon.cli import app, completion
from surgeon.engines.openvino import LINEARS
from surgeon.jobs.export import TARGETS
from surgeon.kernels.gpu_model.devices import DEVICES
from surgeon.kernels.selection import RULES
from surgeon.passes.registry import all_passes
from surgeon.surgery.recipes import all_recipes

ASK = (
    "import sys; from surgeon.cli import main\n"
    "try: main()\n"
    "finally: print({name for name in ('torch', 'transformers') if name in sys.modules}, file=sys.stderr)"
)


def completed(*words: str) -> list[str]:
    """What fish is told, which asks for whole words and shows a help behind each."""
    environment = {"_SURGEON_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    line = {"_TYPER_COMPLETE_ARGS": " ".join(("surgeon", *words))}
    told = CliRunner().invoke(app, [], prog_name="surgeon", env=environment | line).stdout
    return [one.partition("\t")[0] for one in told.splitlines() if one]


@pytest.mark.parametrize(("line", "values"), [
    ("apply m --passes spars", ["sparsify", "sparsify-neurons", "sparsify-inputs"]),
    ("apply m --passes moeify,low", ["moeify,lower"]),
    ("apply m --passes moeify,moe", []),
    ("explain m --passes swap", ["swap-activation"]),
    ("apply m --recipe d2dmoe-v", ["d2dmoe-vit"]),
    ("passes low", ["lower"]),
    ("apply m --set moeify.exp", ["moeify.experts=", "moeify.expert_size=", "moeify.exposure="]),
    ("apply m --passes lower --set mo", []),
    ("apply m --passes lower,moeify --set moeify.expert_", ["moeify.expert_size="]),
    ("apply m --set moeify.rule=", [f"moeify.rule={rule}" for rule in RULES]),
    ("apply m --set swap-activation.to=re", ["swap-activation.to=relu", "swap-activation.to=relu2"]),
    ("apply m --set sparsify.distill-layers=", []),
    ("apply m --set moeify.share-trunk=f", ["moeify.share-trunk=false"]),
    ("apply m --task im", ["image-classification", "imitate"]),
    ("apply m --verify f", ["fast", "full"]),
    ("plot m p", ["pareto"]),
    ("sweep m --rule max,e", ["max,energy"]),
    ("set m --rule t", ["top_k"]),
    ("export m --to o", ["openvino", "onnx"]),
    ("export m --linears int8", ["int8", "int8-weights"]),
    ("tune m --metric ", ["flops", "ms"]),
    ("bench predict a", ["a100"]),
    ("bench layer --mask uniform,s", ["uniform,skewed"]),
    ("schema bench l", ["layer", "linear"]),
    ("schema exp", ["explain", "export"]),
    ("ap", ["apply"]),
    ("bench ", ["layer", "linear", "surgery", "predict"]),
    ("apply m --dr", ["--dry-run"]),
])  # fmt: skip
def test_values(line: str, values: list[str]) -> None:
    assert completed(*line.split(" ")) == values


@pytest.mark.parametrize("line", ["inspect be", "apply be", "sweep m --data re", "set be", "sweep m -o p", "report be"])
def test_files_are_left_to_the_shell(line: str) -> None:
    assert completed(*line.split(" ")) == []


def test_every_name_is_offered() -> None:
    assert set(completed("apply", "m", "--passes", "")) == set(completed("passes", "")) == set(all_passes())
    assert set(completed("apply", "m", "--recipe", "")) == set(all_recipes())
    for name, kind in all_passes().items():
        options = {word.removesuffix("=") for word in completed("apply", "m", "--set", f"{name}.")}
        assert options == {f"{name}.{option.name}" for option in fields(kind)}


def test_the_names_are_those_that_exist() -> None:
    assert (completion.RULES, completion.TARGETS, completion.LINEARS) == (RULES, TARGETS, LINEARS)
    assert (tuple(DTYPES), MASKS) == (completion.DTYPES, completion.MASKS)
    assert (*DEVICES, "cuda", "list") == completion.GPUS


@pytest.mark.parametrize(("words", "place", "joined"), [
    (["surgeon", "apply", "--set", "moeify.router", "=", "tr"], 5, (3, "moeify.router=tr", 14)),
    (["surgeon", "apply", "--set", "moeify.router", "="], 4, (3, "moeify.router=", 14)),
    (["surgeon", "set", "--tau", "*.0", ":", "0.1,*", ":", "0"], 7, (3, "*.0:0.1,*:0", 10)),
    (["surgeon", "apply", "--passes", "moe"], 3, (3, "moe", 0)),
    (["surgeon", "apply"], 2, (2, "", 0)),
])  # fmt: skip
def test_bash_splits_words_at_signs(words: list[str], place: int, joined: tuple[int, str, int]) -> None:
    found, at, cut = completion.rejoined(words, place)
    assert (at, found[at], cut) == joined


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(("words", "told"), [
    (("apply", "m", "--set", "moeify.router", "=", "t"), ["trained"]),
    (("apply", "m", "--passes", "moeify,low"), ["moeify,lower"]),
    (("inspect", "be"), []),
])  # fmt: skip
def test_bash_gets_what_it_replaces_and_torch_is_not_loaded(words: tuple[str, ...], told: list[str]) -> None:
    environment = {"_SURGEON_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(("surgeon", *words))}
    script = f'COMP_CWORD={len(words)} {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["bash", "-c", script], env={**environment, "CODE": ASK, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == told
    assert done.stderr == "set()\n"


def test_the_scripts_are_for_this_program() -> None:
    shown = (
        CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="surgeon", env={"SHELL": "/bin/bash"}).stdout
    )
    assert f"{completion.VARIABLE}=complete_bash" in shown
