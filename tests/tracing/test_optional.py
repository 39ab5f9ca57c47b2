"""What is optional in a model is optional in its graph, and means the same."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import surgeon
from surgeon.errors import SizeError, UsageError
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph, fork
from surgeon.passes import Moeify
from surgeon.tracing.quiet import quiet
from tests.small_models import VOCABULARY, WIDTH, hugging_face, tokens


def fills(graph: TracedGraph) -> dict[str, str]:
    return {given.name: given.fill for given in Sizes.parse(graph.meta["trace"].sizes).inputs}


def same(graph: nn.Module, model: nn.Module, **inputs: Any) -> bool:
    found, expected = (call_reproducibly(part, (), inputs) for part in (graph, model))
    # A model also returns its cache.
    return relative_error(getattr(found, "logits", found), getattr(expected, "logits", expected)) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_a_missing_mask(traces: Any, name: str) -> None:
    (model, inputs, _), graph = traces.pair(name), traces(name)
    assert fills(graph)["attention_mask"] == "ones"
    given = {key: value[:2, :4] for key, value in inputs.items() if key != "attention_mask"}
    assert same(graph, model, **given)
    assert same(graph, model, **given, attention_mask=None, labels=None, return_dict=True, use_cache=False)
    assert not same(lambda **g: graph(**inputs), model, **{**inputs, "attention_mask": None})  # type: ignore[arg-type]


def test_every_input_of_bert_has_its_own_stand_in() -> None:
    model, inputs = hugging_face("bert")
    places = torch.arange(7).expand(3, 7).contiguous()
    inputs |= {"token_type_ids": torch.ones(3, 7, dtype=torch.int64).tril(), "position_ids": places}
    graph = surgeon.trace(model, inputs).eval()
    assert list(fills(graph).values()) == ["", "ones", "zeros", "positions"]
    for left_out in ({"attention_mask"}, {"token_type_ids", "position_ids"}, inputs.keys() - {"input_ids"}):
        assert same(graph, model, **{name: value for name, value in inputs.items() if name not in left_out})


class Odd(nn.Module):
    """Computes without a mask what no simple mask gives, or makes its mask from padding."""

    def __init__(self, from_padding: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.from_padding = from_padding
        self.config = hf.PretrainedConfig(pad_token_id=0)

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 2.0, add: float | None = None) -> Tensor:
        if mask is None:
            mask = (ids != 0).long() if self.from_padding else 3 * torch.ones_like(ids)
        return self.table(ids) * mask[..., None] * scale + (0.0 if add is None else add)


@pytest.mark.parametrize("from_padding", [False, True])
def test_what_nothing_stands_for_is_needed(from_padding: bool) -> None:
    ids = torch.randint(1, VOCABULARY, (3, 7))
    graph = surgeon.trace(Odd(from_padding).eval(), {"ids": ids, "mask": torch.ones_like(ids)})
    assert fills(graph)["mask"] == "needed"
    assert any(note.startswith("The graph needs mask, although") for note in graph.meta["trace"].notes)
    for missing in ({}, {"mask": None}):
        with pytest.raises(SizeError, match="mask is missing, and nothing that could stand for it"):
            graph(ids=ids, **missing)


def test_constants() -> None:
    model, ids = Odd().eval(), torch.randint(1, VOCABULARY, (3, 7))
    mask = torch.ones_like(ids)
    graph = surgeon.trace(model, {"ids": ids, "mask": mask, "scale": 2.0, "add": 0.0})
    assert list(fills(graph).values()) == ["", "needed", "missing", "None"]
    assert same(graph, model, ids=ids, mask=mask)
    assert same(graph, model, ids=ids, mask=mask, scale=2.0, add=None)
    with pytest.raises(SizeError, match=r"scale is None, but the graph was traced with 2\.0"):
        graph(ids=ids, mask=mask, scale=None)
    other = surgeon.trace(model, {"ids": ids, "mask": mask, "scale": 3.0, "add": 1.0})
    assert list(fills(other).values()) == ["", "needed", "needed", "needed"]
    with pytest.raises(SizeError, match=r"scale is None, but the graph was traced with 3\.0"):
        other(ids=ids, mask=mask, add=1.0)
    short = surgeon.trace(model, (ids, mask))
    assert Sizes.parse(short.meta["trace"].sizes).untraced == {"scale": (2,), "add": (None,)}


def test_flags_are_those_at_which_the_model_computes_the_same() -> None:
    model, inputs = hugging_face("bert")
    graph = surgeon.trace(model, {**inputs, "return_dict": False}).eval()
    sizes = Sizes.parse(graph.meta["trace"].sizes)
    assert sizes.untraced["output_attentions"] == (None, False)
    assert "return_dict" not in sizes.untraced
    with pytest.raises(SizeError, match="return_dict is True"):
        graph(**inputs, return_dict=True)
    with pytest.raises(SizeError, match="return_dict is None, but the graph was traced with False"):
        graph(**inputs)
    with pytest.raises(UsageError, match="output_attentions is True, but the graph was traced without it"):
        graph(**inputs, return_dict=False, output_attentions=True)


def test_a_cache_that_was_asked_for_is_optional_too() -> None:
    model, inputs = hugging_face("gpt2")
    graph = surgeon.trace(model, {**inputs, "use_cache": True}).eval()
    for use_cache in ({}, {"use_cache": None}, {"use_cache": True}, {"use_cache": False}):
        assert same(graph, model, input_ids=inputs["input_ids"], **use_cache)


@pytest.mark.parametrize("way", ["fork", "copy", "plain module", "compile", "export", "export strictly", "saved"])
def test_it_goes_along(traces: Any, way: str, tmp_path: Path) -> None:
    model, graph = traces.pair("gpt2")[0], traces("gpt2")
    ids = tokens(2, 6)["input_ids"]
    with quiet():
        made: Any
        if way == "fork":
            made = fork(graph)
        elif way == "copy":
            made = copy.deepcopy(graph)
        elif way == "plain module":
            made = torch.fx.GraphModule(graph, graph.graph)
        elif way == "compile":
            made = torch.compile(graph, backend="eager", fullgraph=True)
        elif way == "saved":
            made = surgeon.Pipeline([Moeify(experts=4)]).run(graph, inputs=tokens()).save(tmp_path / "saved")
            made = surgeon.load(tmp_path / "saved")
        else:
            made = torch.export.export(graph, (), {"input_ids": ids}, strict=way == "export strictly").module()
    assert same(made, model, input_ids=ids)
    if "export" not in way:
        assert same(made, model, input_ids=ids[:, :3], attention_mask=None, labels=None)
        with pytest.raises(Exception, match="the graph was traced without"):
            made(input_ids=ids, labels=ids)


def test_the_signature_is_that_of_the_model(traces: Any) -> None:
    model, graph = traces.pair("gpt2")[0], traces("gpt2")
    names = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    found = inspect.signature(graph.forward).parameters
    assert set(names) <= set(found)
    assert [name for name, parameter in found.items() if parameter.default is parameter.empty] == ["input_ids"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        graph(input_ids=torch.ones(1, 2, dtype=torch.int64), nonsense=1)


def test_an_export_with_names_refuses_what_was_not_traced(traces: Any) -> None:
    graph, ids = traces("bert"), tokens(2, 6)["input_ids"]
    with quiet(), pytest.raises(UsageError, match="labels is a tensor"):
        torch.export.export(graph, (), {"input_ids": ids, "labels": ids.clone()})
    with quiet():
        program = torch.export.export(graph, (), {"input_ids": ids, "labels": None, "return_dict": True}).module()
    assert same(lambda **given: program(**given, labels=None, return_dict=True), graph, input_ids=ids)  # type: ignore[arg-type]
