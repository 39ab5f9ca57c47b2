"""Read example inputs that the user gives as a file or a function, or that an exported program contains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgeon.errors import LoadError, UsageError
from surgeon.graph.calls import Inputs
from surgeon.models.example_inputs import GIVE_INPUTS
from surgeon.models.user_function import call_spec, is_spec
from surgeon.models.weight_files import read_safetensors, read_torch_file


def inputs_from(spec: str) -> Inputs:
    """Read example inputs from a file of tensors or from a function.

    Args:
        spec: `module:function` or `file.py:function`, called without arguments, or a file. A `.pt` file holds a tensor,
            a tuple or a dict of tensors. A `.safetensors` or `.npz` file holds a dict of keyword inputs. A `.npy` file
            holds one tensor.

    Returns:
        A tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        UsageError: there is no such file or function, it fails, or it does not give tensors.
    """
    path = Path(spec)
    if not path.is_file():
        if not is_spec(spec):
            raise UsageError(f"'{spec}' is neither a file nor module:function.", **GIVE_INPUTS)
        return _checked(call_spec(spec, UsageError), spec)
    try:
        match path.suffix:
            case ".pt" | ".pth":
                content = read_torch_file(path)
            case ".safetensors":
                content = read_safetensors(path)
            case ".npy" | ".npz":
                content = _read_numpy(path)
            case suffix:
                kind = f"{suffix} files" if suffix else "a file without a suffix"
                raise UsageError(f"{path.name}: cannot read inputs from {kind}.", **GIVE_INPUTS)
    except LoadError as error:
        raise UsageError(f"{error.what} Save the inputs as a tensor, a tuple or a dict of tensors.") from error
    return _checked(content, path.name)


def inputs_of_program(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs a program was exported with, as positional and keyword arguments.

    Raises:
        UsageError: they were not saved with the program.
    """
    if program.example_inputs is None:
        raise UsageError("The exported program contains no example inputs.", **GIVE_INPUTS)
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def _read_numpy(path: Path) -> Tensor | dict[str, Tensor]:
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return torch.from_numpy(loaded)
        with loaded:
            return {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except Exception as error:  # a damaged file, pickled objects, or a dtype that torch does not have
        raise UsageError(f"{path.name} cannot be read as arrays of numbers: {error}") from error


def _checked(content: Any, origin: str) -> Inputs:
    if isinstance(content, Mapping):
        content = dict(content)
    elif isinstance(content, list):
        content = tuple(content)
    if not isinstance(content, Tensor | tuple | dict):
        raise UsageError(
            f"{origin} gives a value of type {type(content).__name__}, not a tensor, a tuple of tensors or a dict of "
            "tensors."
        )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(content)):
        raise UsageError(f"{origin} gives no tensor. Give a tensor, a tuple of tensors or a dict of tensors.")
    return content
