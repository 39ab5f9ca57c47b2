"""Recipes as YAML files: what goes in comes out again, and what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.errors import SaveError, UsageError
from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation
from surgeon.passes.registry import all_passes
from surgeon.surgery.recipe import InputFile, Recipe, Step
from surgeon.surgery.recipes import RECIPES
from tests.small_models import stack, vectors

TEXT = """\
seed: 7
passes:
  - swap-activation
  - sparsify: {target: 5e-2, steps: 3}
  - moeify:
      expert_size:
        "*.0": 8
        "*": 4
      lr: 0.01
      only: ["*.0", "*.1"]
  - lower:
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def written(text: str) -> str:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return "r.yaml"

    return written


def test_a_file_gives_its_passes(write: Any) -> None:
    recipe = surgeon.load_recipe(write(TEXT))
    assert recipe.seed == 7
    assert recipe.build() == [
        SwapActivation(),
        Sparsify(target=0.05, steps=3),
        Moeify(expert_size={"*.0": 8, "*": 4}, lr=0.01, only=("*.0", "*.1")),
        Lower(),
    ]
    assert list(recipe.passes[2].options["expert_size"]) == ["*.0", "*"]  # the first pattern that matches counts
    assert recipe.build({"moeify": {"lr": "0.5"}})[2].lr == 0.5  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="'refit', which is not among the passes: swap-activation, sparsify"):
        recipe.build({"refit": {"rank": 2}})


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("complete", [False, True])
def test_recipes_by_name_come_back_from_a_file(tmp_path: Path, name: str, complete: bool) -> None:
    recipe = surgeon.load_recipe(name)
    file = recipe.save(tmp_path / "r.yaml", complete=complete)
    read = surgeon.load_recipe(file)
    assert read.build() == recipe.build()
    text = file.read_text(encoding="utf-8")
    assert all(len(line) <= 120 for line in text.splitlines())
    assert text.startswith(f"# {name}: ")
    for step in read.passes:
        named = [
            f"      {option.name}:" in text for option in surgeon.passes.about.describe(all_passes()[step.name]).options
        ]
        assert all(named) or not complete


