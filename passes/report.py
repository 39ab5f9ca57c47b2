"""What a pass did, as data: for the diff, for the saved artifact, and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from surgeon.sites.ffn import PROJECTION_MLP
from surgeon.training.penalty import Sparsity


@dataclass(frozen=True)
class Cost:
    """What one call of the graph on the example inputs costs.

    parameters: numbers in the graph, tied ones once. multiply_adds: with every expert running.
    executed: share of the experts' multiply-adds that ran, None without experts.
    executed_multiply_adds: what ran (routers, attention and head included).
    """

    parameters: int
    multiply_adds: int
    executed_multiply_adds: int
    executed: float | None = None


@dataclass(frozen=True)
class SiteChange:
    """One rewritten site.

    parameters, multiply_adds: (before, after), the multiply-adds for one token and every expert running.
    executed: share of the site's expert multiply-adds that ran on the example inputs, None without experts.
    made: path of the module that the pass put in, "" if it put in none.
    output: names of the node that gave the site's output before and of the one that gives it after.
    """

    path: str
    before: str
    after: str
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    output: tuple[str, str]
    made: str = ""
    executed: float | None = None


@dataclass(frozen=True)
class FitReport:
    """How a pass was fitted.

    steps: of the optimiser. epochs: times through the data, None if its length is unknown. losses: (step, values) at
    the start, at the end and in between. resumed_at: the step at which an interrupted fit went on, 0 if it was not.
    sparsity: of the activations of each layer that was made sparse, by path, before and after.
    """

    steps: int
    epochs: float | None
    seconds: float
    losses: tuple[tuple[int, dict[str, float]], ...]
    resumed_at: int = 0
    sparsity: Mapping[str, tuple[Sparsity, Sparsity]] = field(default_factory=dict)

    @classmethod
    def merged(cls, fits: Sequence[FitReport]) -> FitReport:
        """Fits by one plan that ran one after the other: what they took together, and the means of their losses."""
        epochs = [fit.epochs for fit in fits if fit.epochs is not None]
        losses = []
        for moment in zip(*(fit.losses for fit in fits), strict=True):
            names = moment[0][1]
            means = {name: sum(values[name] for _, values in moment) / len(fits) for name in names}
            losses.append((sum(step for step, _ in moment), means))
        return cls(
            steps=sum(fit.steps for fit in fits),
            epochs=round(sum(epochs), 3) if len(epochs) == len(fits) else None,
            seconds=round(sum(fit.seconds for fit in fits), 2),
            losses=tuple(losses),
            resumed_at=sum(fit.resumed_at for fit in fits),
            sparsity={path: values for fit in fits for path, values in fit.sparsity.items()},
        )


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    matched: paths of the rewritten sites. rejected: (path, reason) of the candidates left as they were.
    max_error: largest difference of the graph's outputs across the pass, relative to the largest output; None if it
    was not measured. preserved: whether the pass claims that nothing changes (then max_error is within tolerance).
    notes: what the user should know, one sentence each. fit: None if nothing was trained.
    """

    name: str
    options: Mapping[str, Any]
    matched: list[str]
    rejected: list[tuple[str, str]]
    sites: tuple[SiteChange, ...] = ()
    seconds: float = 0.0
    before: Cost | None = None
    after: Cost | None = None
    max_error: float | None = None
    preserved: bool = True
    notes: tuple[str, ...] = ()
    fit: FitReport | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PassReport:
        """The report that `to_json` wrote."""

        def cost(value: Mapping[str, Any] | None) -> Cost | None:
            return None if value is None else Cost(**value)

        def site(value: Mapping[str, Any]) -> SiteChange:
            pairs = {key: tuple(value[key]) for key in ("parameters", "multiply_adds", "output")}
            return SiteChange(**{**value, **pairs})

        fit = values["fit"]
        return cls(
            name=values["name"],
            options=values["options"],
            matched=list(values["matched"]),
            rejected=[(path, reason) for path, reason in values["rejected"]],
            sites=tuple(map(site, values["sites"])),
            seconds=values["seconds"],
            before=cost(values["before"]),
            after=cost(values["after"]),
            max_error=values["max_error"],
            preserved=values["preserved"],
            notes=tuple(values["notes"]),
            fit=None if fit is None else FitReport(
                fit["steps"], fit["epochs"], fit["seconds"],
                tuple((step, losses) for step, losses in fit["losses"]), fit["resumed_at"],
                {path: (Sparsity(**old), Sparsity(**new)) for path, (old, new) in fit.get("sparsity", {}).items()},
            ),
        )  # fmt: skip


def dense_layers(reports: Iterable[PassReport]) -> dict[str, float]:
    """What every layer with experts replaced: multiply-adds for one token before all passes, by the experts' path.

    Where a layer was replaced by one of another cost before it was split, the first one counts; the parts of a fused
    layer have shares of it in proportion to what replaced them.

    Args:
        reports: of all passes, in order.
    """
    found: dict[str, float] = {}
    # Of what a pass made: the multiply-adds before all passes, over its own.
    ratios: dict[str, float] = {}
    for change in (site for report in reports for site in report.sites if site.made and site.made not in found):
        before, after = change.multiply_adds
        within, _, name = change.path.rpartition(".")
        # The parts of a fused layer are recorded by the module that holds them, and other layers may stand in it too.
        made = within if change.path not in ratios and name.startswith(PROJECTION_MLP) else change.path
        dense = before * ratios.get(made, 1.0)
        found[change.made] = dense
        ratios[change.made] = dense / after if after else 1.0
    return found


@dataclass(frozen=True)
class Progress:
    """A moment of a long piece of work: what is done, how far it is, and the latest values worth showing."""

    what: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
