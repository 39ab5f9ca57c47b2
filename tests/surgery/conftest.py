"""A small model with experts in both forms, and each of them saved. No test changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from tests.small_models import labelled_vectors, stack, vectors
from tests.surgery.forms import FORMS


def converted(form: str) -> Surgery:
    made = Pipeline(FORMS[form]).run(stack("gelu"), inputs=vectors(), data=labelled_vectors(1), seed=5)
    return made.set_tau({"blocks.0.ffn": 0.25, "blocks.1.ffn": 0.5})


@pytest.fixture(scope="session")
def surgeries() -> dict[str, Surgery]:
    """A small model with experts, before and after lowering, with one tau for each layer."""
    return {form: converted(form) for form in FORMS}


@pytest.fixture(scope="session")
def saved(surgeries: dict[str, Surgery], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("saved")
    return {form: surgery.save(place / form) for form, surgery in surgeries.items()}
