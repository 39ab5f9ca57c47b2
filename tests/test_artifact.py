"""Saved and loaded: the same graph in any process, whole or not at all, and refused when it is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.artifact import DIFF, MODEL, RECORD, load, load_diff, load_inputs, read_record, save
from surgeon.errors import LoadError, PassError, SaveError
from surgeon.graph import TracedGraph
from surgeon.moe import find_moes, get_tau, set_tau
from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation
from surgeon.pipeline import Origin, Pipeline, Surgery
from surgeon.recipe import build
from tests.models import labelled_vectors, stack, vectors

FORMS = {"masked": [Moeify(experts=4, router_width=8)], "dynamic": [Moeify(experts=4, router_width=8), Lower()]}


@pytest.fixture(scope="module")
def surgeries() -> dict[str, Surgery]:
    """A small model with experts, before and after lowering, with one tau for each layer."""
    made = {}
    for form, passes in FORMS.items():
        made[form] = Pipeline(passes).run(stack("gelu"), inputs=vectors(), data=labelled_vectors(1), seed=5)
        made[form].set_tau({"blocks.0.ffn": 0.25, "blocks.1.ffn": 0.5})
    return made


@pytest.fixture(scope="module")
def saved(surgeries: dict[str, Surgery], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("saved")
    return {form: surgery.save(place / form) for form, surgery in surgeries.items()}


forms = pytest.mark.parametrize("form", FORMS)


# --- there and back ---------------------------------------------------------------------------------------------------


@forms
def test_loaded_graph_is_the_saved_one(surgeries: dict[str, Surgery], saved: dict[str, Path], form: str) -> None:
    graph, original = load(saved[form]), surgeries[form].graph
    assert isinstance(graph, TracedGraph)
    assert not graph.training
    assert get_tau(graph) == {"blocks.0.ffn.moe": 0.25, "blocks.1.ffn.moe": 0.5}
    assert {site.form for site in find_moes(graph)} == {form}
    assert set(graph.state_dict()) == set(original.state_dict())
    for batch, length in ((3, 7), (1, 2), (5, 11)):
        inputs = vectors(batch, length)
        assert torch.allclose(graph(**inputs), original.eval()(**inputs), atol=1e-6)
    assert graph.meta["trace"].form == "train"
    assert graph.meta["surgery"]["seed" if "seed" in graph.meta["surgery"] else "recipe"]


@forms
def test_tau_can_be_set_after_loading(saved: dict[str, Path], form: str) -> None:
    graph, inputs = load(saved[form]), vectors()
    before = graph(**inputs)
    assert set_tau(graph, 1.0, "blocks.1.ffn") == ["blocks.1.ffn.moe"]
    assert not torch.allclose(graph(**inputs), before, atol=1e-6)
    set_tau(graph, 0.0)
    assert torch.allclose(graph(**inputs), stack("gelu")(**inputs), atol=1e-5)


@forms
def test_modes_switch_after_loading(saved: dict[str, Path], form: str) -> None:
    graph, inputs = load(saved[form]), vectors()
    assert not torch.equal(graph.train()(**inputs), graph(**inputs))
    assert torch.equal(graph.eval()(**inputs), graph(**inputs))
    graph.train()(**inputs).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in graph.parameters())


def test_masked_experts_can_be_lowered_after_loading(surgeries: dict[str, Surgery], saved: dict[str, Path]) -> None:
    graph = load(saved["masked"])
    want = graph(**vectors())
    report = Lower().apply(graph, inputs=vectors())
    assert report.matched == ["blocks.0.ffn.moe", "blocks.1.ffn.moe"]
    assert torch.allclose(graph(**vectors()), want, atol=1e-5)


@forms
def test_a_loaded_graph_can_be_saved_again(saved: dict[str, Path], tmp_path: Path, form: str) -> None:
    graph = load(saved[form])
    surgery = Surgery(graph, [], vectors(), [surgeon.diff.snapshot(graph)])
    again = load(save(surgery, tmp_path / "again"))
    assert get_tau(again) == get_tau(graph)
    assert torch.allclose(again(**vectors(4)), graph(**vectors(4)), atol=1e-6)


def test_shared_experts_stay_one(traces: Any, tmp_path: Path) -> None:
    surgery = Pipeline([*FORMS["dynamic"]]).run(traces("stack:shared"), inputs=vectors())
    graph = load(surgery.save(tmp_path / "shared"))
    (site,) = find_moes(graph)
    assert len(site.nodes) == 2
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in surgery.graph.parameters())


def test_tied_weights_are_one_parameter_again(tmp_path: Path) -> None:
    model = stack()
    model.blocks[1].mix.weight = model.blocks[0].mix.weight
    surgery = Pipeline([Moeify(experts=4)]).run(model, inputs=vectors())
    graph = load(surgery.save(tmp_path / "tied"))
    assert len(list(graph.parameters())) == len({p.data_ptr() for p in graph.parameters()})
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in surgery.graph.parameters())


def test_batch_of_one_in_the_example_stays_dynamic(tmp_path: Path) -> None:
    model = stack("relu", layers=1)
    surgery = Pipeline([Moeify(experts=4)]).run(model, inputs=vectors(1))
    graph = load(surgery.save(tmp_path / "one"))
    assert torch.allclose(graph(**vectors(4)), model(**vectors(4)), atol=1e-5)


def test_sparsity_taps_are_gone_after_saving(traces: Any, tmp_path: Path) -> None:
    surgery = Pipeline([Sparsify()]).run(traces("stack:relu"), inputs=vectors())
    graph = load(surgery.save(tmp_path / "tapped"))
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    assert torch.allclose(graph(**vectors()), surgery.graph(**vectors()), atol=1e-6)
    assert Moeify(experts=4).apply(graph, inputs=vectors()).matched == ["blocks.0.ffn", "blocks.1.ffn"]


def test_saving_leaves_the_graph_as_it_was(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    graph = surgeries["masked"].graph
    for mode in (True, False):
        graph.train(mode)
        code = graph.code
        state = {name: value.clone() for name, value in graph.state_dict().items()}
        surgeries["masked"].save(tmp_path / str(mode))
        assert graph.training == mode
        assert graph.code == code
        assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    graph.eval()


READER = """
import json, sys, torch, surgeon
output = surgeon.load(sys.argv[2])(**torch.load(sys.argv[1]))
print(json.dumps({"class": type(output).__name__, "logits": output.logits.tolist()}))
"""


def test_hugging_face_model_in_a_fresh_process(traces: Any, tmp_path: Path) -> None:
    """Its output class comes back without the model's code having been imported."""
    model, inputs, _ = traces.pair("vit")
    torch.save(inputs, tmp_path / "inputs.pt")
    surgery = Pipeline(FORMS["dynamic"]).run(traces("vit"), inputs=inputs, origin=Origin(config=model.config))
    place = surgery.save(tmp_path / "moe")
    assert (place / "config.json").exists()
    command = [sys.executable, "-c", READER, str(tmp_path / "inputs.pt"), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["class"] == "ImageClassifierOutput"
    assert torch.allclose(torch.tensor(got["logits"]), surgery.graph(**inputs).logits, atol=1e-5)


# --- the record -------------------------------------------------------------------------------------------------------


def test_record(saved: dict[str, Path]) -> None:
    record = json.loads(
        (saved["dynamic"] / RECORD).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert record["schema"] == 1
    assert set(record["versions"]) == {"surgeon", "torch", "transformers", "python"}
    assert record["input"] == {"path": None, "kind": "module", "sha256": None}
    assert record["recipe"]["seed"] == 5
    assert record["recipe"]["data"]
    assert [one["name"] for one in record["passes"]] == ["moeify", "lower"]
    assert record["passes"][0]["matched"] == ["blocks.0.ffn", "blocks.1.ffn"]
    assert record["experts"] == [
        {"path": f"blocks.{b}.ffn.moe", "experts": 4, "form": "dynamic", "expert_shape": [8, 16]} for b in (0, 1)
    ]
    assert record["tau"] == {"blocks.0.ffn.moe": 0.25, "blocks.1.ffn.moe": 0.5}
    assert record["trace"]["form"] == "train"


def test_recipe_in_the_record_builds_the_same_passes(saved: dict[str, Path]) -> None:
    recipe = read_record(saved["dynamic"])["recipe"]
    names = [one["name"] for one in recipe["passes"]]
    assert build(names, {one["name"]: one["options"] for one in recipe["passes"]}) == FORMS["dynamic"]


def test_the_record_repeats_the_surgery(saved: dict[str, Path]) -> None:
    recipe = read_record(saved["masked"])["recipe"]
    passes = build([one["name"] for one in recipe["passes"]], {one["name"]: one["options"] for one in recipe["passes"]})
    again = Pipeline(passes).run(stack("gelu"), inputs=vectors(), data=labelled_vectors(1), seed=recipe["seed"])
    graph = load(saved["masked"])
    for name, value in again.graph.state_dict().items():
        if not name.endswith("tau"):
            assert torch.equal(graph.state_dict()[name], value), name


def test_origin_is_recorded(traces: Any, tmp_path: Path) -> None:
    origin = Origin(path="model.pt2", kind="pt2", sha256="abc")
    surgery = Pipeline([SwapActivation()]).run(traces("stack:gelu"), inputs=vectors(), origin=origin)
    assert read_record(surgery.save(tmp_path / "a"))["input"] == {"path": "model.pt2", "kind": "pt2", "sha256": "abc"}


def test_diff_comes_back(surgeries: dict[str, Surgery], saved: dict[str, Path]) -> None:
    assert load_diff(saved["dynamic"]) == surgeries["dynamic"].diff()


def test_inputs_come_back(saved: dict[str, Path]) -> None:
    args, kwargs = load_inputs(saved["dynamic"])
    assert args == ()
    assert set(kwargs) == {"x"}
    assert torch.equal(kwargs["x"], vectors()["x"])


# --- refused directories ----------------------------------------------------------------------------------------------


def listing(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_an_empty_directory_is_used(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    surgeries["masked"].save(tmp_path / "empty")
    assert listing(tmp_path) == ["empty", f"empty/{DIFF}", f"empty/{MODEL}", f"empty/{RECORD}"]


def test_parents_are_made(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    assert load(surgeries["masked"].save(tmp_path / "a" / "b" / "c"))


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_content_is_never_overwritten(surgeries: dict[str, Surgery], tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    with pytest.raises(SaveError, match="holds something else than a saved surgery" if overwrite else "not empty"):
        surgeries["masked"].save(tmp_path / "thesis", overwrite=overwrite)
    assert listing(tmp_path) == ["thesis", "thesis/text.tex"]


def test_a_file_is_not_overwritten(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    with pytest.raises(SaveError, match=r"is a file\. Give a directory"):
        surgeries["masked"].save(tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "a"


def test_a_saved_surgery_is_overwritten_when_asked(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    place = surgeries["masked"].save(tmp_path / "a")
    with pytest.raises(SaveError, match="exists and is not empty"):
        surgeries["dynamic"].save(place)
    assert {site.form for site in find_moes(load(place))} == {"masked"}
    surgeries["dynamic"].save(place, overwrite=True)
    assert {site.form for site in find_moes(load(place))} == {"dynamic"}
    assert listing(tmp_path) == ["a", f"a/{DIFF}", f"a/{MODEL}", f"a/{RECORD}"]


def test_without_inputs_nothing_can_be_saved(traces: Any, tmp_path: Path) -> None:
    surgery = Pipeline([SwapActivation()]).run(traces("stack:gelu"))
    with pytest.raises(PassError, match="inputs"):
        surgery.save(tmp_path / "a")
    assert listing(tmp_path) == []


# --- failures while saving --------------------------------------------------------------------------------------------


def test_no_space(surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(SaveError, match=r"Cannot write .*a: No space left.*|.*MB needed"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_is_left_when_writing_fails(
    surgeries: dict[str, Surgery],
    saved: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    overwrite: bool,
) -> None:
    place = tmp_path / "a"
    if overwrite:
        shutil.copytree(saved["masked"], place)
    before = listing(tmp_path)

    def fail(program: Any, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SaveError):
        surgeries["dynamic"].save(place, overwrite=overwrite)
    assert listing(tmp_path) == before
    if overwrite:
        assert {site.form for site in find_moes(load(place))} == {"masked"}


def test_the_old_one_stays_when_the_new_one_cannot_take_its_place(
    surgeries: dict[str, Surgery], saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a"
    shutil.copytree(saved["masked"], place)
    original = Path.rename

    def rename(self: Path, target: Any) -> Any:
        if Path(target) == place and not self.name.endswith(".old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(SaveError):
        surgeries["dynamic"].save(place, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {site.form for site in find_moes(load(place))} == {"masked"}


def test_no_permission(surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(SaveError, match=r"Cannot write .*Permission denied"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []


def test_a_program_that_differs_is_not_saved(
    surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.artifact.relative_error", lambda actual, expected: 0.5)
    with pytest.raises(SaveError, match=r"differs from the graph by 5.0e-01 relative; nothing was saved"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []


def test_a_graph_that_cannot_be_exported(
    surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(torch.export, "export", fail)
    graph = surgeries["masked"].graph.train()
    with pytest.raises(SaveError, match="cannot be exported: not today"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []
    assert graph.training
    graph.eval()


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["dynamic"], tmp_path / "copy"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def with_record(copy: Path, **changes: Any) -> None:
    record = json.loads((copy / RECORD).read_text())
    record.update(changes)
    (copy / RECORD).write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def retold(copy: Path) -> None:
    """Let the record tell the hash of the damaged model: then torch itself must refuse it."""
    (copy / MODEL).write_bytes((copy / MODEL).read_bytes()[:1000])
    with_record(copy, model_sha256=surgeon.checkpoint.sha256_of([copy / MODEL]))


DAMAGES: dict[str, tuple[Any, str]] = {
    "model_flipped": (lambda c: flip(c / MODEL), "is damaged or was changed"),
    "model_truncated": (
        lambda c: (c / MODEL).write_bytes((c / MODEL).read_bytes()[:-100]),
        "is damaged or was changed",
    ),
    "model_empty": (lambda c: (c / MODEL).write_bytes(b""), "is damaged or was changed"),
    "model_missing": (lambda c: (c / MODEL).unlink(), f"has no {MODEL}: the saved surgery is incomplete"),
    "model_no_program": (retold, MODEL),
    "record_missing": (lambda c: (c / RECORD).unlink(), f"is no saved surgery: it has no {RECORD}"),
    "record_truncated": (lambda c: (c / RECORD).write_text((c / RECORD).read_text()[:100]), "is damaged"),
    "record_binary": (lambda c: (c / RECORD).write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "record_a_list": (lambda c: (c / RECORD).write_text("[1, 2]"), "is damaged"),
    "record_without_schema": (lambda c: (c / RECORD).write_text("{}"), "is damaged"),
    "record_without_key": (lambda c: with_record(c, trace=...), "is damaged: it has no trace"),
    "record_with_wrong_type": (lambda c: with_record(c, trace={}), "is damaged"),
    "record_newer": (lambda c: with_record(c, schema=99), "has schema 99, this version reads schema 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(copy: Path, damage: str) -> None:
    harm, words = DAMAGES[damage]
    harm(copy)
    with pytest.raises(LoadError, match=words):
        load(copy)


def test_damaged_diff(copy: Path) -> None:
    (copy / DIFF).write_text("{")
    with pytest.raises(LoadError, match=DIFF):
        load_diff(copy)
    (copy / DIFF).write_text("[]")
    with pytest.raises(LoadError, match=DIFF):
        load_diff(copy)
    assert load(copy)  # the graph does not need it


def test_output_modules_of_others_are_not_imported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_record(copy, output_modules=["evil"])
    assert load(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no saved surgery"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("a")
    with pytest.raises(LoadError):
        load(tmp_path / "file")
