"""How long steps took the last time, for the time left of those whose length is not known before.

Steps of a command are those of the same words: the same step of another model takes another time. Only a hash of the
words is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from surgeon.directories import cache

_LEAST = 1.0  # seconds; what is shorter needs no estimate
_MOST = 300  # steps, the latest


def expected(what: str, command: str = "") -> float | None:
    """Return the seconds that a step of a command took the last time; None if they are not known."""
    return _read().get(_key(what, command))


def remember(what: str, took: float, command: str = "") -> None:
    """Keep the seconds that a step of a command took. Without a command it is a step of all."""
    known, key = _read(), _key(what, command)
    if took < _LEAST and key not in known:
        return
    known.pop(key, None)
    known[key] = round(took, 1)
    latest = dict(list(known.items())[-_MOST:])
    with contextlib.suppress(OSError):  # where nothing can be written, no time is known before
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, suffix=".json", delete=False) as made:
            json.dump(latest, made)
        Path(made.name).replace(_file())


def _key(what: str, command: str) -> str:
    return hashlib.sha256(f"{command}\n{what}".encode()).hexdigest()[:16]


def _file() -> Path:
    return cache() / "durations.json"


def _read() -> dict[str, float]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
        return {str(what): float(took) for what, took in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: it is written again
        return {}
