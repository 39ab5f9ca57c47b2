"""What every pass says about itself, as text.

`catalogue.json` holds it for the passes of this folder, so that to show them imports neither the passes nor torch.
`pytest --update-golden` writes that file, and a test compares it with the passes.
"""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.passes.about import GROUP, About, Option, describe

if TYPE_CHECKING:
    from surgeon.passes.base import Pass

FILE = Path(__file__).with_name("catalogue.json")


def all_about() -> Mapping[str, About]:
    """Describe every pass by name, in the order in which they usually run.

    The passes are imported if other packages offer some, or if a file of this folder is not in the catalogue.
    """
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    if entry_points(group=GROUP) or kept["modules"] != _modules():
        from surgeon.passes.registry import all_passes

        return {name: describe(kind) for name, kind in all_passes().items()}
    return {about["name"]: _about(**about) for about in kept["passes"]}


def broken() -> Mapping[str, str]:
    """Return why passes of other packages cannot be used, by the name of their entry point."""
    if not entry_points(group=GROUP):
        return {}
    from surgeon.passes.registry import broken_passes

    return broken_passes()


def written(passes: Mapping[str, type[Pass[Any, Any]]]) -> str:
    """Return the content of `catalogue.json` for these passes, which are all in this folder."""
    about = [dataclasses.asdict(describe(kind)) for kind in passes.values()]
    return json.dumps({"modules": _modules(), "passes": about}, indent=1, ensure_ascii=False) + "\n"


def _modules() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(FILE.parent)]))


def _about(*, must_precede: list[str], options: list[dict[str, Any]], **values: Any) -> About:
    def option(default: Any, **others: Any) -> Option:
        return Option(default=tuple(default) if isinstance(default, list) else default, **others)

    return About(must_precede=tuple(must_precede), options=tuple(option(**one) for one in options), **values)
