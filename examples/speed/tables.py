"""Print the results of `surgeon bench layer` as the Markdown tables of the README beside this.

    python examples/speed/tables.py examples/speed/results/amx/*.json

One layer: how many times as fast as the dense layer, the faster of eager and compiled, ours is and, in brackets, the
torch backend where it was timed. A surgery: milliseconds at every tau, or in every engine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def markdown(head: Sequence[str], *rows: Sequence[str]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def times(factor: float) -> str:
    """With as many digits as these figures are good for."""
    return f"{factor:.2f}" if factor < 0.995 else f"{factor:.1f}"


def milliseconds(took: float | None) -> str:
    """Nothing for what was not timed."""
    return "" if took is None else f"{took:.3g}"


def gains(cell: dict[str, Any]) -> str:
    """Of ours over dense, and of the torch backend."""
    took = {name: timing["milliseconds"] for name, timing in cell["methods"].items()}
    if "torch" not in took or took["torch"] is None:
        return times(cell["gain"])
    dense = min(took[name] for name in ("dense", "compiled") if took.get(name) is not None)
    return f"{times(cell['gain'])} ({times(dense / took['torch'])})"


def eight_bits(found: dict[str, Any]) -> str:
    """A table of milliseconds with 8-bit weights: a row for every number of tokens and share of the experts."""
    others = [name for name in found["cells"][0]["methods"] if name not in ("ours", "ours_int8")]
    rows = []
    for cell in found["cells"]:
        took = {name: timing["milliseconds"] for name, timing in cell["methods"].items()}
        fastest = min(took[name] for name in others if took[name] is not None)
        rows.append(
            [
                f"{cell['tokens']:,}",
                f"{cell['share']:.0%}",
                *(milliseconds(took[name]) for name in (*others, "ours_int8")),
                f"{times(fastest / took['ours_int8'])}×",
            ]
        )
    return markdown(["tokens", "experts selected", *others, "ours", "as fast"], *rows)


def layer(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A title and a table for each dtype: shares of the experts down, tokens and sizes of experts across."""
    if "ours_int8" in found["cells"][0]["methods"]:
        yield f"{found['width']} → {found['hidden']}{', gated' * found['gated']}, 8 bits:", eight_bits(found)
        return
    cells = {(cell["dtype"], cell["tokens"], cell["size"], cell["share"]): cell for cell in found["cells"]}
    dtypes, tokens, sizes, shares = ({key[at]: None for key in cells} for at in range(4))
    for dtype in dtypes:
        head = ["experts selected"]
        for count in tokens:
            plural = "s" * (count != 1)
            head += [
                f"{count:,} token{plural}, experts of {size}" if at == 0 else str(size) for at, size in enumerate(sizes)
            ]
        rows = [
            [f"{share:.0%}", *(gains(cells[dtype, count, size, share]) for count in tokens for size in sizes)]
            for share in shares
        ]
        yield f"{found['width']} → {found['hidden']}{', gated' * found['gated']}, {dtype}:", markdown(head, *rows)


def surgery(found: dict[str, Any]) -> str:
    """A table with a row for every tau."""
    dense = found["times"]
    head = ["experts that ran", "dense", "dense, compiled", "ours", "ours, compiled", "as fast"]
    rows = [
        [
            f"{setting['executed']:.0%}",
            *(milliseconds(took) for took in (dense["dense"], dense["compiled"], setting["ours"], setting["compiled"])),
            "" if setting["gain"] is None else f"{setting['gain']:.2f}×",
        ]
        for setting in dense["settings"]
    ]
    return markdown(head, *rows)


def engines(found: dict[str, Any]) -> str:
    """A table with a row for every engine and way to store the other linears: dense, with experts, how far off."""
    rows: dict[tuple[str, str], dict[bool, dict[str, Any]]] = {}
    for row in found["found"]["rows"]:
        rows.setdefault((row["engine"], row["numbers"]), {})[row["experts"]] = row
    lines = []
    for (engine, numbers), pair in rows.items():
        took = [pair.get(experts, {}).get("milliseconds") for experts in (False, True)]
        if any(took):
            off = pair.get(True, {}).get("error")
            lines.append([engine, numbers, *map(milliseconds, took), "" if off is None else f"{off:.1%}"])
    return markdown(["engine", "stored in", "dense", "with experts", "differs by"], *lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what `surgeon bench layer -o` wrote")
    for path in parser.parse_args().results:
        found = json.loads(path.read_text())
        if "cells" in found:
            parts = [part for pair in layer(found) for part in pair]
        else:
            parts = [engines(found) if "found" in found else surgery(found)]
        print(f"\n{path}", *parts, sep="\n\n")


if __name__ == "__main__":
    main()
