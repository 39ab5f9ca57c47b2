"""Change a model's signature, modes and caches during an export, and restore them afterwards."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def plain_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Give `forward` a named parameter for every input, because export has no dynamic dimensions for `**kwargs`."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind for name in bound}
    if not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
        yield
        return
    original, own = model.forward, "forward" in vars(model)
    names = [name for name in bound if signature.parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL]
    names = [*names, *(f"input_{index}" for index in range(len(args)))][: len(args)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in (*names, *kwargs)]

    def forward(*given: Any, **named: Any) -> Any:
        return original(*given, **named)

    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward


@contextlib.contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module afterwards. A user may have set some of them to evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Switch key-value caches off in every config of the model. Encoder-decoder models have several."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    saved = [(config, config.use_cache) for config in configs.values()]
    for config, _ in saved:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in saved:
            config.use_cache = value
