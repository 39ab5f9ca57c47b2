"""What an exported program may hold. The texts that are refused would leave a file behind if they were evaluated."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._export.serde import schema

from surgeon.errors import LoadError
from surgeon.models.program_guard import TEXTS
from surgeon.models.program_names import (
    TORCHS_OWN,
    check_identifier,
    check_module_stack,
    check_operator,
    check_path,
    check_plain,
    check_source_functions,
    check_tree,
)
from surgeon.models.program_sizes import NotAllowedError, check_expression, check_guard
from surgeon.models.weight_files import read_program
from tests.models.programs import small_program, with_program, with_records

SYMBOL = "Symbol('s77', positive=True, integer=True)"
ALLOWED = {
    check_expression: [
        SYMBOL,
        f"Add(Mul(Integer(-2), {SYMBOL}), Max(Integer(1), TruncToInt(Mul(Float('1.5', precision=53), s0))))",
        f"Pow({SYMBOL}, Integer(2))",
        "Mul(Rational(1, 2), Pow(s0, Rational(1, 2)))",
        f"StrictLessThan(PythonMod({SYMBOL}, Integer(4)), Integer(3))",
        "2*s77 + 1",
        "(s0//2)**2",
    ],
    check_guard: [
        "L['x'].size()[0] >= 2",
        "L['batch']['a b'][0].size()[1] == (2*L['y'].stride()[0]) % 8",
        "(-1) + L['x'].size()[1] >= 2 and not L['flag'] is None",
        "max(1, L['n']) <= math.floor(L['x'].size()[0] / 2)",
    ],
    check_operator: [
        "torch.ops.aten.add.Tensor",
        "_operator.mul",
        "torch.sym_max",
        "torch.ops.higher_order.cond",
    ],
    check_path: ["", "layers.0.weight", "acts.gelu-new.alpha", "layers.0@1"],
    check_identifier: ["x", "p_layers_0_weight", "größe"],
    check_module_stack: ["L__self__,,a.b.Net;L__self__layers.0,layers.0,torch.nn.Linear", "L[x, y],a-b,f.<locals>.C"],
    check_plain: ["a b", "größe=1"],
    check_source_functions: ["linear,torch.nn.modules.linear.Linear;gelu,torch._C._nn.gelu"],
}
MARK = "open('ran', 'w')"
REFUSED = {
    check_expression: [
        MARK,
        f"Symbol('s77', integer={MARK})",
        f"{SYMBOL}.func",
        "exit",
        "S('1')",
        "Symbol('x')",
        "Symbol('s99999999')",
        "Symbol('s0', commutative=False)",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "9**9**9",
        "Pow(Pow(s0, Integer(60)), Integer(60))",
        "Integer('1')",
        "Float('1', precision=10**9)",
        "[s0]",
        "lambda: 0",
        "s0 if s0 else s0",
        "(" * 500 + "s0" + ")" * 500,
        "-" * 9000 + "1",
        "s0 +" * 9000 + "s0",
        "",
        "s0\n",
    ],
    check_guard: [
        MARK,
        "L['x'].size()[0] >= 2 # )",
        'L["x"] == 1',
        "L['x\\'']",
        "L['x'].__class__",
        "L['x'].tolist()",
        "torch.load('x')",
        "f'{L}'",
        "[x for x in L]",
        "L[(y := 1)]",
        "9**9**9 > L['x']",
    ],
    check_operator: [
        "os.system",
        "torch.load",
        "torch.ops.load_library",
        "torch.ops.aten.__class__.default",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "torch.ops.aten.from_file.default",
        "torch.ops.inductor._mm_plus_mm.default",
        "torch.ops.higher_order.aoti_call_delegate",
        "torch.ops.aten.no_such_operator.default",
        "torch.ops.no_such_package.f.default",
        "#ext:op",
        "builtins.eval",
        "",
    ],
    check_path: ["__class__", "a..b", "a.__dict__", 'a"b', "a'b", "a\\b", "a\nb", "a(b)", "a;b"],
    check_identifier: ["", "a b", "class", "__init__", "1a", "a=1", "a,b", "a\n", "a.b"],
    check_module_stack: ["", "a,b", 'key,a"b,Class', "key,a(b),Class", "key,a.__class__,Class", "a,b,c;d"],
    check_plain: ["it's", 'a"b', "a\\b", "a\nb", "\0", "a\u2028b"],
    check_source_functions: ["x,torch.__builtins__.open", "x,", "x"],
}


def pairs(table: dict[Any, list[str]]) -> list[Any]:
    return [pytest.param(check, text, id=f"{check.__name__}-{text[:24]}") for check in table for text in table[check]]


@pytest.mark.parametrize(("check", "text"), pairs(ALLOWED))
def test_forms_that_torch_writes(check: Callable[[str], None], text: str) -> None:
    check(text)


@pytest.mark.parametrize(("check", "text"), pairs(REFUSED))
def test_other_forms(check: Callable[[str], None], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAllowedError) as error:
        check(text)
    assert len(str(error.value)) < 300
    assert not (tmp_path / "ran").exists()


LEAF = {"type": None, "context": None, "children_spec": []}


def tree(kind: str, context: object, *children: object) -> dict[str, object]:
    return {"type": kind, "context": context, "children_spec": list(children)}


@pytest.mark.parametrize(
    "spec",
    [
        tree("builtins.dict", '["a b", 1, null]', LEAF, LEAF, LEAF),
        tree("builtins.list", "null", tree("collections.OrderedDict", '["x"]', LEAF)),
        tree("torch.Size", "null", LEAF),
        tree("transformers.modeling_outputs.BaseModelOutput", '["last_hidden_state"]', LEAF),
        tree("transformers.models.bert.modeling_bert.BertForPreTrainingOutput", '["prediction_logits"]', LEAF),
        tree(
            "collections.defaultdict",
            {"default_factory_module": "builtins", "default_factory_name": "list", "dict_context": ["a"]},
            LEAF,
        ),
    ],
)
def test_trees(spec: dict[str, object]) -> None:
    check_tree(json.dumps([1, spec]), arguments=False)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            tree("my_models.Output", '["x"]', LEAF),
            r"my_models\.Output, which is not registered\. Import the module my_mo",
        ),
        (tree("NO_SERIALIZED_TYPE_NAME_FOUND", "null"), "not registered"),
        (tree("collections.namedtuple", "my_models.Pair", LEAF), "my_models.Pair"),
        (tree("transformers.commands.serve.Output", "null"), "not registered"),
        (tree("builtins.dict", '[{"__enum__": true, "fqn": "left_module:A", "name": "B"}]', LEAF), "neither texts nor"),
        (
            tree(
                "collections.defaultdict",
                {"default_factory_module": "left_module", "default_factory_name": "f", "dict_context": []},
            ),
            "defaultdict with a factory",
        ),
        (tree("builtins.dict", "[", LEAF), "cannot be read"),
        (tree("builtins.dict", json.dumps(["it's"]), LEAF), "with a quote"),
        (tree("own\x1b[0m.Class", "null"), r"'own\\x1b\[0m\.Class', which is no name"),
        ({"type": None}, "cannot be read"),
        ([1, 2], "cannot be read"),
        (tree("builtins.tuple", "null", tree("builtins.tuple", "null"), tree("builtins.dict", '["a b"]', LEAF)), "a b"),
        (LEAF, "not a pair of positional and keyword"),
    ],
)
def test_other_trees(spec: object, words: str, write_module: Callable[[str, str], None]) -> None:
    write_module("left_module", "raise SystemExit('imported')")
    with pytest.raises(NotAllowedError, match=words):
        check_tree(json.dumps([1, spec]), arguments=True)
    assert "left_module" not in sys.modules


def test_every_text_of_the_schema_has_a_form() -> None:
    """A new version of torch may add texts. Each must get a form before programs with it are read."""

    def texts(kind: Any, seen: set[Any]) -> typing.Iterator[tuple[Any, str]]:
        if kind in seen:
            return
        seen.add(kind)
        hints = typing.get_type_hints(kind, vars(schema))
        for field in dataclasses.fields(kind):
            inner = [hints[field.name]]
            for part in inner:
                inner.extend(typing.get_args(part))
            if str in inner:
                yield kind, field.name
            for part in inner:
                if isinstance(part, typing.ForwardRef):
                    part = getattr(schema, part.__forward_arg__)
                if dataclasses.is_dataclass(part):
                    yield from texts(part, seen)

    seen: set[Any] = set()
    found = {*texts(schema.ExportedProgram, seen), *texts(schema.PayloadConfig, seen)}
    assert found == {(kind, name) for kind, names in TEXTS.items() for name in names}


def test_every_namespace_of_torch_is_known() -> None:
    """An operator of any other namespace counts as one that the user registered."""
    code = "import torch; print(*{n.partition('::')[0] for n in torch._C._dispatch_get_all_op_names()})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) > 5
    assert set(found) <= TORCHS_OWN


# --- whole archives ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive() -> bytes:
    return small_program()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes, str], None]:
    def check(content: bytes, words: str) -> None:
        path = tmp_path / "model.pt2"
        path.write_bytes(content)
        with pytest.raises(LoadError, match=words) as error:
            read_program(path)
        assert str(error.value).startswith("model.pt2")

    return check


RECORDS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "unknown": ({"data/other": b"x"}, "torch.export writes no record 'data/other'"),
    "other case": ({"Models/model.json": b"{}"}, "a name stands in it twice"),
    "second program": ({"models/b.json": b"{}"}, "writes no record 'models/b.json'"),
    "compiled": ({"data/aotinductor/model/model.so": b"\x7fELF"}, "holds compiled code"),
    "script object": ({"data/constants/custom_obj_0": b"x"}, "holds pickled code"),
    "no example inputs": ({"data/sample_inputs/model.pt": None}, "has no record data/sample_inputs/model.pt"),
    "weights elsewhere": (
        {"data/weights/model_weights_config.json": b'{"config": {"a": {"path_name": "../x", "is_param": true, '
         b'"use_pickle": false, "tensor_meta": null}}}'},
        "which is no record of weights",
    ),
    "deep JSON": ({"models/model.json": b"[" * 100_000}, "not valid JSON"),
    "no JSON": ({"models/model.json": b"\xff"}, "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_records(archive: bytes, refused: Callable[[bytes, str], None], case: str) -> None:
    changes, words = RECORDS[case]
    refused(with_records(archive, changes), words)


def node(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["graph"]["nodes"][0]
    return found


def signature(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["module_call_graph"][0]["signature"]
    return found


def size(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]
    return found


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "size": (lambda p: size(p).update(expr_str=MARK), "is not arithmetic of sizes"),
    "range": (lambda p: p["range_constraints"].update({MARK: {"min_val": 1, "max_val": 2}}), "is not arithmetic"),
    "guard": (lambda p: p["guards_code"].append(MARK), "is not a condition on sizes"),
    "operator": (lambda p: node(p).update(target="torch.os.system"), "is no operator"),
    "node": (lambda p: node(p).update(name="x = 1"), "is no identifier"),
    "argument": (lambda p: signature(p)["forward_arg_names"].append("x=1"), "is no identifier"),
    "same argument": (lambda p: signature(p)["forward_arg_names"].append("x"), "cannot be loaded"),
    "tree": (lambda p: signature(p).update(out_spec="[1, 2]"), "cannot be read"),
    "wrong type": (lambda p: node(p).update(inputs={}), r"Node\.inputs has a value of the wrong type \(dict\)"),
    "truth value": (lambda p: size(p).update(hint={"as_int": True}), "wrong type"),
    "large number": (lambda p: size(p).update(hint={"as_int": 2**70}), "too large"),
    "unknown kind": (lambda p: size(p).update(hint={"as_text": "a"}), "not one of the kinds"),
    "no text": (lambda p: node(p).pop("target"), r"Node\.target is missing"),
    "module": (lambda p: node(p)["metadata"].update(nn_module_stack="x,a(b),C"), "is no path of a module"),
    "constant": (lambda p: p["graph_module"]["graph"]["inputs"].append({"as_string": "'"}), "with a quote"),
    "no root": (lambda p: p["graph_module"]["module_call_graph"].pop(0), "cannot be loaded"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_programs(
    archive: bytes, refused: Callable[[bytes, str], None], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, words = CHANGES[case]
    refused(with_program(archive, change), words)
    assert not (tmp_path / "ran").exists()


def test_a_trusted_program_may_hold_more(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(with_records(archive, {"data/other": b"x"}))
    assert read_program(tmp_path / "model.pt2", trust_pickle=True)


def test_extra_files_are_allowed(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    torch.export.save(program, tmp_path / "model.pt2", extra_files={"notes.txt": "hello"})
    assert read_program(tmp_path / "model.pt2")
