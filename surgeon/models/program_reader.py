"""Make a program of a checked archive, as torch does, in a part of its time.

torch copies all weights, looks up the types of a class for every value that has it, and parses the text of a size for
every tensor with that size. Here the weights stay in the file, whose pages are read when they are used, and the rest is
done once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, GraphModuleDeserializer
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import _load_constants, _load_state_dict

from surgeon.models.archive import Archive


def make_program(program: schema.ExportedProgram, archive: Archive, inputs: str) -> ExportedProgram:
    """Return the program of an archive. Its weights may be written to: that changes the memory and not the file.

    Args:
        program: what the archive says of the graph, checked. inputs: the record with the example inputs.

    Raises:
        Exception: of any type, where parts of the archive do not fit each other.
    """
    reader: Any = _Reader(archive)
    state, constants = _load_state_dict(reader, "model"), _load_constants(reader, "model")
    with _sizes_parsed_once():
        made: ExportedProgram = ExportedProgramDeserializer().deserialize(
            program, state, constants, reader.read_bytes(inputs)
        )
    return made


class _Reader:
    """What torch's functions call of its own reader of archives, and of the file in that."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self.archive_file = self
        # Windows replaces no file that is mapped, and a surgery is saved over the one that was loaded.
        self._mapped = None if sys.platform == "win32" else archive.mapped()

    def get_file_names(self) -> list[str]:
        return list(self._archive.records)

    def read_bytes(self, record: str) -> bytes:
        return self._archive.read(record)

    def read_string(self, record: str) -> str:
        return self._archive.read(record).decode()

    def get_record_size(self, record: str) -> int:
        return self._archive.records[record].file_size

    def get_storage_from_record(self, record: str, count: int, dtype: torch.dtype) -> Tensor:
        """The numbers of a record, in a storage of their own."""
        if self._mapped is None:
            return torch.frombuffer(bytearray(self._archive.read(record)), dtype=dtype, count=count)
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=self._archive.start(record))


@contextmanager
def _sizes_parsed_once() -> Iterator[None]:
    """Let torch parse each text of a size once: a graph has few of them, and thousands of tensors."""
    parse = GraphModuleDeserializer._parse_sym_expr
    parsed: dict[tuple[Any, ...], Any] = {}

    def parse_once(self: GraphModuleDeserializer, text: Any, hint: Any = None) -> Any:
        key = (self.shape_env, text, type(hint), hint)
        if key not in parsed:
            parsed[key] = parse(self, text, hint)
        return parsed[key]

    with mock.patch.object(GraphModuleDeserializer, "_parse_sym_expr", parse_once):
        yield
