"""Converted layers in a graph: where they are, in which form, and what they cost."""

from __future__ import annotations

from typing import Any

from surgeon.moe.site import find_moes


def test_sites(graph: Any) -> None:
    sites = find_moes(graph)
    assert [site.path for site in sites] == ["blocks.0.ffn.moe", "blocks.1.ffn.moe"]
    site = sites[0]
    assert site.experts == 4
    assert site.describe == "4 experts × 8"
    assert site.expert_multiply_adds == 8 * (16 + 16)
    assert site.router_parameters == 16 * 8 + 8 * 4
    assert site.multiply_adds == 4 * site.expert_multiply_adds + site.router_parameters
    assert len(site.nodes) == 1
