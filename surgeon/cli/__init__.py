"""The command line. `surgeon --help` must not wait for torch: modules that need it are imported by the commands.

Every module here is imported, and a function in it that is marked with `surgeon.cli.app.command` is a command.
"""

from importlib import import_module
from pkgutil import iter_modules

from surgeon.cli.app import app, main

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["app", "main"]
