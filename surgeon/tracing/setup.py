"""Change a model's signature, modes and caches during an export, and leave model and inputs as they were."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.graph.agreement import call_reproducibly

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)  # hooks of a module are an OrderedDict


def copied(inputs: Any) -> Any:
    """Return inputs in new containers with copies of the tensors, each its own: a model may write into them."""
    return pytree.tree_map_only(Tensor, torch.clone, inputs)


@contextlib.contextmanager
def plain_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Give `forward` a named parameter for every input, and containers of its own.

    Export has no dynamic dimensions for `**kwargs`, and takes what a model adds to a dict for one of its inputs.
    """
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind for name in bound}
    original, own = model.forward, "forward" in vars(model)
    if kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
        names = [name for name in bound if signature.parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL]
        names = [*names, *(f"input_{index}" for index in range(len(args)))][: len(args)]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in (*names, *kwargs)]
        signature = inspect.Signature(parameters)

    def forward(*given: Any, **named: Any) -> Any:
        given, named = pytree.tree_map(lambda leaf: leaf, (given, named))
        return original(*given, **named)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore everything that a model may change in itself when it runs.

    That is the attributes of its modules and of their configs (the training flag, submodules: BigBird replaces its
    attention when an input is short), what is in their dicts and lists, and the values of its buffers.
    """
    modules = list(model.modules())
    configs = [getattr(module, "config", None) for module in modules]
    holders = {id(holder): holder for holder in (*modules, *configs) if holder is not None}.values()
    attributes = [(vars(holder), dict(vars(holder))) for holder in holders if hasattr(holder, "__dict__")]
    containers = [
        (value, value.copy()) for _, saved in attributes for part in saved.values() for value in _containers(part)
    ]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for now, saved in attributes:
            now.clear()
            now.update(saved)
        for value, content in containers:
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)
        for buffer, version, content in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(content)


def run_alone(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the model's output. The model and its inputs stay as they are, so that every call is like the first."""
    args, kwargs = copied((args, kwargs))
    with unchanged(model):
        return call_reproducibly(model, args, kwargs)


def _containers(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield a container and those in it, down to a depth."""
    if type(value) not in _CONTAINERS or not depth:
        return
    yield value
    for part in value.values() if isinstance(value, dict) else value:
        yield from _containers(part, depth - 1)


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
