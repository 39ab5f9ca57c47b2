"""`surgeon export --to`: surgeries for other engines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import Run, left, run_surgeon

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and the engines


@pytest.fixture(scope="module")
def int8(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved BERT whose experts have 8-bit weights."""
    place = tmp_path_factory.mktemp("int8") / "bert-int8"
    result = run_surgeon("-q", "apply", "--passes", "quantize", str(shelf / "bert-moe"), "-o", str(place))
    assert result.code == 0, result.err
    return place


LOAD = """
import sys
sys.modules["surgeon"] = sys.modules["torch"] = None
import numpy
{lines}
found = model({{"input_ids": numpy.ones((1, 4), int), "attention_mask": numpy.ones((1, 4), int)}})
print(found["logits"].shape)
"""


def test_openvino_with_what_the_answer_says_loads_it(run: Run, int8: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    options = ("--to", "openvino", "--linears", "int8", "--data", "reviews.csv", "-o", "out")
    result = run("-q", "export", str(int8), *options, "--output", "json")
    assert result.code == 0, result.err
    made = result.json["made"]
    assert (made["inputs"], made["outputs"]) == (["input_ids", "attention_mask"], ["logits"])
    assert made["float_error"] < 0.1
    assert made["error"] < 0.5
    assert made["samples"] > 2
    assert {"openvino_model.xml", "openvino_model.bin", "surgeon_openvino.so", "config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    card = (tmp_path / "out/README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("PATH", "out")
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(lines=lines)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "(1, 2)", done.stderr
    again = run("export", str(int8), "--to", "openvino", "-o", "out")
    assert (again.code, again.err) == (
        4, "error: out exists. Give another directory with -o, or replace it with --overwrite.\n"
    )  # fmt: skip


def test_onnx(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = run("-q", "export", "bert-moe", "--to", "onnx")
    assert result.code == 0, result.err
    assert 'onnxruntime.InferenceSession("bert-moe-onnx/model.onnx")' in result.out
    assert "linears outside of experts: float" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "tflite"), "--to tflite: there are transformers, openvino, onnx."),
        (("--linears", "int8"), "--linears int8 is for --to openvino."),
        (("--to", "openvino", "--linears", "int2"), "--linears int2: there are float, int8, int8-weights"),
        (("--to", "openvino"), "OpenVINO runs experts with 8-bit weights only. Quantise them first"),
        (("--to", "onnx", "-o", "bert-moe/inside"), "bert-moe/inside is the surgery itself"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    if options == ("--to", "openvino"):
        pytest.importorskip("openvino")
    result = run("-q", "export", "bert-moe", *options)
    assert result.code == 2
    assert words in result.err
    assert not left(tmp_path)


def test_onnx_has_no_8_bit_experts(run: Run, int8: Path, tmp_path: Path) -> None:
    result = run("-q", "export", str(int8), "--to", "onnx", "-o", "out")
    assert result.code == 2
    assert "ONNX has no operator for experts with 8-bit weights" in result.err
    assert not left(tmp_path)
