"""Passes that train in two processes end where one process ends, go on after one is killed, and speak once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.training import loop
from tests.cli.shelf import write_bert

ROOT = Path(__file__).parents[2]

# Batches of 5, 4 and 1 samples, with padding and predicted tokens spread unevenly. Dropout would draw other numbers.
DRIVER = """
import json, os, signal, sys
from pathlib import Path

import torch

from surgeon import processes
from surgeon.passes import Lower, Mlpify, Moeify, Recover, Sparsify, SwapActivation
from surgeon.surgery.pipeline import Pipeline
from surgeon.training import loop
from surgeon.training.checkpoint import Checkpoint
from tests.small_models import hugging_face

torch.set_num_threads(1)
recipe, target, kill = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model, inputs = hugging_face("llama")
generator = torch.Generator().manual_seed(0)
batches = []
for samples in (5, 4, 1):
    ids = torch.randint(3, 50, (samples, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
passes = {
    "all": [
        Mlpify(only=("*o_proj",), steps=3),
        SwapActivation(steps=2),
        Sparsify(target=0.3, steps=4, accumulate=2, distill=0.3, distill_layers=0.1),
        Moeify(expert_size=4, steps=4),
        Recover(tau=0.3, steps=3),
        Lower(),
    ],
    "sums": [Moeify(expert_size=4, router="centres", objective="activation", steps=4, exposure=0.2), Lower()],
    "own loss": [Sparsify(steps=3)],
    "imitate": [SwapActivation(steps=2), Moeify(expert_size=4, steps=3), Recover(tau=0.3, steps=3)],
}[recipe]
data = batches
if recipe == "own loss":
    from surgeon.data.data import Data
    def loss(outputs, batch):  # the mean over samples
        return outputs.logits.float().logsumexp(-1).mean((1)).mean()
    data = Data(batches, loss=loss)
if recipe == "imitate":
    from surgeon.data.data import Data
    data = Data([{name: batch[name] for name in inputs} for batch in batches], task="imitate")
if kill:
    loop.CHECKPOINT_SECONDS = -1.0  # after every step
    save = Checkpoint.save
    def dying(self, step, history):
        save(self, step, history)
        if step == kill and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    Checkpoint.save = dying
surgery = Pipeline(passes).run(
    model, inputs=inputs, data=data, workdir=target.with_suffix(".work"), resume="--resume" in sys.argv
)
surgery.save(target)
if processes.is_main():
    print(json.dumps([report.fit and report.fit.losses for report in surgery.reports]))
processes.leave()
"""


def run(processes: int, *args: Any, script: Path | str) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module given as "-m name", in a number of processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if processes == 2 else []
    paths = os.pathsep.join([str(ROOT), *sys.path])  # pytest's own entry point leaves the root out of sys.path
    environment = {**os.environ, "PYTHONPATH": paths, "SURGEON_CPU": "torch"}
    command = [sys.executable, *launcher, *str(script).split(), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """The driver as a script."""
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


def assert_same(one: Path, two: Path) -> None:
    """Two saved surgeries are equal within rounding, which AdamW makes larger where a gradient is near zero."""
    first, second = surgeon.load(one), dict(surgeon.load(two).named_parameters())
    with torch.no_grad():
        for name, value in first.named_parameters():
            assert float((second[name] - value).norm()) < 5e-3 * float(value.norm()) + 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["all", "sums", "own loss", "imitate"])
def test_two_processes_end_where_one_ends(recipe: str, driver: Path, tmp_path: Path) -> None:
    losses = []
    for count in (1, 2):
        done = run(count, recipe, tmp_path / str(count), 0, script=driver)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        losses.append(list(filter(None, json.loads(line))))
    assert_same(tmp_path / "1", tmp_path / "2")
    for one, two in zip(*losses, strict=True):
        assert [values for _, values in one] == [pytest.approx(values, rel=5e-3, abs=1e-6) for _, values in two]


@pytest.mark.slow
def test_a_run_goes_on_after_one_process_is_killed(driver: Path, tmp_path: Path) -> None:
    assert run(1, "own loss", tmp_path / "1", 0, script=driver).returncode == 0
    killed = run(2, "own loss", tmp_path / "2", 2, script=driver)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert not (tmp_path / "2").exists()
    resumed = run(2, "own loss", tmp_path / "2", 0, "--resume", script=driver)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_the_command_line_prints_and_saves_once(tmp_path: Path) -> None:
    write_bert(tmp_path)
    args = ("apply", tmp_path / "bert", "--passes", "sparsify", "--data", tmp_path / "reviews.csv", "--batch-size", 8)
    done = run(2, *args, "--set", "sparsify.steps=2", "-o", tmp_path / "out", script="-m surgeon")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == done.stderr.count("tracing") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "out", "reviews.csv"]
    again = run(2, *args, "-o", tmp_path / "out", script="-m surgeon")
    assert again.returncode != 0
    assert again.stderr.count("exists. Give another directory") == 1


def test_processes_draw_other_numbers_and_go_on_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, after = [], []
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(0)
        with loop._drawing(0, 3, torch.device("cpu")):
            drawn.append(torch.rand(4))
        after.append(torch.rand(4))
    assert not torch.equal(*drawn)
    assert torch.equal(*after)
