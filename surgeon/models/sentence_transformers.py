"""The files that make a Hugging Face directory one of sentence-transformers: how its token vectors become one vector.

The transformer lies in the directory itself. `modules.json` lists what follows: pooling, normalisation, dense layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from surgeon.errors import LoadError
from surgeon.models.hugging_face import read_json

MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")


def copy_sentence_files(source: Path, target: Path) -> None:
    """Copy these files to a directory with a converted transformer. A directory without them gives nothing.

    Raises:
        LoadError: `modules.json` is damaged, or names a folder outside the directory.
    """
    if not (source / MODULES).is_file():
        return
    for file in _files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _files(source: Path) -> Iterator[Path]:
    yield source / MODULES
    for pattern in _SETTINGS:
        yield from sorted(source.glob(pattern))
    modules = read_json(source / MODULES)
    for module in modules if isinstance(modules, list) else [None]:
        folder = module.get("path") if isinstance(module, dict) else None
        if not isinstance(folder, str) or folder != Path(folder).name:
            raise LoadError(f"{source / MODULES} is damaged: it does not list folders of {source}.")
        if folder:
            yield from (file for file in sorted((source / folder).rglob("*")) if file.is_file())
