"""Functions, classes and modules that the user names: `module:function`, `path/to/file.py:function`."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import operator
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from surgeon.errors import LoadError, SurgeonError

_SPEC = re.compile(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)")
# How the names of modules begin that were loaded from a file.
_FROM_FILE = "surgeon_user_"


def is_spec(text: str) -> bool:
    """Whether the text names a function: `package.module:function` or `path/to/file.py:function`."""
    return _SPEC.fullmatch(text) is not None


def load_spec(spec: str, error: type[SurgeonError]) -> Any:
    """Return what `spec` names, a function or a class.

    Modules are searched on Python's path, then in the current directory. For a file, its own directory is searched
    instead of the current one. A file is run once per process.

    Raises:
        error: the module cannot be found or raises an exception, or has nothing callable of that name.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise error(f"'{spec}' is neither module:function nor file.py:function.")
    module, name = match["module"], match["name"]
    with _importable(_folder(module)):
        loaded = _load(module, spec, error)
        try:
            found = operator.attrgetter(name)(loaded)
        except AttributeError as cause:
            close = difflib.get_close_matches(name, dir(loaded), n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise error(f"{spec}: {module} has no '{name}'.{hint}") from cause
    if not callable(found):
        raise error(f"{spec}: '{name}' is a {type(found).__name__}, not a function.")
    return found


def call_spec(spec: str, error: type[SurgeonError]) -> Any:
    """Call the function that `spec` names, without arguments, and return what it returns: see `load_spec`.

    Raises:
        error: the module or the function cannot be found or raises an exception.
    """
    function = load_spec(spec, error)
    with _importable(_folder(spec.rpartition(":")[0])):
        try:
            return function()
        except SurgeonError:
            raise
        except Exception as cause:
            raise error(f"{spec} raised {type(cause).__name__}: {cause}") from cause


def spec_of(kind: type) -> str:
    """Return what names a class: `module:Class`, or `path/to/file.py:Class` if it was loaded from a file."""
    module = kind.__module__
    if module.startswith(_FROM_FILE):
        module = str(getattr(sys.modules[module], "__file__", module))
    return f"{module}:{kind.__qualname__}"


def import_modules(names: Iterable[str]) -> None:
    """Import modules that the user trusts, so that they register their output classes and operators with torch.

    They are searched where `call_spec` searches them. A name may also be a file that ends in `.py`.

    Raises:
        LoadError: a module cannot be found or raises an exception.
    """
    for name in names:
        with _importable(_folder(name)):
            _load(name, f"The trusted module {name}", LoadError)


def _folder(module: str) -> Path:
    return (Path(module).parent if module.endswith(".py") else Path()).resolve()


def _load(module: str, label: str, error: type[SurgeonError]) -> ModuleType:
    try:
        return _run_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except FileNotFoundError as cause:
        raise error(f"{label}: the file {module} does not exist.") from cause
    except ModuleNotFoundError as cause:
        raise error(
            f"{label}: the Python module '{cause.name}' cannot be imported. "
            "Make it importable, for example with PYTHONPATH=. in the environment."
        ) from cause
    except Exception as cause:
        raise error(f"{label}: importing {module} raised {type(cause).__name__}: {cause}") from cause


def _run_file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"{_FROM_FILE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Add `folder` at the end of Python's path while user code runs, so that it cannot hide an installed package."""
    entry = str(folder)
    sys.path.append(entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.reverse()
            sys.path.remove(entry)
            sys.path.reverse()
