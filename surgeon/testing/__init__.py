"""For authors of passes: tests that every pass must meet, and small models to test a pass on. Needs pytest."""

try:
    import pytest  # noqa: F401
except ImportError as error:
    raise ImportError('surgeon.testing needs pytest: pip install "surgeon[test]".') from error

from surgeon.testing.conformance import PassConformance

__all__ = ["PassConformance"]
