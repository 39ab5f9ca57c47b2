"""Load a directory that PEFT wrote: changes to another model, which are merged into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.errors import LoadError, first_line
from surgeon.models.hugging_face import Directory, load_directory, quiet_transformers, read_json
from surgeon.models.weight_files import check_safetensors

ADAPTER = "adapter_config.json"


def load_adapter(path: Path, task: str | None) -> Directory:
    """Load the base model of an adapter, and merge the adapter into its weights.

    Args:
        task: as `surgeon.models.hugging_face.load_directory` takes it.

    Raises:
        LoadError: the base model is not on this machine, PEFT is not installed, or the adapter cannot be merged.
    """
    settings = read_json(path / ADAPTER)
    settings = settings if isinstance(settings, dict) else {}
    kind, base = settings.get("peft_type") or "of unknown type", settings.get("base_model_name_or_path")
    places = [Path(base), path / base, path.parent / base] if isinstance(base, str) and base else []
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise LoadError(
            f"{path} is a PEFT adapter ({kind}) for {base or 'an unnamed base model'}, which is not on this machine. "
            f"Put the base model into a directory, and its path into {ADAPTER} as base_model_name_or_path."
        )
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise LoadError(f"{path} has no {weights.name}. Adapters in other formats may run code, and are not loaded.")
    check_safetensors(weights)
    try:
        import peft
    except ImportError as error:
        raise LoadError(f"{path} is a PEFT adapter ({kind}). To merge it, install PEFT: pip install peft.") from error
    base_model = load_directory(found, task)
    try:
        with quiet_transformers():
            adapted: Any = peft.PeftModel.from_pretrained(base_model.model, str(path), local_files_only=True)
            merged = adapted.merge_and_unload()
    except Exception as error:  # PEFT raises exceptions of many types
        raise LoadError(f"{path} cannot be merged into {found}: {first_line(error)}.") from error
    note = f"The PEFT adapter ({kind}) was merged into the weights of {found}."
    files = [*base_model.files, weights]
    return replace(base_model, model=merged.eval(), files=files, notes=(*base_model.notes, note))
