"""Model surgery for PyTorch: rewrite a dense transformer into one that runs only the neurons each token needs.

>>> import surgeon
>>> from surgeon.passes import Lower, Moeify, Sparsify
>>> surgery = surgeon.Pipeline([Sparsify(), Moeify(experts=4), Lower()]).run(model, inputs=inputs)  # doctest: +SKIP
>>> surgeon.set_tau(surgery.graph, 0.1)  # doctest: +SKIP
>>> surgery.save("model-moe")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use: `import surgeon` and `surgeon --help` do not wait for torch.
_EXPORTS = {
    "Data": "surgeon.batch",
    "compensate": "surgeon.compensation",
    "Pipeline": "surgeon.pipeline",
    "Surgery": "surgeon.pipeline",
    "SurgeonError": "surgeon.errors",
    "TracedGraph": "surgeon.graph",
    "find_ffns": "surgeon.search",
    "find_moes": "surgeon.moe",
    "get_rule": "surgeon.moe",
    "get_tau": "surgeon.moe",
    "load": "surgeon.artifact",
    "set_rule": "surgeon.moe",
    "set_tau": "surgeon.moe",
    "to_networkx": "surgeon.graph",
    "token_load": "surgeon.cost",
    "trace": "surgeon.tracing",
    "tune": "surgeon.tuning",
}

if TYPE_CHECKING:
    from surgeon.artifact import load as load
    from surgeon.batch import Data as Data
    from surgeon.compensation import compensate as compensate
    from surgeon.cost import token_load as token_load
    from surgeon.errors import SurgeonError as SurgeonError
    from surgeon.graph import TracedGraph as TracedGraph
    from surgeon.graph import to_networkx as to_networkx
    from surgeon.moe import find_moes as find_moes
    from surgeon.moe import get_rule as get_rule
    from surgeon.moe import get_tau as get_tau
    from surgeon.moe import set_rule as set_rule
    from surgeon.moe import set_tau as set_tau
    from surgeon.pipeline import Pipeline as Pipeline
    from surgeon.pipeline import Surgery as Surgery
    from surgeon.search import find_ffns as find_ffns
    from surgeon.tracing import trace as trace
    from surgeon.tuning import tune as tune

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'surgeon' has no attribute '{name}'")

    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
