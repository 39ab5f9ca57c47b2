"""Choose among sites by path and by what they are."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from surgeon.errors import UsageError
from surgeon.graph.patterns import matches

Site = TypeVar("Site")


def select(sites: Iterable[Site], *paths: str, **wanted: Any) -> list[Site]:
    """Return the sites that lie at one of the paths and are what is wanted.

    >>> ffns, _ = surgeon.find_ffns(graph)  # doctest: +SKIP
    >>> surgeon.select(ffns, "*.layer.[3-7]", activation="gelu", hidden=3072)  # doctest: +SKIP

    Args:
        sites: from `find_ffns`, `find_moes` and the like: anything with a path.
        paths: paths, or patterns with `*`, `?` and `[3-7]`, as in the options `only` and `skip` of the passes and in
            values by site. Without any, every site fits.
        wanted: values by the name of an attribute. A text may be such a pattern too; a list, tuple or set holds several
            values, of which one has to fit.

    Returns:
        The sites in their order; [] if none fits.

    Raises:
        UsageError: a site has no such attribute, or a path is no text.
    """
    for path in paths:
        if not isinstance(path, str):
            raise UsageError(f"select takes paths as texts, such as '*.0', but got {path!r}.")
    found = [site for site in _with_paths(sites) if not paths or matches(paths, site.path)]  # type: ignore[attr-defined]
    for name, value in wanted.items():
        found = [site for site in found if _fits(_attribute(site, name), value)]
    return found


def _with_paths(sites: Iterable[Site]) -> list[Site]:
    """The sites as a list.

    Raises:
        UsageError: it is none of sites.
    """
    if isinstance(sites, tuple) and len(sites) == 2 and all(isinstance(part, list) for part in sites):
        raise UsageError("select takes a list of sites. A search returns sites and rejections: give found[0].")
    listed = list(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else None
    if listed is None or not all(hasattr(site, "path") for site in listed):
        raise UsageError(f"select takes a list of sites, such as surgeon.find_ffns(graph)[0], but got {sites!r}.")
    return listed


def _attribute(site: object, name: str) -> Any:
    if not hasattr(site, name):
        known = [one for one in dir(site) if not one.startswith("_") and not callable(getattr(site, one))]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(known)}."
        raise UsageError(f"{type(site).__name__} has no attribute '{name}'.{hint}")
    return getattr(site, name)


def _fits(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Collection) and not isinstance(wanted, str):
        return any(_fits(found, one) for one in wanted)
    if isinstance(found, str) and isinstance(wanted, str):
        return matches([wanted], found)
    return bool(found == wanted)
