"""The view of a search for settings."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.display.words import seconds
from surgeon.surgery.trials import Search
from surgeon.text.layout import dim, grid
from surgeon.text.summary import percent


def search_view(search: Search) -> RenderableType:
    """Show every trial of a search for settings, and what the full run has in place of the given options."""
    table = grid("left", "right", "right", "right", header=("setting", "steps", "loss", "time"))
    for trial in search.trials:
        loss = trial.why if trial.loss is None else f"{trial.loss:.4g}"
        name = Text(trial.name, style="bold" if trial.name == search.chosen else "")
        table.add_row(name, str(trial.steps), loss, seconds(trial.seconds))
    table.add_row(dim("dense"), "", f"{search.dense_loss:.4g}", "")
    where = (
        f"Loss on {search.validation} samples of the training data, at {percent(search.share)} of the layers' cost; "
        f"trained on {search.train} others. The held-out data took no part."
    )
    given = [f"{name}.{option}={value}" for name, own in search.options.items() for option, value in own.items()]
    found = f"Chosen: {search.chosen}. The full run has {', '.join(given) if given else 'the options as given'}."
    return Group(table, dim(where), Text(found), Text(""))
