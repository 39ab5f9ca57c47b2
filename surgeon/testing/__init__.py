"""For authors of passes: the tests that every pass has to meet, and small models to try one on. Needs pytest."""

from surgeon.testing.conformance import PassConformance

__all__ = ["PassConformance"]
