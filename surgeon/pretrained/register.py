"""Tell transformers of the format, without importing transformers before anything else does."""

from __future__ import annotations

import importlib
from types import ModuleType

import wrapt

METHOD = "surgeon"


def register() -> None:
    """Let `from_pretrained` read models that surgeon wrote: now if transformers is loaded, else as soon as it is."""
    wrapt.register_post_import_hook(_add_quantizer, "transformers.modeling_utils")


def _add_quantizer(_: ModuleType) -> None:
    importlib.import_module("surgeon.pretrained.quantizer")
