#!/usr/bin/env bash
# openvino 2026.4.1: an operator of one's own, evaluated by the CPU plugin, does not get its constants in the types that
# the model declares. int16, uint16 and int64 arrive as int32, and int64 values that do not fit are clamped without a
# word. float16 and float64 arrive as float32. int8 and uint8 stay.
#
# One would guess that `evaluate` sees the element types that `validate_and_infer_types` saw and that `read_model`
# shows: the plugin knows nothing about the operator, so it cannot know what another type would mean to it.
#
# What helps: declare 16-bit and 64-bit data as uint8 of twice or eight times the length, and read it as what it is.
#
# Output seen:
#     openvino 2026.4.1
#     int8: int8, sum 7
#     int16: int32, sum 7
#     int64: int32, sum 2147483647
#     float16: float32, sum 7
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import openvino as ov
from openvino import opset13 as ops

seen = []


class Total(ov.Op):
    """Adds up a constant, and notes the type that it arrives in."""

    def __init__(self, inputs=None):
        super().__init__(self)
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self):
        self.set_output_type(0, ov.Type.f32, ov.PartialShape([1]))

    def clone_with_new_inputs(self, inputs):
        return Total(inputs)

    def visit_attributes(self, visitor):
        return True

    def has_evaluate(self):
        return True

    def evaluate(self, outputs, inputs):
        values = inputs[1].data
        seen.append((values.dtype.name, int(values.astype(np.float64).sum())))
        outputs[0].data[:] = 0
        return True


def arrives(values):
    x, constant = ops.parameter([1], np.float32), ops.constant(values)
    model = ov.Model([Total([x.output(0), constant.output(0)])], [x])
    ov.Core().compile_model(model, "CPU")([np.ones(1, np.float32)])
    return seen[-1]


print("openvino", version("openvino"))
found = {}
for values in (
    np.array([3, 4], np.int8),
    np.array([3, 4], np.int16),
    np.array([2**40], np.int64),
    np.array([3, 4], np.float16),
):
    found[values.dtype.name] = arrives(values)
    print(f"{values.dtype.name}: {found[values.dtype.name][0]}, sum {found[values.dtype.name][1]}")

assert found["int8"] == ("int8", 7)
assert found["int16"] == ("int32", 7)
assert found["int64"] == ("int32", 2**31 - 1)
assert found["float16"] == ("float32", 7)
PYTHON
