"""--budget-minutes: a search for settings on the training data, which is recorded, repeatable and resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgeon
from surgeon.graph.traced import TracedGraph
from surgeon.jobs import search
from surgeon.jobs.recipe import read_recipe
from surgeon.jobs.search import Searcher, at_share
from surgeon.jobs.search_settings import AS_GIVEN, stages, with_options
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.trials import Trial, merged
from tests.small_models import stack, vectors

from .harness import NET, Run, left, recorded

pytestmark = pytest.mark.usefixtures("traced_once")

# Three settings are left: as given, and higher learning rates.
PINNED = [
    word
    for setting in (
        "sparsify.target=0.2", "sparsify.epochs=2", "moeify.expert_size=4", "moeify.router_width=4",
        "moeify.epochs=2",
    )
    for word in ("--set", setting)
]  # fmt: skip
TASK = """
from pathlib import Path
import torch
from surgeon import Data

class Held(list):
    def __iter__(self):
        with Path("read").open("a") as file:
            file.write("x")
        return super().__iter__()

def data():
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 5, 16, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(18)
    ]
    return Data(batches[:16], Held(batches[16:]))
"""
MINUTES = ("--budget-minutes", "30")


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run whose trials have two steps, on data that notes when the held-out part is read."""
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.setattr(search, "_FEWEST", 2)
    data = ("--data", "task.py:data", "--task", "classification")
    return ["-q", "apply", "--recipe", "recommended", *NET, *data, *PINNED]


def reads(place: Path) -> int:
    """How often the held-out data was read since the last call."""
    count = len((place / "read").read_text())
    (place / "read").unlink()
    return count


def test_settings_are_searched_on_the_training_data_alone(run: Run, tmp_path: Path, args: list[str]) -> None:
    first = run("--output", "json", *args, *MINUTES, "-o", "first")
    assert first.code == 0, first.err
    with_search = reads(tmp_path)
    assert run(*args, "-o", "plain").code == 0
    assert with_search == reads(tmp_path)
    found = recorded(tmp_path / "first")["search"]
    assert found == first.json["search"]
    assert recorded(tmp_path / "plain")["search"] is None
    assert [(one["name"], one["steps"]) for one in found["trials"]] == [
        (AS_GIVEN, 32), ("learning rates times 4", 32), ("learning rates times 16", 32),
    ]  # fmt: skip
    assert (found["train"], found["validation"]) == (8 * 13, 8 * 3)
    losses = {one["name"]: one["loss"] for one in found["trials"]}
    assert len(set(losses.values())) == 3
    assert found["chosen"] == min(losses, key=lambda name: losses[name])
    options = {one["name"]: one["options"] for one in recorded(tmp_path / "first")["recipe"]["passes"]}
    rates = {AS_GIVEN: 5e-5, "learning rates times 4": 2e-4, "learning rates times 16": 8e-4}
    assert options["sparsify"]["lr"] == rates[found["chosen"]]
    assert (options["sparsify"]["target"], options["moeify"]["expert_size"]) == (0.2, 4)
    assert "steps" not in options["sparsify"]  # there is time for the whole recipe
    second = run(*args, *MINUTES, "-o", "second")
    assert second.code == 0, second.err
    assert "Loss on 24 samples of the training data, at 20% of the layers' cost" in second.out
    shown = run("diff", "second").out
    assert all(f"\n{name} " in f"\n{shown}" for name in losses)
    again = recorded(tmp_path / "second")["search"]
    assert [one["loss"] for one in again["trials"]] == [one["loss"] for one in found["trials"]]
    assert (again["chosen"], again["options"]) == (found["chosen"], found["options"])


def test_trials_learn_from_the_teacher_as_the_run_does(
    run: Run, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Any] = []
    whole = Pipeline.run

    def spy(self: Pipeline, *given: Any, **options: Any) -> Any:
        teachers.append(options.get("teacher"))
        return whole(self, *given, **options)

    monkeypatch.setattr(Pipeline, "run", spy)
    done = run(*args, *MINUTES, "--teacher", "nets:relu", "-o", "taught")
    assert done.code == 0, done.err
    assert len(teachers) > 3
    assert teachers[0] is not None
    assert all(teacher is teachers[0] for teacher in teachers)


