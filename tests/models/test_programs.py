"""Exported programs: what loads, what is damaged, and what would run code."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from surgeon.errors import LoadError
from surgeon.models.source import load_model
from surgeon.models.weight_files import read_program
from tests.models.tiny import halve


@pytest.fixture
def program(tmp_path: Path, net: nn.Module) -> Path:
    torch.export.save(torch.export.export(net, (torch.ones(2, 3),)), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def rewrite(path: Path, changes: dict[str, bytes]) -> None:
    """Replace or add records of an archive, named without its root folder."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = {name: archive.read(name) for name in archive.namelist()}
    records |= {f"{root}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_program(program: Path, net: nn.Module) -> None:
    source = load_model(program)
    assert source.kind == "pt2"
    x = torch.randn(2, 3)
    assert torch.equal(source.model.module()(x), net(x))


def test_program_with_keyword_inputs_and_an_output_class(tmp_path: Path, gpt2: nn.Module) -> None:
    gpt2.config.use_cache = False
    ids = torch.ones(2, 4, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": None, "output_attentions": False}
    torch.export.save(torch.export.export(gpt2.eval(), (), inputs), tmp_path / "gpt2.pt2")
    program = load_model(tmp_path / "gpt2.pt2").model
    torch.testing.assert_close(program.module()(**inputs).logits, gpt2(**inputs).logits)


def test_truncated_program(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    halve(program)
    for trusted in (False, True):
        with pytest.raises(LoadError, match=r"model.pt2 is damaged or truncated"):
            load_model(program, trust_pickle=trusted)
    assert capfd.readouterr() == ("", "")


def test_program_without_a_graph(program: Path) -> None:
    rewrite(program, {"models/model.json": b"{}"})
    with pytest.raises(LoadError, match=r"not what torch.export.save writes: ExportedProgram.graph_module is missing"):
        load_model(program)


def test_zip_that_is_no_program(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt2")
    with pytest.raises(LoadError, match=r"not a torch.export archive"):
        load_model(tmp_path / "model.pt2")


@pytest.mark.parametrize("place", ["example inputs", "weight", "opaque constant", "compiled"])
def test_program_that_would_run_code(program: Path, tmp_path: Path, place: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save((Bomb(),), tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    if place == "example inputs":
        rewrite(program, {"data/sample_inputs/model.pt": bomb})
    elif place == "weight":
        with zipfile.ZipFile(program) as archive:
            config = json.loads(archive.read("model/data/weights/model_weights_config.json"))
        config["config"]["linear.weight"] |= {"use_pickle": True, "path_name": "weight_0"}
        rewrite(
            program,
            {"data/weights/weight_0": bomb, "data/weights/model_weights_config.json": json.dumps(config).encode()},
        )
    elif place == "opaque constant":
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        config = {"config": {"constant": entry}}
        rewrite(
            program,
            {
                "data/constants/opaque_obj_0": pickle.dumps(Bomb()),
                "data/constants/model_constants_config.json": json.dumps(config).encode(),
            },
        )
    else:
        rewrite(program, {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(LoadError, match=r"holds (pickled|compiled) code"):
        load_model(program)
    assert not (tmp_path / "exploded").exists()
    if place == "example inputs":  # the refusal is not for nothing: the reader does unpickle this record
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(LoadError):
                read_program(program, trust_pickle=True)
        assert (tmp_path / "exploded").exists()
