"""Saved and loaded: the same graph, also in another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import SizeError
from surgeon.graph.agreement import relative_error
from surgeon.graph.snapshot import snapshot
from surgeon.graph.traced import TracedGraph
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify, Sparsify
from surgeon.surgery.artifact import DIFF, MODEL, load
from surgeon.surgery.origin import Origin
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.record import RECORD, read_record, record_of
from surgeon.surgery.surgery import Surgery
from tests.cli.harness import run_surgeon
from tests.small_models import WIDTH, Plain, Wrapped, stack, vectors
from tests.surgery.forms import FORMS, forms


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
    assert record_of(graph) == read_record(saved[form])


@forms
def test_tau_can_be_set_after_loading(saved: dict[str, Path], form: str) -> None:
    graph, inputs = load(saved[form]), vectors()
    before = graph(**inputs)
    assert set_tau(graph, 1.0, "blocks.1.ffn") == ["blocks.1.ffn.moe"]
    assert not torch.allclose(graph(**inputs), before, atol=1e-6)
    set_tau(graph, 0.0)
    assert torch.allclose(graph(**inputs), stack("gelu")(**inputs), atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the system's list of maps")
@forms
def test_weights_stay_in_the_file_until_they_are_written_to(saved: dict[str, Path], tmp_path: Path, form: str) -> None:
    place = Path(shutil.copytree(saved[form], tmp_path / "copy"))
    content = (place / MODEL).read_bytes()
    graph, inputs = load(place), vectors()
    tensors = [*graph.parameters(), *graph.buffers()]
    starts = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        range(*(int(end, 16) for end in addresses.split("-")))
        for addresses, permissions, *_, path in (line for line in maps if len(line) == 6)
        if path == str(place / MODEL) and permissions == "rw-p"
    ]
    assert all(any(start in one for one in mapped) for start in starts)
    # What is saved or freed is a whole storage.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.mul_(2.0)
    assert not torch.allclose(graph(**inputs), load(place)(**inputs), atol=1e-3)
    assert (place / MODEL).read_bytes() == content


@forms
def test_is_saved_over_what_it_was_loaded_from(saved: dict[str, Path], tmp_path: Path, form: str) -> None:
    place = Path(shutil.copytree(saved[form], tmp_path / "copy"))
    graph, inputs = load(place), vectors()
    want = load(saved[form])(**inputs)
    assert run_surgeon("set", str(place), "--tau", "0").code == 0
    shutil.rmtree(place)
    assert torch.equal(graph(**inputs), want)  # the file goes when nothing maps it any more


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
    surgery = Surgery(graph, [], vectors(), [snapshot(graph)])
    again = load(surgery.save(tmp_path / "again"))
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


PLAIN_READER = """
import sys, torch, surgeon.kernels.dynamic_k
assert "surgeon.moe.module" not in sys.modules
program = torch.export.load(sys.argv[2])
print(program.module()(**torch.load(sys.argv[1])).tolist())
"""


def test_torch_alone_reads_it_once_the_operators_are_registered(tmp_path: Path) -> None:
    """Serving needs the kernels and nothing else of this package."""
    x = torch.randn(2, 5, WIDTH)
    torch.save({"x": x}, tmp_path / "inputs.pt")
    model = Wrapped(Plain(dropout=0.0)).eval()
    surgery = Pipeline([Moeify(experts=4, rule="energy"), Lower()]).run(model, inputs={"x": x}).set_tau(0.5)
    place = surgery.save(tmp_path / "moe")
    command = [sys.executable, "-c", PLAIN_READER, str(tmp_path / "inputs.pt"), str(place / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(got, surgery.graph(x), atol=1e-5)


WRITER = """
import sys, torch
from tests.surgery.conftest import converted
torch.set_num_threads(1)
converted("dynamic").save(sys.argv[1] + "/dynamic")
"""


def measured_in(record: Any) -> list[str]:
    """Replace all durations and rounding errors of a record by zero; return where they were.

    The rounding of a matrix product depends on where its operands lie in memory.
    """
    found = []
    if isinstance(record, dict | list):
        for key, value in list(record.items()) if isinstance(record, dict) else enumerate(record):
            if key == "seconds" or (key == "max_error" and value < 1e-6):
                record[key] = 0.0
                found.append(key)
            found += measured_in(value)
    return found


def test_another_process_in_another_directory_writes_the_same_bytes(saved: dict[str, Path], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment | {"PYTHONHASHSEED": "11"})
    places = (saved["dynamic"], tmp_path / "dynamic")
    assert (places[0] / MODEL).read_bytes() == (places[1] / MODEL).read_bytes()
    for file in (RECORD, DIFF):
        first, second = (json.loads((place / file).read_text()) for place in places)
        assert measured_in(first) == measured_in(second) != []
        assert first == second, file


def test_no_local_paths_are_saved(saved: dict[str, Path]) -> None:
    content = (saved["dynamic"] / MODEL).read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


def test_texts_in_the_output_come_back(tmp_path: Path) -> None:
    class Tagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {**features, "y": self.down(torch.relu(self.up(features["x"])))}

    features = {"x": torch.randn(2, 8), "kind": "text"}
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(Tagged().eval(), inputs=(features,))
    surgery.save(tmp_path / "saved")
    loaded = surgeon.load(tmp_path / "saved")
    want, got = surgery.graph.eval()(features), loaded(features)
    assert got["kind"] == want["kind"] == "text"
    assert torch.allclose(got["y"], want["y"], atol=1e-6)
    with pytest.raises(SizeError, match="features_kind is 'image', but the graph was traced with 'text'"):
        loaded({"x": torch.randn(2, 8), "kind": "image"})


@pytest.mark.parametrize("tokens", [1, 6])
def test_sizes_of_the_graph_are_saved(tmp_path: Path, tokens: int) -> None:
    """Also if the example inputs of the save have a size of 1, which torch.export fixes."""

    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x[:, -9:] if x.shape[1] > 9 else x)))

    model = Cropped().eval()
    graph = surgeon.trace(model, torch.randn(2, 6, 8))
    surgery = Pipeline([Moeify(experts=4)]).run(graph, inputs=(torch.randn(1, tokens, 8),))
    surgery.save(tmp_path / "saved")
    loaded = surgeon.load(tmp_path / "saved")
    assert loaded.meta["trace"].sizes == graph.meta["trace"].sizes
    for batch, length in ((1, 1), (3, 9), (0, 4)):
        x = torch.randn(batch, length, 8)
        assert relative_error(loaded(x), model(x)) < 1e-5
    with pytest.raises(SizeError, match="takes tokens: 0 to 9"):
        loaded(torch.randn(2, 10, 8))
