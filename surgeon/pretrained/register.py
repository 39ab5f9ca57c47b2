"""Tell transformers of the format, without importing transformers before anything else does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

METHOD = "surgeon"


def register() -> None:
    """Let `from_pretrained` read models that surgeon wrote: now if transformers is loaded, else as soon as it is."""
    if "transformers" in sys.modules:
        _hook()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Notices that transformers is about to be imported. Until then wrapt is not, which takes as long as the rest."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Find nothing."""
        if name == "transformers" and self in sys.meta_path:
            sys.meta_path.remove(self)
            _hook()


def _hook() -> None:
    import wrapt

    wrapt.register_post_import_hook(_add_quantizer, "transformers.modeling_utils")


def _add_quantizer(_: ModuleType) -> None:
    importlib.import_module("surgeon.pretrained.quantizer")
