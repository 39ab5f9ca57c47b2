"""What the tests of benchmarks share: a machine, and the lines of a view."""

from __future__ import annotations

from rich.console import RenderableType

from surgeon.bench.machine import Machine
from surgeon.text.plain import plain_text

MACHINE = Machine(
    "cpu", "AMD EPYC", "AVX2", 1, "2.13.0+cpu", "native, avx2", None, "thread",
    {"float32": 72.3e9, "bfloat16": 72.3e9}, 11.2e9,
)  # fmt: skip


def lines(content: RenderableType, width: int = 100) -> list[str]:
    return plain_text(content, width).splitlines()
