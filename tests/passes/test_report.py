"""Reports: what the dense layers cost that layers with experts stand in for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgeon
from surgeon.measure.meter import measure
from surgeon.moe.site import find_moes
from surgeon.passes import Mlpify, Moeify
from surgeon.passes.report import PassReport, SiteChange, dense_layers


def report(name: str, *changes: tuple[str, tuple[str, ...], tuple[int, int]]) -> PassReport:
    """Of changes given as path, what was made there, and multiply-adds before and after."""
    sites = tuple(SiteChange(path, "", "", (0, 0), cost, ("", ""), made=made) for path, made, cost in changes)
    return PassReport(name, {}, [site.path for site in sites], [], sites)


@pytest.mark.parametrize("fused_first", [True, False])
def test_every_layer_counts_as_what_was_there_at_its_own_ratio(fused_first: bool) -> None:
    """The parts of a fused layer, a layer under the module that holds them, and one there that was not replaced."""
    replaced = [
        ("attn", ("attn.projection_mlp_q", "attn.projection_mlp_k"), (300, 900)),
        ("attn.out", ("attn.out.projection_mlp",), (100, 800)),
    ]
    mlpify = report("mlpify", *(replaced if fused_first else replaced[::-1]))
    split = (
        ("attn.projection_mlp_q", ("attn.projection_mlp_q.moe",), (300, 330)),
        ("attn.projection_mlp_k", ("attn.projection_mlp_k.moe",), (600, 630)),
        ("attn.out.projection_mlp", ("attn.out.projection_mlp.moe",), (800, 880)),
        ("attn.ffn", ("attn.ffn.moe",), (50, 60)),
        ("attn.projection_mlp", ("attn.projection_mlp.moe",), (70, 80)),  # a user's own
    )
    # Lowered, experts stay where they are.
    lower = report("lower", *((f"{path}.moe", made, (cost, cost)) for path, made, (_, cost) in split))
    found = dense_layers([mlpify, report("moeify", *split), lower])
    assert {path: cost for path, cost in found.items() if path.endswith(".moe")} == {
        "attn.projection_mlp_q.moe": pytest.approx(100),
        "attn.projection_mlp_k.moe": pytest.approx(200),
        "attn.out.projection_mlp.moe": pytest.approx(100),
        "attn.ffn.moe": 50,
        "attn.projection_mlp.moe": 70,
    }


def test_a_transformer_layer_converted_at_another_cost_counts_as_it_was() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    graph = surgeon.trace(layer, x)
    linears = sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
    whole, _ = measure(graph, (x,), {})
    reports = [one.apply(graph, inputs=x) for one in (Mlpify(cost_factor=4.0), Moeify(experts=2, share_trunk=False))]
    costs = dense_layers(reports)
    moes = [site.path for site in find_moes(graph)]
    assert len(moes) == 5
    assert sum(costs[path] for path in moes) == linears + layer.self_attn.in_proj_weight.numel()
    assert sum(costs[path] for path in moes) <= whole.multiply_adds
