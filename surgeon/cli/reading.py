"""From what was typed to what the jobs take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgeon.errors import UsageError

if TYPE_CHECKING:
    from surgeon.jobs.opening import DataOptions
    from surgeon.passes import Pass


def data_options(data: str | None, **options: Any) -> DataOptions | None:
    """The options that say how to read data, None without data."""
    from surgeon.jobs.opening import DataOptions

    return None if data is None else DataOptions(data, **options)


def build(names: str | None, settings: list[str] | None) -> list[Pass[Any]]:
    """The passes of `--passes` with the options of `--set`.

    Raises:
        UsageError: none, or one that does not exist; see `surgeon.recipe.build`.
    """
    from surgeon import recipe

    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not wanted:
        raise UsageError("Say which passes to run: --passes sparsify,moeify. surgeon passes lists them.")
    return recipe.build(wanted, recipe.parse_settings(settings or []))
