"""For authors of passes: tests that every pass must meet, and small models to test a pass on. Needs pytest."""

from surgeon.testing.conformance import PassConformance

__all__ = ["PassConformance"]
