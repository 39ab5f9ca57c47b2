"""The command line.

Every module in this package is imported, and each function marked with `surgeon.cli.app.command` becomes a command.
`surgeon --help` must not wait for torch, so commands import what needs it inside their functions.
"""

from importlib import import_module
from pkgutil import iter_modules

from surgeon.cli.app import app, main

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["app", "main"]
