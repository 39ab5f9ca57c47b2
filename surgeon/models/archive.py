"""Read the zip archives that torch writes, if every zip reader finds the same undamaged records in them.

torch reads its archives with a reader of its own, which does not compare checksums and does not tell upper from lower
case in names. A check with Python's reader says something about what torch reads only if the two cannot differ. So an
archive must be laid out as torch lays it out: records without compression, one after the other from the first byte on,
then the directory, then its end, and nothing else.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from surgeon.errors import LoadError, first_line

_LOCAL = struct.Struct("<4s5H3L2H")  # the header before each record
_END = struct.Struct("<4s4H2LH")
_END64, _LOCATOR64 = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_SIZES_FOLLOW = 0x8  # a flag: checksum and sizes stand behind the record
_BEHIND = (0, 12, 16, 20, 24)  # the possible lengths of that part
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the part for large files"
_CHUNK = 1 << 20


class Archive:
    """The records of an archive, by name without the folder that all of them are in."""

    def __init__(self, zipped: zipfile.ZipFile, raw: BinaryIO, label: str) -> None:
        self._zipped, self._raw, self._label = zipped, raw, label
        self.records = {info.filename.partition("/")[2]: info for info in zipped.infolist()}

    def read(self, record: str) -> bytes:
        """Return the content of a record.

        Raises:
            LoadError: the archive has no such record.
        """
        if record not in self.records:
            raise LoadError(f"{self._label} is damaged or truncated: it has no record {record}.")
        return self._zipped.read(self.records[record])

    def start(self, record: str) -> int:
        """The place in the file where the content of a record starts."""
        header = self.records[record].header_offset
        self._raw.seek(header)
        local = _LOCAL.unpack(self._raw.read(_LOCAL.size))
        return header + _LOCAL.size + int(local[9]) + int(local[10])

    def mapped(self) -> mmap.mmap:
        """The file in memory. What is written there does not reach the file."""
        return mmap.mmap(self._raw.fileno(), 0, access=mmap.ACCESS_COPY)


@contextmanager
def open_archive(file: Path | bytes, label: str, *, checksums: bool = True) -> Iterator[Archive]:
    """Open an archive, and compare the checksum of every record.

    Args:
        label: how messages name the archive. checksums: False compares only those of the records that are read.

    Raises:
        LoadError: it is no archive, is damaged or truncated, or is not laid out as torch lays it out.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else io.BytesIO(file) as raw, zipfile.ZipFile(raw) as zipped:
            problem = _layout(raw, zipped) or _names(zipped)
            if problem is not None:
                raise LoadError(f"{label} is damaged, or not an archive that torch wrote: {problem}.")
            for info in zipped.infolist() if checksums else ():
                with zipped.open(info) as record:
                    while record.read(_CHUNK):
                        pass
            yield Archive(zipped, raw, label)
    # struct.error and the rest: zipfile does not check every number that it reads.
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, ValueError, OverflowError) as error:
        raise LoadError(f"{label} is damaged or truncated: {first_line(error)}.") from error


def _names(zipped: zipfile.ZipFile) -> str | None:
    """What is wrong with the names: all must be in one folder, and differ in more than upper and lower case."""
    names = [info.filename for info in zipped.infolist()]
    if any(info.orig_filename != info.filename for info in zipped.infolist()):
        return "a name has a character that names cannot have"
    if len({name.partition("/")[0] for name in names}) != 1:
        return "its records are not in one folder"
    if len({name.casefold() for name in names}) != len(names):
        return "a name stands in it twice"
    return None


def _layout(raw: BinaryIO, zipped: zipfile.ZipFile) -> str | None:
    """What is wrong with the layout."""
    size = raw.seek(0, io.SEEK_END)
    raw.seek(size - _END.size)
    signature, disk, first_disk, here, entries, length, start, comment = _END.unpack(raw.read())
    if signature != b"PK\5\6" or disk or first_disk or comment or here != entries:
        return "it has no proper end"
    tail = _END.size
    if size >= tail + _LOCATOR64.size + _END64.size:
        raw.seek(size - tail - _LOCATOR64.size)
        signature, disk, where, disks = _LOCATOR64.unpack(raw.read(_LOCATOR64.size))
        if signature == b"PK\6\7":
            tail += _LOCATOR64.size + _END64.size
            raw.seek(size - tail)
            large = _END64.unpack(raw.read(_END64.size))
            small = (entries, length, start)
            entries, length, start = large[7:]
            fits = all(one in (other, full) for one, other, full in
                       zip(small, large[7:], (_FULL16, _FULL32, _FULL32), strict=True))  # fmt: skip
            if (
                (where, disk, disks) != (size - tail, 0, 1)
                or (large[0], large[1]) != (b"PK\6\6", _END64.size - 12)
                or large[4:6] != (0, 0)
                or large[6] != entries
                or not fits
            ):
                return "it has two ends that differ"
    infos = zipped.infolist()
    if (zipped.start_dir, start + length, entries) != (start, size - tail, len(infos)) or not infos:
        return "its directory is not where its end says"
    position = behind = 0
    for info in infos:
        if info.header_offset - position not in (_BEHIND if behind else (0,)):
            return f"there is something before the record {info.filename!r}"
        raw.seek(info.header_offset)
        local = _LOCAL.unpack(raw.read(_LOCAL.size))
        behind = info.flag_bits & _SIZES_FOLLOW
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            return f"the record {info.filename!r} is compressed, which torch never does"
        stored = (0, info.file_size, _FULL32) if behind else (info.file_size, _FULL32)
        if (
            (local[0], local[2], local[3]) != (b"PK\3\4", info.flag_bits, info.compress_type)
            or not {local[7], local[8]} <= set(stored)
            or (local[6] != info.CRC and not (behind and local[6] == 0))
        ):
            return f"the record {info.filename!r} is described in two ways"
        position = info.header_offset + _LOCAL.size + local[9] + local[10] + info.file_size
    if start - position not in (_BEHIND if behind else (0,)):
        return "there is something before its directory"
    return None
