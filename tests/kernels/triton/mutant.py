"""What a mutant of the kernels is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import surgeon.kernels

SOURCE = Path(surgeon.kernels.__path__[0]) / "triton"


@dataclass(frozen=True)
class Mutant:
    """`old`, found once in `module` (behind the text `after`, if that is given), becomes `new`.

    `equivalent` is the reason why nothing can notice.
    """

    module: str
    old: str
    new: str
    after: str = ""
    equivalent: str = ""

    @property
    def name(self) -> str:
        return f"{self.module}: {self.old} → {self.new}" + (f" in {self.after}" if self.after else "")

    def apply(self, folder: Path) -> None:
        file = folder / f"{self.module}.py"
        before, found, text = file.read_text().partition(self.after) if self.after else ("", "", file.read_text())
        assert bool(found) == bool(self.after), self.name
        assert text.count(self.old) == 1 or (self.after and self.old in text), self.name
        file.write_text(before + found + text.replace(self.old, self.new, 1))
