"""Models that open from every kind of file, and those that cannot be opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from surgeon.data.files import load_data
from surgeon.errors import UsageError
from surgeon.jobs.open_model import open_model
from surgeon.jobs.options import DataOptions

from .harness import Run


def test_models_that_cannot_be_loaded_or_traced_exit_with_3(run: Run, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "weights.pt")
    torch.save(nn.Linear(3, 3), tmp_path / "module.pt")
    (tmp_path / "cut.pt2").write_bytes(b"PK\x03\x04")
    shutil.copytree(tmp_path / "bert", tmp_path / "nan")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "nan/model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "masked", tmp_path / "damaged")
    with (tmp_path / "damaged/model.pt2").open("r+b") as file:
        file.truncate(1000)
    for args, words in (
        (["nothing"], "No file or directory 'nothing'. Models are not downloaded"),
        (["weights.pt"], "weights.pt has weights alone, not a model. Name their architecture with --arch."),
        (["module.pt"], "If you trust it: --trust-pickle."),
        (["cut.pt2"], "cut.pt2"),
        (["nan"], "are NaN or infinite"),
        (["damaged"], "is damaged or was changed"),
        (["nets:nothing"], "nets has no 'nothing'"),
        (["nets:branches", "--inputs", "nets:inputs"], "Branches cannot be traced"),
    ):
        result = run("-q", "inspect", *args)
        assert (result.code, result.out) == (3, ""), args
        assert words in result.err.partition("error: ")[2]
    assert "not a saved surgery" in run("diff", "bert").err
    assert run("diff", "bert").code == 3


def test_trusted_pickles_state_dicts_and_programs_open(run: Run, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 4)
    torch.save(net, tmp_path / "module.pt")
    torch.save(x, tmp_path / "x.pt")
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    import nets

    torch.save(nets.gelu().state_dict(), tmp_path / "weights.pt")
    for args in (
        ["module.pt", "--trust-pickle", "--inputs", "x.pt"],
        ["net.pt2"],
        ["weights.pt", "--arch", "nets:gelu", "--inputs", "nets:inputs"],
    ):
        result = run("-q", "--output", "json", "inspect", *args)
        assert result.code == 0, result.err
        assert result.json["ffns"]


def test_data_must_give_the_inputs_that_were_traced(run: Run, tmp_path: Path) -> None:
    ids = torch.randint(5, 40, (2, 6))
    torch.save({"input_ids": ids}, tmp_path / "ids.pt")
    data = DataOptions("reviews.csv", text="text", label="label", max_length=16)
    with pytest.raises(UsageError, match=r"attention_mask is a tensor, but the graph was traced without it"):
        open_model("bert", inputs="ids.pt", data=data)
    opened = open_model("bert", data=data)
    assert opened.data is not None
    order = [batch.kwargs["input_ids"].tolist() for batch in opened.data.train]
    again = load_data("reviews.csv", tokenizer=opened.origin.tokenizer, config=opened.origin.config, max_length=16)
    assert order == [batch.kwargs["input_ids"].tolist() for batch in again.train]  # opening did not read an epoch
