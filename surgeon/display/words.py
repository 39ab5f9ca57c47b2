"""Progress in words."""

from __future__ import annotations

from surgeon.progress import Progress


def seconds(value: float) -> str:
    """A time such as `0.3 s`, `42 s` or `3 min 20 s`. An int is shown without decimals."""
    if value < 9.95 and not isinstance(value, int):
        return f"{value:.1f} s"
    if value < 59.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min")) if hours else ((minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def values_text(moment: Progress) -> list[str]:
    """The values of a report, each with its name."""
    return [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}"
        for name, value in moment.values.items()
    ]
