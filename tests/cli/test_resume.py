"""Interrupted runs: what is kept, and which run may go on with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import surgeon
from surgeon.errors import SaveError, UsageError
from surgeon.jobs.workdir import WorkDirectory

from .harness import DATA, NET, Run, left


def test_a_full_disk_exits_with_4_and_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr("surgeon.surgery.artifact.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        result = run("-q", "apply", "--passes", "moeify", *NET, *DATA, "--set", "moeify.steps=1")
    assert result.code == 4
    assert "error: Cannot write gelu-surgery" in result.err
    # what was trained is kept, so that freeing space and --resume is enough
    assert left(tmp_path) == {"gelu-surgery.work"}
    assert run("-q", "apply", "--passes", "moeify", *NET, *DATA, "--set", "moeify.steps=1", "--resume").code == 0
    assert left(tmp_path) == {"gelu-surgery"}


def test_an_interrupted_run_can_be_resumed(run: Run, tmp_path: Path) -> None:
    steps = ("--set", "sparsify.steps=2", "--set", "moeify.steps=60")
    args = ("apply", "--passes", "sparsify,moeify", *NET, *DATA, *steps)
    # Before it the data was read by sparsify, before, in and after its training, to split the layers, to fit the
    # routers in closed form, and for eight epochs of their training.
    (tmp_path / "interrupt").write_text("7")
    stopped = run(*args)
    assert stopped.code == 130
    assert stopped.err.endswith(
        "error: interrupted; checkpoints are in gelu-surgery.work. To continue, run:\n"
        f"  surgeon {' '.join(args)} --resume\n"
    )
    assert left(tmp_path) == {"interrupt", "gelu-surgery.work"}
    (tmp_path / "interrupt").unlink()

    again = run("-q", *args)
    assert again.code == 2
    assert "gelu-surgery.work has the checkpoints of an interrupted run. --resume continues it" in again.err

    resumed = run(*args, "--resume")
    assert resumed.code == 0, resumed.err
    assert "trained 60 steps" in resumed.out
    assert "resumed at 48" in resumed.out
    assert left(tmp_path) == {"gelu-surgery"}
    assert run("-q", *args, "-o", "whole").code == 0
    x, one, two = torch.randn(2, 5, 16), surgeon.load("gelu-surgery"), surgeon.load("whole")
    for graph in (one, two):
        surgeon.set_tau(graph, 0.9)
    with torch.no_grad():
        assert torch.equal(one(x), two(x))


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    result, recipe = (
        tmp_path / "out",
        {"model": "abc", "passes": [{"name": "moeify", "options": {"lr": 0.1}}], "seed": 0},
    )
    with pytest.raises(UsageError, match=r"There is nothing to resume: no .*/out\.work"):
        WorkDirectory(result, recipe, resume=True, discard=False)
    work = WorkDirectory(result, recipe, resume=False, discard=False)
    assert not work.has_checkpoint
    (work.path / "00-moeify").mkdir()
    (work.path / "00-moeify" / "fit.json").write_text("{}")
    assert WorkDirectory(result, recipe, resume=True, discard=True).has_checkpoint
    with pytest.raises(UsageError, match=r"differs from this one\. Its seed: 0; now: 1\. Give the same options"):
        WorkDirectory(result, {**recipe, "seed": 1}, resume=True, discard=False)
    with pytest.raises(UsageError, match=r'Its passes: \[{"name": "moeify", .*; now: \[\]'):
        WorkDirectory(result, {**recipe, "passes": []}, resume=True, discard=False)
    with pytest.raises(UsageError, match="--resume continues it, --overwrite drops it"):
        WorkDirectory(result, recipe, resume=False, discard=False)
    work.close(done=False)
    assert work.has_checkpoint
    assert not WorkDirectory(result, recipe, resume=False, discard=True).has_checkpoint
    (work.path / "recipe.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read, so this run cannot be resumed"):
        WorkDirectory(result, recipe, resume=True, discard=False)
    work.close(done=True)
    assert left(tmp_path) == set()


def test_work_is_not_kept_in_foreign_or_closed_places(tmp_path: Path) -> None:
    (tmp_path / "x.work").mkdir()
    with pytest.raises(UsageError, match=r"x\.work is needed for checkpoints"):
        WorkDirectory(tmp_path / "x", {}, resume=False, discard=True)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="Cannot write"):
        WorkDirectory(tmp_path / "file" / "x", {}, resume=False, discard=False)


def test_interrupted_without_checkpoints_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgeon.surgery.pipeline.Pipeline.run", stop)
    result = run("--output", "json", "-q", "apply", "--passes", "moeify", *NET, *DATA)
    assert result.code == 130
    assert result.json["error"] == {
        "type": "Interrupted", "message": "interrupted; nothing was saved", "exit_code": 130
    }  # fmt: skip
    assert left(tmp_path) == set()
