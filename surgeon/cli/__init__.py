"""The command line. `surgeon --help` must not wait for torch: modules that need it are imported by the commands."""

from surgeon.cli import apply, bench, inspect, sweep  # noqa: F401  (each registers its commands)
from surgeon.cli.app import app, main

__all__ = ["app", "main"]
