"""For authors of passes: the tests that every pass has to meet, and small models to try one on. Needs pytest."""

try:
    import pytest  # noqa: F401
except ImportError as error:
    raise ImportError('surgeon.testing needs pytest: pip install "surgeon[test]".') from error

from surgeon.testing.conformance import PassConformance

__all__ = ["PassConformance"]
