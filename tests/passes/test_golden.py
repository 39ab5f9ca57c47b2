"""One golden graph per pass: the rewritten graph by module path. `pytest --update-golden` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.graph.snapshot import Snapshot, snapshot
from surgeon.passes import Lower, Mlpify, Moeify, Pass, Sparsify, SwapActivation
from surgeon.passes.registry import all_passes
from tests.small_models import WIDTH, Function, Fused, Gated, Plain

# A feed-forward layer behind a linear one, the pass, and what runs before it.
GOLDEN: dict[str, tuple[Callable[[], nn.Module], list[Pass[Any]]]] = {
    "swap-activation": (lambda: Plain(dropout=0.1), [SwapActivation()]),
    "sparsify": (Fused, [Sparsify()]),
    "mlpify": (Plain, [Mlpify(dropout=0.1)]),
    "moeify": (Gated, [Moeify(experts=4, router_width=8)]),
    "lower": (Gated, [Moeify(experts=4, router_width=8), Lower()]),
}
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def test_every_pass_has_one() -> None:
    assert set(GOLDEN) == set(all_passes()) - {"recover"}, "recover changes weights only"


def as_text(taken: Snapshot) -> str:
    lines, path = [], None
    for place, text in taken.nodes.values():
        if place != path:
            path = place
            lines.append(f"{path or '(model)'}:")
        lines.append(f"    {text}")
    lines += ["parameters:", *(f"    {name} {list(shape)}" for name, shape in sorted(taken.parameters.items()))]
    return with_plain_sizes("\n".join(lines))


def with_plain_sizes(text: str) -> str:
    """Dynamic sizes as n0, n1, ... in order of appearance: export numbers them as it likes."""
    names: dict[str, str] = {}
    return re.sub(r"\b[su]\d+\b", lambda match: names.setdefault(match[0], f"n{len(names)}"), text)


@pytest.mark.parametrize("name", GOLDEN)
def test_rewritten_graph(name: str, golden: Callable[[str, str], None]) -> None:
    ffn, passes = GOLDEN[name]
    model = Function(lambda m, x: m.ffn(torch.softmax(m.mix(x), -1)), mix=(WIDTH, WIDTH), ffn=ffn())
    graph = surgeon.trace(model.eval(), X)
    for one in passes:
        one.apply(graph, inputs=X)
    golden(name, as_text(snapshot(graph)))
