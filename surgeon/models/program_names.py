"""The names in an exported program that torch looks up, imports or writes into source code.

Each function takes one text of the program, and raises `NotAllowedError` unless it is of the form that torch writes.
"""

from __future__ import annotations

import importlib
import json
import keyword
import re
import sys
from typing import Any

import torch
from torch._export.serde.serialize import _SYM_OPS
from torch.utils import _pytree as pytree

from surgeon.models.program_sizes import NotAllowedError, short

_PATH_PART = re.compile(r"[\w\- +:/=@,]+")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f\u2028\u2029\"'\\]*")

# Of torch's own operators, those that only compute. Others communicate, profile, or are parts of compiled programs.
_COMPUTING = {"aten", "prims", "quantized", "quantized_decomposed", "mkldnn", "onednn"}
TORCHS_OWN = _COMPUTING | {
    *("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_native", "_quantized", "_test", "aoti"),
    *("aoti_torch", "bundled", "c10d", "cuda", "debug_mode_ops", "debugprims", "dist", "export", "fbgemm", "fsdp"),
    *("inductor", "inductor_prims", "metal", "mkl", "mkldnn_prepacked", "onnx", "onnx_symbolic", "prepacked", "prim"),
    *("profiler", "quantization", "rngprims", "rpc", "sparse", "static_runtime", "streams", "symm_mem", "tensorexpr"),
    *("triton", "vulkan_prepack", "xnnpack"),
}
_ON_FILES = {"aten::from_file", "aten::save"}
# Operators that run another graph of the same program, or say how.
_HIGHER_ORDER = {
    *("associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond", "flex_attention", "foreach_map"),
    *("hints_wrapper", "invoke_subgraph", "map_impl", "out_dtype", "scan", "strict_mode", "tag_activation_checkpoint"),
    *("while_loop", "while_loop_stack_output", "wrap", "wrap_activation_checkpoint", "wrap_with_autocast"),
    "wrap_with_set_grad_enabled",
}
_ON_SIZES = {f"{operator.__module__}.{operator.__name__}" for operator in _SYM_OPS} | {
    *("math.ceil", "math.floor", "math.trunc", "math.sqrt", "math.pow", "_operator.getitem")
}
# The modules of transformers that register operators and output classes. It is a dependency, so they may be imported.
_OPERATORS_OF_TRANSFORMERS = {
    "transformers": "transformers.integrations.moe",
    "transformers_msa": "transformers.integrations.msa_attention",
}
_OUTPUTS_OF_TRANSFORMERS = re.compile(r"(transformers(?:\.models\.\w+)?\.modeling_\w+)\.\w+", re.ASCII)

_FACTORIES = {"list", "dict", "tuple", "set", "int", "float", "bool", "str", "complex"}
_OURS = ("builtins", "collections", "torch", "transformers")


class UnregisteredError(NotAllowedError):
    """A class or an operator is not registered in this process. The message says how to register it.

    what: the message without that. python, command: how, in the words of a Python call and of a command line.
    """

    def __init__(self, what: str, module: str, named: str) -> None:
        self.what = f"{what} is not registered."
        if named in sys.modules:
            known = f"{named} is imported, but does not register it: see torch.export.register_dataclass."
            self.python = self.command = known
        else:
            todo = f"Import {module} first, or name it: "
            self.python = f"{todo}surgeon.load(..., trust_modules=('{named}',))."
            self.command = f"{todo}--trust-module {named}."
        super().__init__(f"{self.what} {self.python}")


# --- names ------------------------------------------------------------------------------------------------------------


def check_identifier(text: str) -> None:
    """A Python identifier that is neither a keyword nor of the form `__x__`."""
    if not text.isidentifier() or keyword.iskeyword(text) or _special(text):
        raise NotAllowedError(f"it has the name {short(text)}, which is no identifier")


def check_keyword_argument(text: str) -> None:
    """The name of an argument of an operator, which may be a keyword such as `from`; empty if it is positional."""
    if text and (not text.isidentifier() or _special(text)):
        raise NotAllowedError(f"it has the argument {short(text)}, which is no identifier")


def check_path(text: str) -> None:
    """The path of a module, parameter or buffer, such as `layers.0.weight`; empty for the whole model."""
    parts = text.split(".") if text else []
    if not all(_PATH_PART.fullmatch(part) and not _special(part) for part in parts):
        raise NotAllowedError(f"it has the path {short(text)}, which is no path of a module")


def _special(text: str) -> bool:
    return text.startswith("__") and text.endswith("__")


# --- operators --------------------------------------------------------------------------------------------------------


