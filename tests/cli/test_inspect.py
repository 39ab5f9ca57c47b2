"""`surgeon inspect`: sites, shares, refusals, the graph, and the experts of a saved surgery."""

from __future__ import annotations

import re

import pytest

from .harness import NET, Run


def test_inspect_shows_sites_shares_and_refusals(run: Run) -> None:
    result = run("inspect", *NET)
    assert result.code == 0
    assert result.err.splitlines() == ["loading nets:gelu ...", "tracing Net ...", "measuring ..."]
    assert result.out.startswith("nets:gelu  Python function\n")
    assert re.search(r"^2 feed-forward layers  \d+% of the multiply-adds$", result.out, re.MULTILINE)
    assert re.search(r"^  blocks\.0\.mlp +16→64→16 +gelu +\d+%$", result.out, re.MULTILINE)
    assert "refused pooler: tanh between linears 16→16→3 is a pooler" in result.out
    assert re.search(r"^2 standalone linear layers  ", result.out, re.MULTILINE)
    assert re.search(r"^  1 ×  16→16  query +\d", result.out, re.MULTILINE)


def test_inspect_json_has_shares_that_add_up(run: Run) -> None:
    found = run("inspect", *NET, "--output", "json").json
    assert set(found) == {
        "model", "kind", "inputs", "takes", "task", "cost", "ffns", "experts", "skipping", "exits", "halting",
        "linears", "refused", "notes", "graph",
    }  # fmt: skip
    assert found["ffns"][1] == {
        "path": "blocks.1.mlp", "shape": [16, 64, 16], "share": pytest.approx(found["ffns"][0]["share"]),
        "activation": "gelu", "gated": False, "calls": 1,
    }  # fmt: skip
    assert found["inputs"] == {"x": [2, 5, 16]}
    sizes = {name: {"least": 0, "most": None, "multiple": 1} for name in ("batch", "tokens")}
    (taken,) = found["takes"].pop("inputs")
    assert found["takes"] == {"sizes": sizes, "rules": [], "untraced": []}
    assert (taken["name"], taken["shape"], taken["numbers"]) == ("x", ["batch", "tokens", 16], "float")
    assert (taken["optional"], taken["left_out"], taken["must_be"]) == (False, None, None)
    known = sum(layer["share"] for layer in found["ffns"] + found["linears"])
    assert known == pytest.approx(1 - 2 * 16 * 3 / found["cost"]["multiply_adds"])  # the rest is the head
    assert found["graph"] is None


def test_inspect_prints_the_graph_by_module_path(run: Run) -> None:
    result = run("-q", "inspect", *NET, "--graph")
    assert re.search(r"^  blocks\.0\.mlp\.1\n    gelu = gelu\(linear_\d\) : ", result.out, re.MULTILINE)
    assert " for x 2×5×16" in result.out
    assert re.search(r"^  takes +x\[batch, tokens, 16\]; batch 0 or more; tokens 0 or more$", result.out, re.MULTILINE)
    graph = run("-q", "inspect", *NET, "--graph", "--output", "json").json["graph"]
    assert [node["path"] for node in graph if node["name"] == "gelu"] == ["blocks.0.mlp.1"]
    assert set(graph[0]) == {"name", "path", "op", "call", "inputs", "shape"}


def test_inspect_shows_the_experts_of_a_saved_surgery(run: Run) -> None:
    result = run("-q", "inspect", "bert-moe")
    assert re.search(r"^bert-moe  saved surgery, sequence-classification$", result.out, re.MULTILINE)
    assert re.search(r"^  bert\.encoder\.layer\.0\.moe +4 × 8 +dynamic +0 +100% +\d+%$", result.out, re.MULTILINE)
    assert "no feed-forward layer" in result.out  # routers are not taken for one
    assert ".router" not in result.out
