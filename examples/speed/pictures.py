"""Draw the pictures of stored results again, each beside its numbers.

    python examples/speed/pictures.py

Only results that have a picture get one.
"""

from __future__ import annotations

from pathlib import Path

from surgeon.jobs.bench_layer import LayerBenchmark
from surgeon.jobs.bench_surgery import SurgeryBenchmark
from surgeon.render.bench_layer import layer_plot
from surgeon.render.bench_plot import Plot
from surgeon.render.bench_surgery import surgery_plot
from surgeon.surgery.record import parse, read_json

RESULTS = Path(__file__).with_name("results")


def plot(file: Path) -> Plot:
    """The plot of the numbers in a file."""
    found = read_json(file)
    if "cells" in found:
        # Older results have no 8-bit experts.
        found["cells"] = [{"int8_gain": None, **cell} for cell in found["cells"]]
        return layer_plot(parse(LayerBenchmark, found, file))
    return surgery_plot(parse(SurgeryBenchmark, found, file))


if __name__ == "__main__":
    for picture in sorted(RESULTS.glob("*/*.png")):
        plot(picture.with_suffix(".json")).draw(picture)
        print(picture)
