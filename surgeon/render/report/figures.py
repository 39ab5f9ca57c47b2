"""The pictures of a report: drawings as SVG inside of the page, and texts whose tokens are shaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from surgeon.jobs.load import LoadMap
from surgeon.jobs.plot import Kind, Measured
from surgeon.jobs.report import Reported
from surgeon.render.plot import DRAW
from surgeon.text.summary import percent

WORDS: Mapping[Kind, tuple[str, str]] = {
    "pareto": ("Quality against cost", "At several tau, with the routers and with the true norms of the experts."),
    "layers": ("Which layers quality depends on", "One layer alone skips, while the others run everything."),
    "experts": ("What tokens run", "How many of its experts, inputs or neurons a token runs in each layer."),
    "routers": ("What routers predict", "Scores against true norms, and what is lost with them and with the oracle."),
    "compute": ("Where computation goes", "The share of what can be skipped that each token or patch runs."),
}
"""The title and a sentence for each kind."""


@dataclass(frozen=True)
class Figure:
    """A part of the report with a picture.

    svg: the picture, or empty. coloured: whether its colours are values, so that it stays light on a dark page.
    texts: of each sample its tokens, with what each runs, from 0 to 1 relative to the most, and in words.
    """

    id: str
    title: str
    words: str
    svg: Any = ""
    coloured: bool = False
    texts: tuple[tuple[tuple[str, float, str], ...], ...] = ()


def figures(surgery: Reported) -> list[Figure]:
    """Return the pictures of what was measured, in the order of `WORDS`."""
    return [_figure(kind, surgery.measured[kind], surgery.title) for kind in WORDS if kind in surgery.measured]


def _figure(kind: Kind, found: Measured, title: str) -> Figure:
    if kind == "compute" and isinstance(found, list) and isinstance(found[0], LoadMap) and found[0].texts:
        return _texts(found)
    svg = _svg(lambda file: DRAW[kind](found, file, title))
    return Figure(f"figure-{kind}", *WORDS[kind], svg, kind in ("experts", "routers", "compute"))


def _texts(samples: Sequence[Any]) -> Figure:
    most = max(max(sample.loads) for sample in samples) or 1.0
    texts = tuple(
        tuple((text, load / most, percent(load)) for text, load in zip(sample.texts, sample.loads, strict=True))
        for sample in samples
    )
    return Figure("figure-compute", *WORDS["compute"], texts=texts)


def _svg(draw: Callable[[Path], None]) -> Any:
    """What a function draws, without the XML header."""
    from markupsafe import Markup

    with TemporaryDirectory() as place:
        file = Path(place) / "picture.svg"
        draw(file)
        text = file.read_text(encoding="utf-8")
    return Markup(text[text.index("<svg") :])
