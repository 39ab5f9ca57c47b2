"""Silence exports and imports."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of an export out of the user's terminal. The notes and errors report what matters."""
    names = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._subclasses", "transformers")
    # Export prints the partial graph to stderr when a model branches on its data.
    with _level(logging.CRITICAL, names), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def quiet_imports() -> contextlib.AbstractContextManager[None]:
    """Keep off the terminal what torchao logs when others import it: which of its libraries do not fit."""
    return _level(logging.ERROR, ("torchao", "torch.utils._pytree"))


@contextlib.contextmanager
def _level(level: int, names: Sequence[str]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
