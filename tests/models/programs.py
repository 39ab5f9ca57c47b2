"""A small exported program, and its archive with records changed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

MODEL = "models/model.json"


class Small(nn.Module):
    """Two linear layers, a buffer, and a size that is an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x))) * self.scale
        return torch.cat([y, y]) + x.shape[0]


def small_program() -> bytes:
    torch.manual_seed(0)
    program = torch.export.export(Small().eval(), (torch.randn(4, 3),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    made = io.BytesIO()
    torch.export.save(program, made)
    return made.getvalue()


def records_of(archive: bytes) -> dict[str, bytes]:
    """The records, with the folder that they are in."""
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def packed(records: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as zipped:
        for name, content in records.items():
            zipped.writestr(name, content)
    return made.getvalue()


def with_records(archive: bytes, changes: dict[str, bytes | None]) -> bytes:
    """Replace, add or (None) remove records, named without their folder."""
    records = records_of(archive)
    folder = next(iter(records)).partition("/")[0]
    for name, content in changes.items():
        if content is None:
            del records[f"{folder}/{name}"]
        else:
            records[f"{folder}/{name}"] = content
    return packed(records)


def with_program(archive: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Change the JSON of the program."""
    folder = next(iter(records_of(archive))).partition("/")[0]
    content = json.loads(records_of(archive)[f"{folder}/{MODEL}"])
    change(content)
    return with_records(archive, {MODEL: json.dumps(content).encode()})
