"""All passes in their usual order, and each of them saved and loaded in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.data.data import Data
from surgeon.passes import Lower
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import labelled_vectors, vectors

from .test_conformance import SUITES, USUAL

READER = """
import json, sys, torch, surgeon
result = {}
for directory in sys.argv[2:]:
    graph = surgeon.load(directory)
    inputs = torch.load(sys.argv[1])
    result[directory] = [graph(**one).tolist() for one in inputs]
print(json.dumps(result))
"""


def test_saved_and_loaded_in_another_process_it_is_the_same(traces: Any, tmp_path: Path) -> None:
    batches = [vectors(), vectors(1, 4), vectors(5, 9)]
    torch.save(batches, tmp_path / "inputs.pt")
    want: dict[str, list[Tensor]] = {}
    for suite in SUITES:
        passes = [*suite.first, suite.make()]
        surgery = Pipeline(passes).run(traces(f"stack:{suite.kind}"), inputs=vectors(), data=labelled_vectors(1))
        directory = str(surgery.save(tmp_path / passes[-1].name))
        want[directory] = [surgery.graph.eval()(**batch) for batch in batches]
    command = [sys.executable, "-W", "error::UserWarning:surgeon", "-c", READER, str(tmp_path / "inputs.pt"), *want]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout.splitlines()[-1])
    for directory, outputs in want.items():
        for a, b in zip(got[directory], outputs, strict=True):
            assert torch.allclose(torch.tensor(a), b, atol=1e-5), directory


def test_all_passes_in_their_usual_order(traces: Any) -> None:
    passes = [suite.make() for suite in USUAL]
    data = Data.of(labelled_vectors(2))
    surgery = Pipeline(passes).run(traces("stack:gelu"), inputs=vectors(), data=data)
    assert [report.name for report in surgery.reports] == [one.name for one in passes]
    assert all(report.matched for report in surgery.reports)
    # Projections and feed-forward layers of both blocks as experts, and the head.
    assert len(surgery.reports[-1].matched) == 2 + 2 + 1
    assert isinstance(passes[-1], Lower)
