"""What a report says, in the form that tests compare."""

from __future__ import annotations

from surgeon.passes.report import PassReport


def reasons(report: PassReport) -> list[tuple[str, str]]:
    """(path, reason) of the candidates that were refused."""
    return [(rejection.path, rejection.reason) for rejection in report.rejected]
