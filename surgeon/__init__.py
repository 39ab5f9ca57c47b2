"""Model surgery for PyTorch: rewrite a dense transformer into one that runs only the neurons each token needs.

>>> import surgeon
>>> from surgeon.passes import Lower, Moeify, Sparsify
>>> surgery = surgeon.Pipeline([Sparsify(), Moeify(experts=4), Lower()]).run(model, inputs=inputs)  # doctest: +SKIP
>>> surgeon.set_tau(surgery.graph, 0.1)  # doctest: +SKIP
>>> surgery.save("model-moe")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.pretrained.register import register
from surgeon.version import __version__ as __version__


def _check_links() -> None:
    """Refuse to start without the folders that are linked into the package.

    Git makes a small text file of a link where it may not make links, as on Windows by default.

    Raises:
        ImportError: one is missing. The command ends with the same line instead, without a traceback.
    """
    lost = [name for name in ("kernels", "passes") if not Path(__file__).with_name(name).is_dir()]
    if not lost:
        return
    what = " and ".join(f"surgeon/{name}" for name in lost)
    line = (
        f"{what}: no folder in {Path(__file__).parent}, where the repository has a symbolic link. Let git make links "
        "(`git config core.symlinks true`, on Windows in developer mode) and check out again "
        f"(`git checkout -- {what.replace(' and ', ' ')}`), or install surgeon from a wheel."
    )
    # "-m" stands there while `python -m surgeon` looks for the module.
    raise SystemExit(line) if Path(sys.argv[0]).stem in ("surgeon", "-m") else ImportError(line)


def _show_in_notebooks() -> None:
    """Tell the notebook that this runs in, if any, how to show results."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        importlib.import_module("surgeon.render.notebook").register(shell)


_check_links()
register()
_show_in_notebooks()

# Loaded on first use: `import surgeon` and `surgeon --help` do not wait for torch.
_EXPORTS = {
    "Data": "surgeon.data.data",
    "compare": "surgeon.measure.compare",
    "compensate": "surgeon.measure.compensation",
    "Pipeline": "surgeon.surgery.pipeline",
    "Recipe": "surgeon.surgery.recipe",
    "Surgery": "surgeon.surgery.surgery",
    "SurgeonError": "surgeon.errors",
    "TracedGraph": "surgeon.graph.traced",
    "find_ffns": "surgeon.sites.search",
    "find_moes": "surgeon.moe.site",
    "get_rule": "surgeon.dynamic.knobs",
    "graft": "surgeon.surgery.graft",
    "get_tau": "surgeon.dynamic.knobs",
    "load": "surgeon.surgery.artifact",
    "load_recipe": "surgeon.surgery.load_recipe",
    "select": "surgeon.sites.select",
    "set_rule": "surgeon.dynamic.knobs",
    "set_tau": "surgeon.dynamic.knobs",
    "sweep": "surgeon.measure.sweep",
    "to_networkx": "surgeon.graph.traced",
    "token_load": "surgeon.measure.meter",
    "trace": "surgeon.tracing.trace",
    "tune": "surgeon.measure.tuning",
}

if TYPE_CHECKING:
    from surgeon.data.data import Data as Data
    from surgeon.dynamic.knobs import get_rule as get_rule
    from surgeon.dynamic.knobs import get_tau as get_tau
    from surgeon.dynamic.knobs import set_rule as set_rule
    from surgeon.dynamic.knobs import set_tau as set_tau
    from surgeon.errors import SurgeonError as SurgeonError
    from surgeon.graph.traced import TracedGraph as TracedGraph
    from surgeon.graph.traced import to_networkx as to_networkx
    from surgeon.measure.compare import compare as compare
    from surgeon.measure.compensation import compensate as compensate
    from surgeon.measure.meter import token_load as token_load
    from surgeon.measure.sweep import sweep as sweep
    from surgeon.measure.tuning import tune as tune
    from surgeon.moe.site import find_moes as find_moes
    from surgeon.sites.search import find_ffns as find_ffns
    from surgeon.sites.select import select as select
    from surgeon.surgery.artifact import load as load
    from surgeon.surgery.graft import graft as graft
    from surgeon.surgery.load_recipe import load_recipe as load_recipe
    from surgeon.surgery.pipeline import Pipeline as Pipeline
    from surgeon.surgery.recipe import Recipe as Recipe
    from surgeon.surgery.surgery import Surgery as Surgery
    from surgeon.tracing.trace import trace as trace

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'surgeon' has no attribute '{name}'")

    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
