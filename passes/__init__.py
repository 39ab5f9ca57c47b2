"""The passes. Each has a file of its own; all of them share `contract`, `base`, `options` and `verification`.

`registry` finds the passes, including those of other packages. `catalogue` describes them without importing
them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use: what describes the passes, or reads their reports, does not wait for all of them.
_EXPORTS = {
    "Densify": "densify",
    "EarlyExit": "early_exit",
    "FineTunedPass": "trained",
    "FitContext": "contract",
    "HaltTokens": "halt_tokens",
    "Lower": "lower",
    "Mlpify": "mlpify",
    "Moeify": "moeify",
    "Pass": "base",
    "PerSite": "options",
    "Quantize": "quantize",
    "Recover": "recover",
    "Refit": "refit",
    "Rotate": "rotate",
    "SiteChange": "report",
    "SiteRefused": "contract",
    "Sparsify": "sparsify",
    "SparsifyInputs": "sparsify_inputs",
    "SparsifyNeurons": "sparsify_neurons",
    "SwapActivation": "swap_activation",
    "TrainedPass": "trained",
    "option": "options",
}

if TYPE_CHECKING:
    from surgeon.passes.base import Pass as Pass
    from surgeon.passes.contract import FitContext as FitContext
    from surgeon.passes.contract import SiteRefused as SiteRefused
    from surgeon.passes.densify import Densify as Densify
    from surgeon.passes.early_exit import EarlyExit as EarlyExit
    from surgeon.passes.halt_tokens import HaltTokens as HaltTokens
    from surgeon.passes.lower import Lower as Lower
    from surgeon.passes.mlpify import Mlpify as Mlpify
    from surgeon.passes.moeify import Moeify as Moeify
    from surgeon.passes.options import PerSite as PerSite
    from surgeon.passes.options import option as option
    from surgeon.passes.quantize import Quantize as Quantize
    from surgeon.passes.recover import Recover as Recover
    from surgeon.passes.refit import Refit as Refit
    from surgeon.passes.report import SiteChange as SiteChange
    from surgeon.passes.rotate import Rotate as Rotate
    from surgeon.passes.sparsify import Sparsify as Sparsify
    from surgeon.passes.sparsify_inputs import SparsifyInputs as SparsifyInputs
    from surgeon.passes.sparsify_neurons import SparsifyNeurons as SparsifyNeurons
    from surgeon.passes.swap_activation import SwapActivation as SwapActivation
    from surgeon.passes.trained import FineTunedPass as FineTunedPass
    from surgeon.passes.trained import TrainedPass as TrainedPass

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'surgeon.passes' has no attribute '{name}'")

    value = getattr(importlib.import_module(f"surgeon.passes.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