RATES = "learning rates times 4"
# The losses of trials that train nothing. Of the rates, 4 times is best; on top of it, small experts.
LOSSES = {
    AS_GIVEN: 5.0, RATES: 4.0, "learning rates times 16": None, f"{RATES}, 10% of the neurons active": 3.0,
    f"{RATES}, experts of 16 neurons": 2.0, f"{RATES}, routers of width 16": 6.0,
}  # fmt: skip
# The trials that follow, and by how much they are longer than the first.
TRIALS = [
    *((name, 1) for name in LOSSES), (f"{RATES}, experts of 16 neurons", 2), (f"{RATES}, 10% of the neurons active", 2),
]  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trials that train nothing: their loss comes from a table. Gives the trials that ran."""
    ran: list[tuple[str, int]] = []

    def trial(self: Searcher, name: str, options: Any, steps: int) -> Trial:
        ran.append((name, steps))
        return Trial(name, options, steps, LOSSES[name], 0.5, "" if LOSSES[name] else "too costly")

    speed = search._Speed({"sparsify": 0.1, "moeify": 0.001, "recover": 0.1}, 0.1, 0.1, 0.001)
    monkeypatch.setattr(Searcher, "_trial", trial)
    monkeypatch.setattr(Searcher, "_speed", lambda self: speed)
    return ran


def without_sizes(args: list[str]) -> list[str]:
    """The arguments without what the user set, so that all settings are tried."""
    return [word for word in args if word != "--set" and "=" not in word]


def test_a_stage_starts_from_the_best_of_the_one_before_and_its_better_half_goes_on(
    run: Run, tmp_path: Path, args: list[str], table: list[tuple[str, int]]
) -> None:
    longer = ("--set", "recover.epochs=3", "--set", "sparsify.epochs=20")
    result = run(*without_sizes(args), "--budget-minutes", "2", "-o", "out", *longer)
    assert result.code == 0, result.err
    steps = table[0][1]
    # What the first stage found best is not tried again, and small experts win both times.
    assert table == [(name, longer * steps) for name, longer in TRIALS]
    record = recorded(tmp_path / "out")
    assert record["search"]["chosen"] == f"{RATES}, experts of 16 neurons"
    options = {one["name"]: one["options"] for one in record["recipe"]["passes"]}
    assert (options["sparsify"]["lr"], options["moeify"]["expert_size"]) == (2e-4, 16)
    assert "too costly" in result.out
    assert f"Chosen: {RATES}, experts of 16 neurons. The full run has sparsify.lr=0.0002, " in result.out


def test_no_trial_is_longer_than_the_full_run(run: Run, args: list[str], table: list[tuple[str, int]]) -> None:
    result = run(*without_sizes(args), *MINUTES, "-o", "out", "--set", "sparsify.steps=40", "--set", "recover.epochs=3")
    assert result.code == 0, result.err
    assert {steps for _, steps in table} == {32, 40}


def test_a_search_that_was_interrupted_goes_on(
    run: Run, tmp_path: Path, args: list[str], table: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*without_sizes(args), "--budget-minutes", "2", "-o", "out")
    trial = Searcher._trial

    def stopped(self: Searcher, name: str, options: Any, steps: int) -> Trial:
        if len(table) == 3:
            raise KeyboardInterrupt
        return trial(self, name, options, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Searcher, "_trial", stopped)
        result = run(*command)
    assert result.code == 130
    assert "checkpoints are in out.work" in result.err
    assert run(*command).code == 2  # --resume or --overwrite
    other = run(*command, "--resume", "--budget-minutes", "3")
    assert other.code == 2
    assert "Its budget_minutes: 2.0; now: 3.0" in other.err

    def fails(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the search ends, then the full run is interrupted
        patch.setattr("surgeon.jobs.apply._run", fails)
        assert run(*command, "--resume").code == 130
    assert len(table) == len(TRIALS)  # each trial ran once
    result = run(*command, "--resume")
    assert result.code == 0, result.err
    assert len(table) == len(TRIALS)
    assert len(recorded(tmp_path / "out")["search"]["trials"]) == len(TRIALS)
    assert "out.work" not in left(tmp_path)


def test_steps_are_fewer_where_time_is_short(
    run: Run, tmp_path: Path, args: list[str], table: list[tuple[str, int]]
) -> None:
    long = ("--set", "sparsify.epochs=200", "--set", "recover.steps=1000", "--set", "moeify.steps=100")
    result = run(*without_sizes(args), *long, "--budget-minutes", "1", "-o", "out")
    assert result.code == 0, result.err
    options = recorded(tmp_path / "out")["search"]["options"]
    steps = {name: own["steps"] for name, own in options.items()}
    seconds = 0.1 * steps["sparsify"] + 0.001 * steps["moeify"] + 0.1 * steps["recover"]
    assert 0.2 * 60 < seconds < 60
    assert steps["sparsify"] / 3200 == pytest.approx(steps["recover"] / 1000, rel=0.05)


def test_a_trial_that_diverges_loses(
    run: Run, tmp_path: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.jobs.search_settings._RATES", (1e35,))
    result = run(*args, *MINUTES, "-o", "out")
    assert result.code == 0, result.err
    found = recorded(tmp_path / "out")["search"]
    assert [(one["loss"] is None, one["why"]) for one in found["trials"]] == [(False, ""), (True, "diverged")]
    assert found["chosen"] == AS_GIVEN


@pytest.mark.parametrize(("changed", "words"), [
    (("--recipe", "relufy", "--budget-minutes", "1"), "finds settings of moeify and of passes that fine-tune"),
    (("--budget-minutes", "0"), "--budget-minutes 0 must be above 0"),
    (("--budget-minutes", "1", "--dry-run"), "needs --data, and cannot be a --dry-run"),
])  # fmt: skip
def test_wrong_budgets(run: Run, args: list[str], changed: tuple[str, ...], words: str) -> None:
    result = run(*without_sizes(args), *changed)
    assert result.code == 2
    assert words in result.err


def test_too_little_time_says_how_much_is_needed(run: Run, args: list[str], table: list[tuple[str, int]]) -> None:
    result = run(*args, "--budget-minutes", "0.001")
    assert result.code == 2
    assert "--budget-minutes 0.001 is too short to try 3 settings on this machine. Give at least 0." in result.err
    assert table == []


@pytest.fixture(scope="module")
def graph() -> TracedGraph:
    """A model whose routers are usually of width 8."""
    return surgeon.trace(stack("gelu", 3), vectors())


def names(graph: TracedGraph, recipe: str, given: dict[str, dict[str, Any]] | None = None) -> list[list[str]]:
    passes, _ = read_recipe(recipe, given or {})
    return [[name for name, _ in stage[1:]] for stage in stages(passes, given or {}, graph)]


RATE_NAMES = ["learning rates times 4", "learning rates times 16"]


def test_what_the_user_has_set_is_not_tried(graph: TracedGraph) -> None:
    assert names(graph, "recommended", {"sparsify": {"target": "0.3"}, "moeify": {"experts": "4"}}) == [
        RATE_NAMES, ["routers of width 16"],
    ]  # fmt: skip
    assert names(graph, "recommended", {"recover": {"lr": "1e-4"}})[0] == []


@pytest.mark.parametrize(("recipe", "want"), [
    ("recommended", ["10% of the neurons active", "experts of 16 neurons", "routers of width 16"]),
    ("d2dmoe-bert", ["penalty times 10", "penalty times 100", "experts of 12 neurons", "routers of width 64"]),
    ("d2dmoe-gpt2", ["penalty times 10", "penalty times 100", "experts of 2 neurons", "routers of width 64"]),
    ("moefication", ["experts of 16 neurons", "routers of width 64"]),
])  # fmt: skip
def test_every_recipe_is_searched_alike(graph: TracedGraph, recipe: str, want: list[str]) -> None:
    assert names(graph, recipe) == [RATE_NAMES, want]
    passes, _ = read_recipe(recipe, {})
    for stage in stages(passes, {}, graph):
        for name, options in stage:
            changed = {one.name: one.options() for one in with_options(passes, options)}
            same = changed == {one.name: one.options() for one in passes}
            assert same == (name == AS_GIVEN), name


def test_published_methods_find_their_settings_too(run: Run, tmp_path: Path, args: list[str]) -> None:
    command = [word for word in without_sizes(args) if word != "recommended"]
    place = command.index("--recipe") + 1
    pinned = ("--set", "sparsify.epochs=2", "--set", "moeify.epochs=2", "--set", "moeify.expert_size=4")
    pinned += ("--set", "moeify.router_width=4", "--set", "sparsify.lr=1e-3")
    result = run(*command[:place], "d2dmoe-bert", *command[place:], *pinned, *MINUTES, "-o", "out")
    assert result.code == 0, result.err
    found = recorded(tmp_path / "out")["search"]
    assert [one["name"] for one in found["trials"]] == [AS_GIVEN, "penalty times 10", "penalty times 100"]
    alpha = recorded(tmp_path / "out")["recipe"]["passes"][1]["options"]["alpha"]
    assert alpha == {AS_GIVEN: 1e-4, "penalty times 10": 1e-3, "penalty times 100": 1e-2}[found["chosen"]]


def test_settings_of_two_stages_add_up() -> None:
    assert merged({"a": {"x": 1, "y": 1}}, {"a": {"x": 2}, "b": {"z": 3}}) == {"a": {"x": 2, "y": 1}, "b": {"z": 3}}


@pytest.mark.parametrize(("points", "want"), [
    ([(0.5, 1.0), (0.3, 2.0), (0.1, 4.0)], 3.0),
    ([(0.5, 1.0), (0.2, 2.0)], 2.0),
    ([(0.1, 5.0), (0.05, 6.0)], 5.0),
    ([(0.9, 1.0), (0.3, 2.0)], None),
    ([], None),
])  # fmt: skip
def test_the_loss_at_a_cost_is_between_two_taus(points: Any, want: float | None) -> None:
    assert at_share(points, 0.2) == pytest.approx(want)
