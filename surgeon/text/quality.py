"""Qualities in words: a value, its interval, and what it was measured on."""

from __future__ import annotations

from surgeon.data.quality import Change, Quality

_SHARES = ("accuracy", "exact match", "top-1 agreement", "cosine")


def quality_value(quality: Quality) -> str:
    """A quality as a number."""
    return _like(quality, quality.value)


def with_interval(quality: Quality) -> str:
    """A quality with its 95% interval: `0.951 [0.93, 0.97]`."""
    if quality.low is None or quality.high is None:
        return quality_value(quality)
    return f"{quality_value(quality)} [{_like(quality, quality.low)}, {_like(quality, quality.high)}]"


def _like(quality: Quality, value: float) -> str:
    """A number with as many decimals as the quality has."""
    return f"{value:.3f}" if quality.name in _SHARES else f"{value:.4g}"


def change_words(change: Change | None) -> str:
    """A difference with its 95% interval: `-0.012 [-0.02, -0.004]`; nothing if there is none."""
    if change is None:
        return ""
    return f"{change.value:+.2g} [{change.low:+.2g}, {change.high:+.2g}]" if change.value or change.low else "0"


def measured_on(quality: Quality) -> str:
    """What a quality was measured on: `360 samples`, or `1,200 tokens of 40 samples`."""
    items = f"{quality.items:,} {quality.unit}"
    return items if quality.unit == "samples" else f"{items} of {quality.samples:,} samples"