def check_operator(text: str) -> None:
    """An operator that only computes: arithmetic of sizes, or an operator that is registered with torch's dispatcher.

    The operators of surgeon and of the libraries that the program comes from must have been registered before.
    """
    if text in _ON_SIZES:
        return
    parts = text.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"]:
        if len(parts) != 4 or parts[3] not in _HIGHER_ORDER:
            raise NotAllowedError(f"it uses the operator {short(text)}, which is not among those that are allowed")
        return
    if len(parts) != 5 or parts[:2] != ["torch", "ops"] or not all(part.isidentifier() for part in parts):
        raise NotAllowedError(f"it calls {short(text)}, which is no operator")
    space, name, overload = parts[2:]
    if (space in TORCHS_OWN and space not in _COMPUTING) or f"{space}::{name}" in _ON_FILES:
        raise NotAllowedError(f"it uses the operator {space}::{name}, which does more than compute")
    if space in _OPERATORS_OF_TRANSFORMERS:
        _import(_OPERATORS_OF_TRANSFORMERS[space])
    try:
        torch._C._dispatch_find_schema_or_throw(f"{space}::{name}", "" if overload == "default" else overload)
    except RuntimeError:
        if space in TORCHS_OWN:
            what = f"{space}::{name}.{overload}, which torch {torch.__version__} does not have"
            raise NotAllowedError(f"it uses the operator {what}") from None
        raise UnregisteredError(
            f"it uses the operator {space}::{name}, which", "the package that defines it", "the_package"
        ) from None


def check_plain(text: str) -> None:
    """A text that torch puts between quotes in source code as it is."""
    if not _PLAIN.fullmatch(text):
        raise NotAllowedError(f"it has the text {short(text)} with a quote, a backslash or a line break")


def check_module_stack(text: str) -> None:
    """The modules around a node: triples `key,path,class`, joined by semicolons. Passes make modules at the paths."""
    for entry in text.split(";"):
        parts, depth = [""], 0
        for letter in entry:
            depth += (letter in "[(") - (letter in "])")
            if letter == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += letter
        if len(parts) != 3:
            raise NotAllowedError(f"it has the module {short(entry)}, which is no key, path and class")
        check_path(parts[1].removeprefix("L['self']."))  # as strict exports of earlier versions name it


def check_source_functions(text: str) -> None:
    """The functions that a node stands for: pairs `name,torch.nn.functional.gelu`, joined by semicolons."""
    for pair in text.split(";"):
        if not all(part.isidentifier() and not _special(part) for part in pair.partition(",")[2].split(".")):
            raise NotAllowedError(f"it has the function {short(pair)}, which is no name")


# --- trees ------------------------------------------------------------------------------------------------------------


def check_tree(text: str, *, arguments: bool) -> None:
    """The structure of inputs or outputs, in which every class is registered with pytree.

    Args:
        arguments: it is a pair of positional and keyword arguments, whose names become those of a function.

    Raises:
        UnregisteredError: a class is not registered. The module that defines it has to be imported first.
        NotAllowedError: the text is anything else.
    """
    try:
        match json.loads(text):
            case [1, dict() as root]:
                _check_tree(root)
                if arguments:
                    _check_keywords(root)
                return
    except NotAllowedError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise NotAllowedError(f"it has the structure of inputs or outputs {short(text)}, which cannot be read")


def _check_tree(spec: dict[str, Any]) -> None:
    kind, context, children = spec["type"], spec["context"], spec["children_spec"]
    if kind is None and context is None and children == []:
        return
    made = _registered(kind)
    if kind == "collections.defaultdict":
        factory = (context["default_factory_module"], context["default_factory_name"])
        if factory != ("collections", "OrderedDict") and (factory[0] != "builtins" or factory[1] not in _FACTORIES):
            raise NotAllowedError("it has a defaultdict with a factory that is no built-in type")
        _check_plain(context["dict_context"])
    elif kind == "collections.namedtuple":
        _registered(context)
    elif pytree.SUPPORTED_SERIALIZED_TYPES[made].from_dumpable_context is None:
        value = json.loads(context)
        if made.__module__.partition(".")[0] in _OURS:
            _check_plain(value)
        else:  # its own code reads it, but torch imports what enumerations name
            _check_no_enumeration(value)
    for child in children:
        _check_tree(child)


def _registered(name: str) -> Any:
    """The class that is registered with pytree under this name."""
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    if name not in known and (ours := _OUTPUTS_OF_TRANSFORMERS.fullmatch(name)):
        _import(ours[1])
    if name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND or name not in known:
        if not all(part.isidentifier() for part in name.split(".")):
            raise NotAllowedError(f"it takes or returns the class {short(name)}, which is no name of a class")
        module = name.rpartition(".")[0] or "the_module"
        raise UnregisteredError(f"it takes or returns the class {name}, which", f"the module {module}", module)
    return known[name]


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise NotAllowedError(f"it needs {module}, which cannot be imported: {error}") from error


def _check_plain(value: Any) -> None:
    """Keys of a dict and the like: values of JSON, and lists of them."""
    if isinstance(value, list):
        for part in value:
            _check_plain(part)
    elif isinstance(value, str):
        check_plain(value)
    elif value is not None and not isinstance(value, int | float):
        raise NotAllowedError("it has a structure of inputs or outputs whose keys are neither texts nor numbers")


def _check_no_enumeration(value: Any) -> None:
    if isinstance(value, dict) and "__enum__" in value:
        raise NotAllowedError("it has a structure of inputs or outputs with an enumeration")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_no_enumeration(part)


def _check_keywords(root: dict[str, Any]) -> None:
    if root["type"] != "builtins.tuple" or len(root["children_spec"]) != 2:
        raise NotAllowedError("its inputs are not a pair of positional and keyword arguments")
    positional, keywords = root["children_spec"]
    if (positional["type"], keywords["type"]) == ("builtins.tuple", "builtins.dict"):
        for name in json.loads(keywords["context"]):
            check_identifier(name)
