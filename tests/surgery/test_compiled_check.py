"""The check in a compiled model says the same as that of the graph."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from surgeon.graph.sizes import Sizes, evaluate
from surgeon.surgery.compiled_check import _FUNCTIONS, _in_cpp, check_in_cpp

EXPRESSIONS = (
    *("a + b * 2 - 3", "a // b", "-a // b", "a % b", "-a % (b + 1)", "a ** 2 * b ** 3", "min(a, b, 2) + max(a, b)"),
    *("a < b <= 3", "a == b or not a % 2 == 0", "a != b and a >= 1", "(a + b) // (a - b)", "5 // (b - a) % 3"),
)


def test_expressions_are_those_of_python(tmp_path: Path) -> None:
    functions = _FUNCTIONS[: _FUNCTIONS.index("// A tensor's sizes")]
    lines = [f"std::cout << int64_t({_in_cpp(text)}) << '\\n';" for text in EXPRESSIONS]
    program = f"""
#include <algorithm>
#include <cstdint>
#include <iostream>
{functions}
int main() {{
  for (int64_t a_ = 0; a_ < 6; ++a_)
    for (int64_t b_ = 0; b_ < 6; ++b_) {{ {" ".join(lines)} }}
}}
"""
    (tmp_path / "program.cpp").write_text(program)
    command = ["c++", "-O0", "-std=c++20", str(tmp_path / "program.cpp"), "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True, capture_output=True)
    found = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=True).stdout.split()
    cases = [(text, {"a": a, "b": b}) for a, b in product(range(6), range(6)) for text in EXPRESSIONS]
    wrong = [
        (text, sizes, number)
        for (text, sizes), number in zip(cases, found, strict=True)
        # Where Python divides by zero, the whole expression is 0; that is left to the division alone here.
        if _defined(text, sizes) and evaluate(text, sizes) != int(number)
    ]
    assert not wrong


def _defined(text: str, sizes: dict[str, int]) -> bool:
    try:
        eval(text, dict(sizes))
    except ZeroDivisionError:
        return False
    return True


def test_what_the_check_says() -> None:
    line = "int(ids[batch, tokens]), x[batch, 3, 2 * tokens], 0 <= batch, 4 <= tokens <= 8, tokens % 2 == 0, batch != 7"
    code = check_in_cpp(Sizes.parse(line), [torch.int64, torch.float32])
    for part in (
        *('"ids", 2, aoti_torch_dtype_int64()', '"x", 3, aoti_torch_dtype_float32()', "const int64_t batch_ = i0[0]"),
        *("i1[1] == int64_t(3)", "i1[2] == (int64_t(2) * tokens_)", "(0 <= batch_)", "(batch_ != int64_t(7))"),
        *("(4 <= tokens_ && tokens_ <= 8 && surgeon_mod(tokens_, 2) == 0)", "tokens is not 4 to 8, multiples of 2"),
    ):
        assert part in code


@pytest.mark.parametrize("text", ["f(a)", "a if b else 1", "a & b", "'x'"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        _in_cpp(text)
