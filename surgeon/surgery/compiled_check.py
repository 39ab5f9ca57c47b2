"""Write the check of a graph's inputs into what AOTInductor compiles from it.

AOTInductor only checks inputs if an environment variable is set where the package runs, and then not how sizes depend
on one another. A wrong size or dtype would otherwise be read as if it were right. So the check of a package is written
here, from the same sizes as that of the graph, and always runs.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor.codegen import common
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.virtualized import V

from surgeon.errors import SaveError
from surgeon.graph.sizes import Sizes

# Python's division and remainder round down; like `surgeon.graph.sizes.evaluate`, a division by zero gives 0.
_FUNCTIONS = """
static int64_t surgeon_div(int64_t a, int64_t b) { return b == 0 ? 0 : a / b - (a % b != 0 && (a < 0) != (b < 0)); }
static int64_t surgeon_mod(int64_t a, int64_t b) { return b == 0 ? 0 : a - b * surgeon_div(a, b); }
// A tensor's sizes, after a check of everything else about it.
[[maybe_unused]] static const int64_t* surgeon_sizes(
    AtenTensorHandle handle, const char* name, int64_t dims, int32_t dtype, const char* dtype_name,
    const std::string& takes) {
    int64_t own_dims = 0, *sizes = nullptr, *strides = nullptr, expected = 1;
    int32_t own_dtype = 0, device = 0;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &own_dims));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &own_dtype));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    std::string what;
    if (device != aoti_torch_device_type_cpu()) what = "is not on the CPU";
    else if (own_dtype != dtype) what = std::string("is of another dtype than ") + dtype_name;
    else if (own_dims != dims) what = "has " + std::to_string(own_dims) + " dimensions, not " + std::to_string(dims);
    bool empty = false;
    for (int64_t dim = 0; what.empty() && dim < dims; ++dim) empty |= sizes[dim] == 0;
    for (int64_t dim = dims; what.empty() && !empty && dim-- > 0; expected *= sizes[dim])
        if (sizes[dim] != 1 && strides[dim] != expected) what = "is not contiguous; give x.contiguous()";
    if (!what.empty()) throw std::runtime_error(std::string("Wrong inputs: ") + name + " " + what + ". " + takes);
    return sizes;
}
"""


def check_in_cpp(sizes: Sizes, dtypes: list[torch.dtype]) -> str:
    """Return C++ functions with the check, for the hooks that AOTInductor's code has for its own.

    Args:
        sizes: of the inputs, which are all tensors. dtypes: of these; a package takes no other ones.
    """
    words = f"The model takes {', '.join(map(str, sizes.inputs))}"
    words += f" with {axes}." if (axes := sizes.axes_in_words()) else "."
    lines, places = [f"const std::string takes = {json.dumps(words)};"], dict[str, str]()
    conditions: list[tuple[str, str]] = []
    for index, (given, dtype) in enumerate(zip(sizes.inputs, dtypes, strict=True)):
        short = str(dtype).removeprefix("torch.")
        assert given.shape is not None
        lines.append(
            f"[[maybe_unused]] const int64_t* i{index} = surgeon_sizes(input_handles[{index}], "
            f'"{given.name}", {len(given.shape)}, aoti_torch_dtype_{short}(), "{short}", takes);'
        )
        for dim, size in enumerate(given.shape):
            name = f"dimension {dim} of {given.name}"
            if isinstance(size, str) and size in sizes.axes and size not in places:
                places[size] = f"i{index}[{dim}]"
            else:
                conditions.append((f"i{index}[{dim}] == {_in_cpp(str(size))}", f"{name} is not {size}"))
    for name, axis in sizes.axes.items():
        most = "" if axis.most is None else f" && {name}_ <= {axis.most}"
        whole = f" && surgeon_mod({name}_, {axis.multiple}) == 0" if axis.multiple > 1 else ""
        conditions.append((f"({axis.least} <= {name}_{most}{whole})", f"{name} is not {axis}"))
    conditions += [(_in_cpp(rule), f"not {rule}") for rule in sizes.rules]
    lines += [f"[[maybe_unused]] const int64_t {name}_ = {place};" for name, place in places.items()]
    lines += [
        f"if (!({condition})) throw std::runtime_error({json.dumps(f'Wrong inputs: {what}. ')} + takes);"
        for condition, what in conditions
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return f"""
static bool _check_aoti_runtime_check_inputs_env() {{ return false; }}
{_FUNCTIONS}
AOTI_NOINLINE static void __check_inputs_outputs(AtenTensorHandle* input_handles, AtenTensorHandle*) {{
{body}
}}
"""


def _in_cpp(expression: str) -> str:
    """An expression of `surgeon.graph.sizes` in C++, with `_` after the names of axes."""

    def write(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int(value)):
                return f"int64_t({value})"
            case ast.Name(id=name):
                return f"{name}_"
            case ast.UnaryOp(op=ast.Not(), operand=value):
                return f"!{write(value)}"
            case ast.UnaryOp(op=ast.USub(), operand=value):
                return f"(-{write(value)})"
            case ast.BoolOp(op=op, values=values):
                return f"({(' && ' if isinstance(op, ast.And) else ' || ').join(map(write, values))})"
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return f"surgeon_div({write(left)}, {write(right)})"
            case ast.BinOp(left=left, op=ast.Mod(), right=right):
                return f"surgeon_mod({write(left)}, {write(right)})"
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
                return f"({' * '.join([write(left)] * power)})"
            case ast.BinOp(left=left, op=op, right=right):
                return f"({write(left)} {_SIGNS[type(op)]} {write(right)})"
            case ast.Compare(left=left, ops=ops, comparators=others):
                pairs = zip([left, *others], ops, others, strict=False)
                return f"({' && '.join(f'{write(a)} {_SIGNS[type(op)]} {write(b)}' for a, op, b in pairs)})"
            case ast.Call(func=ast.Name(id="min" | "max" as name), args=values):
                return f"std::{name}({{{', '.join(map(write, values))}}})"
        raise ValueError(f"'{ast.unparse(node)}' is no expression of sizes")

    return write(ast.parse(expression, mode="eval").body)


_SIGNS: dict[type, str] = {
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Eq: "==", ast.NotEq: "!="},
    **{ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="},
}


@contextlib.contextmanager
def checked_code(sizes: Sizes) -> Iterator[list[str]]:
    """Let AOTInductor write the check of `sizes`, all of tensors, into what it compiles for CPUs meanwhile.

    Yields:
        The checks that were written: one for each model.
    """
    written: list[str] = []

    class Checked(CppWrapperCpu):
        @staticmethod
        def create(*_: Any, **__: Any) -> CppWrapperCpu:
            return Checked()  # type: ignore[no-untyped-call]

        def generate_input_output_runtime_checks(self) -> None:
            given = list(V.graph.graph_inputs.values())
            if len(given) != len(sizes.inputs):
                raise SaveError(f"The compiled model has {len(given)} inputs, and the graph {len(sizes.inputs)}.")
            written.append(check_in_cpp(sizes, [tensor.get_dtype() for tensor in given]))
            self.prefix.splice_aot(written[-1])

    common.init_backend_registration()
    before = common.device_codegens["cpu"]
    common.register_backend_for_device("cpu", before.scheduling, before.wrapper_codegen, Checked)
    try:
        yield written
    finally:
        common.device_codegens["cpu"] = before
