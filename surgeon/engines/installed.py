"""Packages that only some engine needs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from surgeon.errors import UsageError


def installed(name: str) -> ModuleType:
    """Import a package that only some work needs.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with silent():
            return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({error}). Install it: pip install {name}.") from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what engines tell along the way. What matters is told by the comparison of the result."""
    loggers = [
        logging.getLogger(name) for name in ("nncf", "openvino", "onnxscript", "onnx_ir", "torch.onnx", "torchao")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
