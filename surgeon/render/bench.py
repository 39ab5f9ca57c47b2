"""Parts that the views of the benchmarks share."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from surgeon.bench.machine import Machine
from surgeon.text.summary import number


def machine_name(machine: Machine) -> str:
    """Name the GPU, or the processor and the number of threads."""
    return machine.gpu or f"{machine.processor}, {count(machine.threads, 'thread')}"


def machine_lines(machine: Machine) -> list[RenderableType]:
    """Describe the machine, its measured limits, and how times were taken."""
    using = machine.torch if machine.gpu else f"{machine.torch}, {machine.instruction_set}"
    lines = [Text(f"{machine_name(machine)}; torch {using}; kernels: {machine.kernels}.")]
    if machine.bandwidth is not None:
        rates = ", ".join(f"{number(rate)}FLOP/s in {name}" for name, rate in machine.gemm.items())
        lines.append(Text(f"Measured limits: {rates}; {number(machine.bandwidth)}B/s from memory."))
    if machine.clock == "thread":
        lines.append(Text("Times are CPU times of the thread, without other work on the machine."))
    return list(lines)


def factor(value: float | None) -> Text:
    """A speed-up such as `1.60×`, green from 1 on; empty for None."""
    if value is None:
        return Text("")
    return Text(f"{value:.2f}×", style="green" if value >= 1.0 else "red")


def milliseconds(value: float | None) -> str:
    """A time with three digits, or with three decimals below a millisecond; empty for None."""
    if value is None:
        return ""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"


def count(value: int, what: str) -> str:
    """`1 token`, `2,048 tokens`."""
    return f"{value:,} {what}{'s' * (value != 1)}"
