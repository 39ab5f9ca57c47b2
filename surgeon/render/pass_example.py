"""The view of what a pass changes in a small model, which `surgeon passes NAME --example` runs."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.passes.report import PassDiff
from surgeon.text.diff import graph_diff_view, sites_view
from surgeon.text.layout import heading, indented
from surgeon.text.summary import SiteGroup


def example_view(example: PassDiff) -> RenderableType:
    """Show the sites, and the difference of the graphs."""
    sites = [SiteGroup(site.path, site, 1) for site in example.report.sites]
    return Group(
        Text(""),
        heading("example", "on a small model"),
        indented(sites_view(sites), 0),
        graph_diff_view(example.graph),
    )
