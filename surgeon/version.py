"""The version, in its only place: pyproject.toml reads it here, so that it is known without an installation too."""

from __future__ import annotations

__version__ = "0.1.0"
