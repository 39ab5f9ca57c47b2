"""The version number. pyproject.toml reads it from here, so it is also known without an installation."""

from __future__ import annotations

__version__ = "0.1.0"
