"""One golden file per pass: a small graph before and after it, line by line.

`pytest --update-golden` writes them anew, and one for a new pass: it runs with its defaults on a linear layer and a
feed-forward layer, after moeify if it works on experts. A pass that works on blocks or streams runs on a stack of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import surgeon
from surgeon.graph.snapshot import snapshot
from surgeon.graph.traced import TracedGraph
from surgeon.passes import Pass
from surgeon.passes.registry import all_passes
from tests.conftest import GOLDEN
from tests.small_models import WIDTH, Function, Gated, Plain, stack

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def model(gated: bool) -> torch.nn.Module:
    ffn = Gated(hidden=64) if gated else Plain(hidden=64)
    return Function(lambda m, x: m.ffn(torch.softmax(m.mix(x), -1)), mix=(WIDTH, WIDTH), ffn=ffn).eval()


# Of passes that others need: refit works on layers that skip something.
OPTIONS: dict[str, dict[str, Any]] = {"sparsify-inputs": {"tau": 0.5}}
# Passes that change a gated layer alone.
GATED = ("sparsify-neurons",)


def needs(one: type[Pass[Any]]) -> list[str]:
    """The passes that leave behind what this one works on, where a model has none."""
    if one.works_on not in ("moe", "dynamic"):
        return []
    makers = [(name, other) for name, other in all_passes().items() if other.makes in ("moe", one.works_on)]
    return [name for name, other in makers if other.works_on != "block" and name not in GATED]


def as_text(graph: TracedGraph) -> str:
    """Each step behind the module it belongs to, what is returned, and the parameters with their shapes."""
    taken = snapshot(graph)
    steps = [(node.path or "(the model)", node.text) for node in taken.nodes.values()]
    steps.append(("", f"return {', '.join(node.name for node in graph.graph.output_node().all_input_nodes)}"))
    width = max(len(path) for path, _ in steps)
    lines = [f"{path:{width}}  {text}" for path, text in steps]
    lines += ["", *(f"{name} [{', '.join(map(str, shape))}]" for name, shape in sorted(taken.parameters.items()))]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def with_plain_sizes(text: str) -> str:
    """Dynamic sizes as n0, n1, ... in order of appearance: export numbers them as it likes."""
    names: dict[str, str] = {}
    return re.sub(r"\b[su]\d+\b", lambda match: names.setdefault(match[0], f"n{len(names)}"), text)


@pytest.mark.parametrize("name", all_passes())
def test_graph_before_and_after(name: str, golden: Callable[[str, str], None]) -> None:
    stacks = {"block": stack, "stream": lambda: stack("pre-norm", 1)}
    graph = surgeon.trace(stacks.get(all_passes()[name].works_on, lambda: model(name in GATED))(), X)
    first = needs(all_passes()[name])
    for earlier in first:
        all_passes()[earlier](**OPTIONS.get(earlier, {})).apply(graph, inputs=X)
    before = as_text(graph)
    report = all_passes()[name]().apply(graph, inputs=X)
    assert report.matched, "the pass changes nothing here: give the model what it works on"
    for change in report.sites:
        for words, which in ((change.before, 0), (change.after, 1)):
            assert change.facts["kind"][which]
            said = set(re.findall(r"\d+", words))
            known = " ".join(str(fact[which]) for fact in change.facts.values())
            assert said <= set(re.findall(r"\d+", known)), (words, change.facts)
    after = as_text(graph)
    title = f"passes: {' '.join([*first, name])}"
    same = "    the same graph" if after == before else after
    golden(name, with_plain_sizes(f"{title}\n\nbefore {name}:\n{before}\n\nafter {name}:\n{same}"))


def test_every_file_is_of_a_pass() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(all_passes())
