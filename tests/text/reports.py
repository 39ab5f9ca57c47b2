"""Reports to show."""

from __future__ import annotations

from surgeon.measure.cost import Cost
from surgeon.passes import Moeify
from surgeon.passes.report import PassReport, SiteChange
from surgeon.sites.rejection import Rejection


def site(path: str, executed: float | None = 1.0) -> SiteChange:
    return SiteChange(
        path,
        "FFN 384→1536→384 gelu",
        "48 experts × 32, router 128",
        (1181568, 1236864),
        (1179648, 1234944),
        ("a", "b"),
        (f"{path}.moe",),
        executed,
    )


def report(**changes: object) -> PassReport:
    paths = [f"encoder.layer.{index}" for index in range(6)]
    values: dict[str, object] = {
        "name": "moeify",
        "options": {"experts": 48},
        "matched": paths,
        "rejected": (
            Rejection(
                "pooler", "tanh between linears 384→384→2 is a pooler or a classifier head, not an FFN", "pooler"
            ),
        ),
        "sites": tuple(site(path) for path in paths),
        "seconds": 23.4,
        "before": Cost(22_600_000, 176_000_000, 176_000_000),
        "after": Cost(23_000_000, 184_000_000, 184_000_000, 1.0),
        "max_error": 2.1e-07,
        "notes": (Moeify.untrained,),
    }
    return PassReport(**{**values, **changes})  # type: ignore[arg-type]
