"""The file or directory that a model came from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from surgeon.models.hugging_face import is_pretrained


@dataclass(frozen=True)
class Origin:
    """Where a model came from, for the record and for the files that are saved beside it.

    path, kind, sha256: of the input file or directory; None for a model made in Python. notes: remarks from loading it.
    config, generation, tokenizer, processor: those of a Hugging Face model, None if it has none.
    """

    path: str | None = None
    kind: str = "module"
    sha256: str | None = None
    config: Any = None
    tokenizer: Any = None
    processor: Any = None
    notes: tuple[str, ...] = ()
    generation: Any = None

    @classmethod
    def of(cls, model: Any, config: Any = None, **fields: Any) -> Origin:
        """Take the configs from a model. The config names the model's class, as that of a saved model does.

        config: of the model, if the model itself has none.
        """
        config = getattr(model, "config", None) or config
        if is_pretrained(model):
            config = copy.deepcopy(config)
            config.architectures = [type(model).__name__]
        return cls(config=config, generation=getattr(model, "generation_config", None), **fields)
