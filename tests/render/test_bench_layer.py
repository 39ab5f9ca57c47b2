"""How a layer's times look, on the screen and as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from surgeon.bench.engines import ENGINES
from surgeon.bench.grid import Cell, Timing
from surgeon.bench.methods import METHODS
from surgeon.errors import SaveError
from surgeon.jobs.bench_layer import LayerBenchmark
from surgeon.json_values import to_json
from surgeon.render.bench_layer import layer_plot, layer_view
from surgeon.render.files import write_result
from surgeon.text.plain import plain_text

from .benchmarks import MACHINE, lines

OWN = [name for name in METHODS if name not in ENGINES and name not in ("ours_int8", "ours_int4", "ours_fp8")]


def cell(share: float, tokens: int = 2048, mask: str = "uniform", **missing: str) -> Cell:
    times = {name: Timing(12345.6 if name == "loop" else 100.0 * (1 + n), 4.4e-7) for n, name in enumerate(OWN)}
    times |= {name: Timing(None, None, why) for name, why in missing.items()}
    return Cell(
        "float32", tokens, 24, mask, share, share, times, 12.34, None, 0.9 / share, 1 / share, 55.0, "memory", 1.08
    )


CELLS = [cell(0.05), cell(1.0), cell(0.2, 1, grouped_mm="strides should be multiple of 16 bytes")]
LAYER = LayerBenchmark(MACHINE, 768, 3072, False, "relu", CELLS)


def test_a_layer_fits_a_hundred_columns_with_every_method() -> None:
    shown = lines(layer_view(LAYER))
    assert max(map(len, shown)) <= 100
    start = next(index for index, line in enumerate(shown) if line.startswith("float32, 2,048 tokens"))
    assert shown[start].split("  ") == ["float32, 2,048 tokens, 128 experts × 24", "uniform selection"]
    assert shown[start + 1].split() == ["com-", "grouped", "pub-", "ours,", "dense", "all", "on", "of"]
    names = "share dense piled masked loop _mm lished torch ours all on /ours /ours limit"
    assert shown[start + 2].split() == names.split()
    times = "100 200 300 12346 500 600 700 800 900 12.34× 18/20 108% m"
    assert shown[start + 3].split() == ["5.0%", *times.split()]
    assert shown[start + 4].split()[-3:] == ["0.9/1.0", "108%", "m"]
    assert shown[start + 5].split() == ["error", *["4e-07"] * 9]


def test_a_picture_has_dtypes_side_by_side_where_they_fit() -> None:
    def titles(sizes: tuple[int, ...]) -> tuple[int, list[str]]:
        cells = [
            dataclasses.replace(cell(share, tokens), dtype=dtype, size=size)
            for dtype in ("float32", "bfloat16") for tokens in (64, 8) for size in sizes for share in (0.1, 0.5)
        ]  # fmt: skip
        plot = layer_plot(dataclasses.replace(LAYER, cells=cells))
        return plot.columns, [panel.title for panel in plot.panels]

    columns, shown = titles((128, 24))
    assert columns == 4
    row = [f"{dtype}, 64 tokens, experts of {size}" for dtype in ("float32", "bfloat16") for size in (128, 24)]
    assert shown == row + [title.replace("64 tokens", "8 tokens") for title in row]
    columns, shown = titles((128, 24, 6))
    assert columns == 3
    assert shown[3] == "float32, 8 tokens, experts of 128"


def test_a_layer_says_what_it_ran_on() -> None:
    shown = lines(layer_view(LAYER))
    assert shown[0] == "AMD EPYC, 1 thread; torch 2.13.0+cpu, AVX2; kernels: native, avx2."
    assert shown[1] == ("Measured limits: 72.3 GFLOP/s in float32, 72.3 GFLOP/s in bfloat16; 11.2 GB/s from memory.")
    assert shown[3] == "Layer 768 → 3072 → 768, relu, random weights."


def test_a_gpu_says_how_calls_are_started() -> None:
    machine = dataclasses.replace(MACHINE, device="cuda", gpu="NVIDIA H100 80GB HBM3", kernels="Triton 3.9.0")
    text = " ".join(plain_text(layer_view(dataclasses.replace(LAYER, machine=machine)), 1000).split())
    assert text.startswith("NVIDIA H100 80GB HBM3; torch 2.13.0+cpu; kernels: Triton 3.9.0.")
    assert "except those in which Python waits for the GPU: loop, grouped_mm, published, torch." in text
    assert "8 layers" not in text
    assert "8 layers" in plain_text(layer_view(LAYER), 1000)


def test_a_slow_half_type_is_told() -> None:
    slow = dataclasses.replace(MACHINE, gemm={"float32": 72.3e9, "bfloat16": 8e9})
    last = lines(layer_view(dataclasses.replace(LAYER, machine=slow)), 1000)[-1]
    assert last.startswith("note: torch multiplies bfloat16 at 8.00 GFLOP/s here, and float32 at 72.3 GFLOP/s.")
    assert "torch multiplies" not in plain_text(layer_view(LAYER))


def test_a_method_that_did_not_run_has_no_column_but_a_reason() -> None:
    text = plain_text(layer_view(LayerBenchmark(MACHINE, 768, 3072, True, "silu", CELLS[2:])), 100)
    assert "grouped " not in text
    assert "grouped_mm did not run: strides should be multiple of 16 bytes" in text
    assert "gated silu" in text
    assert "float32, 1 token, 128 experts × 24" in text


@pytest.mark.parametrize(
    "found",
    [LAYER, LayerBenchmark(MACHINE, 768, 3072, False, "relu", [cell(0.1), cell(0.1, mask="skewed")])],
    ids=["layer", "masks"],
)
def test_files_are_written(found: LayerBenchmark, tmp_path: Path) -> None:
    write_result(found, tmp_path / "a.json", layer_plot(found).draw)
    write_result(found, tmp_path / "a.png", layer_plot(found).draw)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(to_json(found)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for name in ("a.json", "a.png"):
        with pytest.raises(SaveError, match="Cannot write"):
            write_result(LAYER, tmp_path / "nowhere" / name, layer_plot(LAYER).draw)
