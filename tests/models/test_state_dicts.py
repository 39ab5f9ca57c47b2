"""State dicts: the architecture they are filled into, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from surgeon.errors import LoadError
from surgeon.models.source import load_model
from surgeon.models.weight_names import best_fit
from tests.models.tiny import BERT, GPT2, halve


def test_state_dict_needs_an_architecture(tmp_path: Path, gpt2: nn.Module) -> None:
    torch.save(gpt2.state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoadError) as error:
        load_model(tmp_path / "model.pt")
    assert str(error.value) == (
        "model.pt has weights alone, not a model. Name their architecture with arch=. An architecture is a config.json "
        "or its directory, a model type of transformers such as bert, or module:function."
    )


@pytest.mark.parametrize("named", [True, False])
def test_state_dict_with_a_config(tmp_path: Path, gpt2: transformers.GPT2LMHeadModel, named: bool) -> None:
    config = transformers.GPT2Config(**GPT2, architectures=["GPT2LMHeadModel"] if named else None)
    config.save_pretrained(tmp_path / "arch")
    weights = {name: value for name, value in gpt2.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    source = load_model(tmp_path / "model.safetensors", arch=str(tmp_path / "arch" / "config.json"))
    assert source.kind == "state_dict"
    assert type(source.model) is transformers.GPT2LMHeadModel
    assert source.model.lm_head.weight is source.model.transformer.wte.weight
    ids = torch.arange(6).reshape(2, 3)
    assert torch.equal(source.model(ids).logits, gpt2.eval()(ids).logits)


def test_state_dict_picks_the_head_that_fits(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT)
    config.save_pretrained(tmp_path / "arch")
    for cls in (transformers.BertForMaskedLM, transformers.BertForSequenceClassification, transformers.BertModel):
        torch.save(cls(config).state_dict(), tmp_path / "model.pth")
        assert type(load_model(tmp_path / "model.pth", arch=str(tmp_path / "arch")).model) is cls


def test_state_dict_of_a_function_wrapped_and_in_half_precision(tmp_path: Path, net: nn.Module) -> None:
    state = {f"module.{name}": value.half() for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    source = load_model(tmp_path / "model.ckpt", arch="mynet:build")
    assert source.model.linear.weight.dtype == torch.float16
    assert source.notes == (
        "The weights were read from the key 'state_dict'.",
        "These parts of the names of the weights were left out: 'module'.",
    )


def test_state_dict_that_does_not_fit(tmp_path: Path, net: nn.Module) -> None:
    torch.save({"linear.weight": torch.ones(4, 5), "head": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(LoadError) as error:
        load_model(tmp_path / "model.pt", arch="mynet:build")
    message = str(error.value)
    assert "1 missing: linear.bias" in message
    assert "1 unexpected: head" in message
    assert "1 of the wrong shape: linear.weight (4, 5) instead of (4, 3)" in message


def test_state_dict_of_an_unknown_architecture(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"No architecture 'gtp2'. Did you mean 'gpt2'\?"):
        load_model(tmp_path / "model.pt", arch="gtp2")
    with pytest.raises(LoadError, match="mynet:number returned a int"):
        load_model(tmp_path / "model.pt", arch="mynet:number")
    with pytest.raises(LoadError, match="transformers has no AutoModelForCausalLM for the architecture vit"):
        load_model(tmp_path / "model.pt", arch="vit", task="causal-lm")


def test_architecture_by_model_type(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        LoadError, match=r"does not fit the architecture vit \(ViTForImageClassification\).*config.json that has them"
    ):
        load_model(tmp_path / "model.pt", arch="vit")


def test_damaged_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    halve(tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="damaged or truncated"):
        load_model(tmp_path / "model.safetensors", arch="gpt2")


def nested() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    return nn.Sequential(block, nn.BatchNorm1d(3), nn.ModuleDict({"module": nn.Linear(3, 3)}))


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in nested().state_dict().items()}


def averaged() -> dict[str, Any]:
    model = torch.optim.swa_utils.AveragedModel(torch.nn.parallel.DataParallel(nested()))
    return {"step": 3, "ema": model.state_dict()}


def compiled_blocks() -> dict[str, Tensor]:
    model = nested()
    model[0] = torch.compile(model[0], backend="eager")
    return model.state_dict()


def checkpointed_blocks() -> dict[str, Tensor]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nested()
    model[2]["module"] = checkpoint_wrapper(model[2]["module"])
    return {f"module.{name}": value for name, value in model.state_dict().items()}


SAVED: dict[str, Callable[[], Any]] = {
    "compiled and distributed": lambda: renamed(lambda name: f"_orig_mod.module.{name}"),
    "distributed and compiled": lambda: renamed(lambda name: f"module._orig_mod.{name}"),
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": checkpointed_blocks,
    "sharded": lambda: renamed(lambda name: f"_fsdp_wrapped_module.{name.replace('2.', '2._fsdp_wrapped_module.')}"),
    "averaged": averaged,
    "lightning": lambda: {
        "state_dict": renamed(lambda name: f"net.{name}") | {"loss.weight": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    },
    "with an average": lambda: {
        "args": {0: torch.ones(1)},
        "teacher": {"backbone": renamed(lambda name: f"module.{name}")},
    },
    "deep among others": lambda: (
        {"x": torch.ones(3), "a.x": torch.ones(3), "a.b.x": torch.ones(3)} | renamed(lambda name: f"a.b.c.{name}")
    ),
    "its own names": lambda: renamed(str),
}


@pytest.mark.parametrize("form", SAVED)
def test_names_of_wrapped_models(form: str) -> None:
    fit = best_fit(SAVED[form](), nested())
    assert not fit.problems
    expected = nested().state_dict()
    assert fit.state.keys() == expected.keys()
    assert all(torch.equal(fit.state[name], expected[name]) for name in expected)
    assert bool(fit.notes) == (form != "its own names")
    assert not any("fit as well" in note for note in fit.notes)


def test_what_was_left_out_is_noted() -> None:
    fit = best_fit(SAVED["lightning"](), nested())
    assert fit.notes == (
        "The weights were read from the key 'state_dict'.",
        "These parts of the names of the weights were left out: 'net'.",
        "The file also holds loss.weight, which the model does not have.",
    )
    other = {"model": renamed(lambda name: f"student.{name}") | renamed(lambda name: f"teacher.{name}")}
    fit = best_fit(other, nested())
    assert "'student'" in fit.notes[1]
    assert fit.notes[-1] == "The file holds other weights that fit as well, which were not used: 'model.teacher'."


MISFITS: list[tuple[Callable[[], Any], dict[str, list[str]]]] = [
    (lambda: renamed(str) | {"head": torch.ones(1)}, {"unexpected": ["head"]}),
    (
        lambda: renamed(lambda name: f"module.{name}") | {"module.head.a": torch.ones(1)},
        {"unexpected": ["module.head.a"]},
    ),
    (
        lambda: renamed(lambda name: name.replace("0.2.weight", "0.2.a")),
        {"missing": ["0.2.weight"], "unexpected": ["0.2.a"]},
    ),
    (lambda: renamed(str) | {"0": torch.ones(1)}, {"unexpected": ["0"]}),
    (lambda: {"0": torch.ones(1)} | renamed(str), {"unexpected": ["0"]}),
    (
        lambda: {"model": dict(list(renamed(str).items())[1:]), "ema": {"0.0.weight": torch.ones(4, 3)}},
        {"missing": ["0.0.weight"]},
    ),
]


@pytest.mark.parametrize(("state", "problems"), MISFITS)
def test_weights_that_do_not_fit(state: Callable[[], Any], problems: dict[str, list[str]]) -> None:
    assert best_fit(state(), nested()).problems == problems


def test_names_that_a_model_ignores() -> None:
    model, state = nested(), renamed(str) | {"0.position_ids": torch.ones(1)}
    assert best_fit(state, model).problems == {"unexpected": ["0.position_ids"]}
    model._keys_to_ignore_on_load_unexpected = ["position_ids"]
    assert best_fit(state, model).problems == {}


def test_module_under_a_key(tmp_path: Path, net: nn.Module) -> None:
    torch.save({"epoch": 1, "best": {"model": net}, "ema": net}, tmp_path / "model.pt")
    with pytest.raises(LoadError, match="holds pickled code"):
        load_model(tmp_path / "model.pt")
    source = load_model(tmp_path / "model.pt", trust_pickle=True)
    assert source.kind == "pickle"
    assert torch.equal(source.model.linear.weight, net.linear.weight)
    assert source.notes == (
        "The model was read from the key 'best.model'.",
        "The file holds other models, which were not used: 'ema'.",
    )
