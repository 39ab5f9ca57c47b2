"""A graph with experts, in every form."""

from tests.moe.conftest import graph  # noqa: F401  (a fixture)