def test_everything_comes_back_from_a_file(tmp_path: Path) -> None:
    model = InputFile("path/to: bert", "hf", "ab" * 32)
    passes = Step("moeify", {"experts": {"*.0": 2, "*": 4}, "only": ["a.*", "yes"]}), Step("lower", {"skip": ["b"]})
    recipe = Recipe(
        passes, 3, "größer: 'x' # y", "00123", InputFile(None, "module", None), model,
        {"a.moe": 0.05, "b.moe": 0.1}, {"*": "max"},
    )  # fmt: skip
    assert surgeon.load_recipe(recipe.save(tmp_path / "r.yaml")) == recipe
    with pytest.raises(SaveError, match=r"r\.yaml exists"):
        recipe.save(tmp_path / "r.yaml")
    recipe.save(tmp_path / "r.yaml", overwrite=True)
    with pytest.raises(SaveError, match="Cannot write"):
        recipe.save(tmp_path / "no" / "r.yaml")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (TEXT.replace("expert_size", "expert_sze"), ["6: moeify has no option 'expert_sze'. Did you mean"]),
        (TEXT.replace("lr: 0.01", "lr: -1"), ["9: moeify: lr is -1, but must be above 0."]),
        (TEXT.replace("lr: 0.01", "lr: yes"), ["9: moeify: lr is True, but must be a number above 0."]),
        (TEXT.replace("target: 5e-2", "target: many"), ["4: sparsify.target=many: "]),
        (TEXT.replace("moeify", "moefy"), ["5: No pass 'moefy'. Did you mean 'moeify'?"]),
        (TEXT.replace("seed: 7", "sed: 7"), ["1: there is no key 'sed'. Did you mean 'seed'?"]),
        (TEXT.replace("seed: 7", "seed: x"), ["1: seed: input should be a valid integer."]),
        (TEXT.replace('"*.0": 8', "*.0: 8"), ["7: this is no YAML: a text that begins with * needs quotes, such as"]),
        (TEXT.replace('["*.0", "*.1"]', "*a"), ["10: this is no YAML: a text that begins with * needs quotes."]),
        (TEXT.replace("      lr: 0.01", "      lr: 0.01\n      lr: 0.02"), ["10: lr stands here twice."]),
        (TEXT.replace("      lr: 0.01", "      experts: 4"), ["5: moeify: "]),
        (TEXT.replace("      lr: 0.01", "      lr: [0.01"), ["10: this is no YAML: "]),
        (TEXT.replace("  - lower:", "  - [lower]"), ["11: a pass is a name, such as '- lower', or a name with"]),
        (TEXT.replace("  - lower:", "  - lower: 3"), ["11: a pass is a name, such as '- lower', or a name with"]),
        (f"tau: 2\n{TEXT}", ["1: tau: input should be less than or equal to 1."]),
        (f"tau: {{'*.0': yes, 'a': x}}\n{TEXT}", ["1: tau.a: input should be a valid number"]),
        (f"rule: top\n{TEXT}", ["1: rule: no selection rule 'top'. There are: max, cumulative"]),
        ("seed: 3\n", ["1: the key 'passes' is missing."]),
        ("- lower\n", ["1: a recipe is a mapping with the key passes"]),
        ("# nothing\n", ["1: the file is empty."]),
        ("passes: moeify,lower\n", ["1: passes: input should be a valid list."]),
        ("passes: [lower]\n---\npasses: [lower]\n", ["2: this is no YAML: "]),
        ("passes: !!python/object/apply:os.system [ls]\n", ["1: "]),
        (f"passes: {'[' * 5000}\n", ["1: this is no YAML: it is nested too deeply."]),
        ("model: {path: 3}\npasses: [lower]\n", ["1: model.path: ", "1: the key 'model.kind' ", "1: the key 'model."]),
        ("passes:\n  - lower\n  - swap-activation\n  - moeify\n", [
            "3: swap-activation must run before lower. Swap the two passes.", "4: moeify must run before lower.",
        ]),
        ("passes:\n  - lower\n  - moeify: {expert: 4}\n", ["3: moeify has no option 'expert'.", "3: moeify must run"]),
        ("seed: 3\npasses: []\n", ["2: no passes. `surgeon passes` lists them."]),
        (TEXT.replace('"*": 4', '"*": many'), ["8: moeify.expert_size={'*': 'many'}: "]),
        (TEXT.replace('"*": 4', '"*": 0'), ["8: moeify: expert_size is 0, but must be at least 1."]),
        (TEXT.replace('["*.0", "*.1"]', '["*.0",\n        3]'), ["11: moeify: only is [3], but must be "]),
        (TEXT.replace("seed: 7", "seed: 2026-13-01"), ["1: this is no YAML: '2026-13-01' has no value."]),
        (TEXT.replace("lr: 0.01", "lr: !!bool maybe"), ["9: this is no YAML: 'maybe' has no value."]),
        (TEXT.replace("  - lower:", "  - lower\0:"), ["11: this is no YAML: it has the character 0x0000."]),
        (
            "passes:\n  - moeify: {expert: 4}\n  - lowr\n  - sparsify: {alpha: -1}\n",
            ["2: moeify has no option 'expert'.", "3: No pass 'lowr'.", "4: sparsify: alpha is -1", "4: sparsify must"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(write: Any, text: str, lines: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        surgeon.load_recipe(write(text))
    found = str(error.value).splitlines()
    assert len(found) == len(lines), found
    assert all(one.startswith(f"r.yaml:{want}") for one, want in zip(found, lines, strict=True)), found


def test_files_that_cannot_be_read(tmp_path: Path, write: Any) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        surgeon.load_recipe("b.yaml")
    with pytest.raises(UsageError, match=r"There is no recipe and no file d2d\. Recipes: recommended, "):
        surgeon.load_recipe("d2d")
    with pytest.raises(UsageError, match=r"d2dmoe depends on the kind of model\. Name one .*: d2dmoe-vit \(vit\), "):
        surgeon.load_recipe("d2dmoe")
    with pytest.raises(UsageError, match="named by its path"):
        surgeon.load_recipe(3)  # type: ignore[arg-type]


OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from surgeon.passes import Lower, option

@dataclass(frozen=True, kw_only=True)
class Mine(Lower):
    """Lower, in a file of one's own."""

    name: ClassVar[str] = "mine"
    works_on: ClassVar[str] = "moe"
    depth: int = option(1, "Nothing.", least=1)
'''


@pytest.mark.parametrize("spec", ["own_pass:Mine", "own_file.py:Mine"])
def test_a_pass_of_ones_own_is_named_by_its_class(write: Any, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(spec.partition(":")[0].removesuffix(".py") + ".py").write_text(OWN, encoding="utf-8")
    recipe = surgeon.load_recipe(write(f"passes:\n  - moeify: {{experts: 4}}\n  - {spec}: {{depth: 2}}\n"))
    surgery = surgeon.Pipeline(recipe.build({"mine": {"depth": 3}})).run(stack("relu"), inputs=vectors())
    step = surgery.recipe.passes[1]
    assert (step.name.rpartition("/")[2], step.options) == (spec, {"depth": 3})
    saved = surgeon.load_recipe(surgery.save("saved"))
    assert saved.build() == surgery.recipe.build()
    for wrong, words in (
        (spec.replace("Mine", "Min"), "has no 'Min'. Did you mean 'Mine'?"),
        (spec.replace("Mine", "option"), "is not a pass"),
        ("nowhere_to_find:Mine", "cannot be imported"),
    ):
        with pytest.raises(UsageError, match=words):
            surgeon.load_recipe(write(f"passes:\n  - moeify\n  - {wrong}\n"))


def test_to_be_written_a_pass_is_not_imported(tmp_path: Path) -> None:
    recipe = Recipe((Step("nowhere_to_find:Mine", {"limit": 2}), Step("lower")))
    text = recipe.text(complete=True)
    assert "  - nowhere_to_find:Mine:\n      limit: 2\n" in text
    with pytest.raises(UsageError, match="cannot be imported"):
        surgeon.load_recipe(recipe.save(tmp_path / "r.yaml"))


def test_the_recipe_of_a_surgery_repeats_it(tmp_path: Path) -> None:
    surgery = surgeon.Pipeline([Moeify(experts=4), Lower()]).run(stack("gelu"), inputs=vectors(), seed=3)
    surgery.set_tau({"*.0.*": 0.05, "*": 0.1})
    recipe = surgery.recipe
    assert (recipe.seed, recipe.rule, recipe.runs) == (3, {"*": "max"}, (2,))
    assert sorted(recipe.tau.values()) == [0.05, 0.1]
    assert surgeon.load_recipe(surgery.save(tmp_path / "a")) == surgeon.load_recipe(tmp_path / "a" / "surgery.json")
    read = surgeon.load_recipe(recipe.save(tmp_path / "r.yaml", complete=True))
    assert read.tau == recipe.tau
    again = surgeon.Pipeline(read.build()).run(stack("gelu"), inputs=vectors(), seed=read.seed or 0)
    surgeon.set_tau(again.graph, read.tau)
    want = surgery.graph.state_dict()
    assert want.keys() == again.graph.state_dict().keys()
    assert all(torch.equal(value, again.graph.state_dict()[name]) for name, value in want.items())


def test_runs_of_a_surgery_that_was_gone_on_from_are_told(tmp_path: Path) -> None:
    surgeon.Pipeline([Moeify(experts=4)]).run(stack("relu"), inputs=vectors()).save(tmp_path / "first")
    second = surgeon.Pipeline([Lower()]).run(surgeon.load(tmp_path / "first"), inputs=vectors())
    assert second.recipe.runs == (1, 1)
    assert "# These passes had 2 runs." in second.recipe.text()
