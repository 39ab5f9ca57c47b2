"""The command line. `surgeon --help` must not wait for torch: modules that need it are imported by the commands."""

from surgeon.cli import (  # noqa: F401  (each registers its command)
    apply,
    bench_layer,
    demo,
    diff,
    doctor,
    explain,
    inspect,
    passes,
    set,
    sweep,
    tune,
)
from surgeon.cli.app import app, main

__all__ = ["app", "main"]
