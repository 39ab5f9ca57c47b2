"""`Surgery.save_pretrained` and `surgeon export`: what is written, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import surgeon
from surgeon.errors import SaveError, UsageError
from surgeon.jobs.generate import GenerateOptions, generate, open_generator
from surgeon.passes import Lower, Moeify
from tests.cli.harness import run_surgeon
from tests.models.tiny import BERT
from tests.pretrained.conftest import Shelf

IDS = torch.randint(5, 100, (2, 6), generator=torch.Generator().manual_seed(0))


def bert() -> transformers.BertModel:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**BERT)).eval()


def operated(model: Any) -> surgeon.Surgery:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return surgeon.Pipeline([Moeify(experts=4), Lower()]).run(model, inputs=inputs)


def test_the_directory_has_all_that_a_user_needs(shelf: Shelf) -> None:
    names = {path.name for path in shelf.exported.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    config = json.loads((shelf.exported / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["quantization_config"]["quant_method"] == "surgeon"
    assert transformers.AutoTokenizer.from_pretrained(shelf.exported)("the film").input_ids == [2, 3]
    assert transformers.GenerationConfig.from_pretrained(shelf.exported).pad_token_id == 1


def test_the_card_says_what_was_done_and_keeps_the_licence(shelf: Shelf) -> None:
    card = ModelCard.load(shelf.exported / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    for words in (
        "split 2 of its layers into experts, 4 experts × 32 in the first",
        "import surgeon  # before from_pretrained",
        "| moeify | experts=4 | 2 |",
        "No data was used: nothing was trained.",
        "Quality was not measured.",
        "Without `import surgeon`, transformers only warns",
        "int(input_ids[batch, tokens])",
        "As the base model: mit.",
    ):
        assert words in card.content, words


def test_from_python(tmp_path: Path) -> None:
    model = bert()
    surgery = operated(model)
    surgeon.set_tau(surgery.graph, 0.1)
    surgery.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert set(surgeon.get_tau(loaded).values()) == {0.1}
    torch.testing.assert_close(loaded(IDS).pooler_output, surgery.graph(IDS, torch.ones_like(IDS)).pooler_output)


def test_a_model_that_is_gone_is_made_from_its_config(tmp_path: Path) -> None:
    surgery = operated(bert())
    surgery.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).pooler_output, bert()(IDS).pooler_output, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_in_the_graph_are_asked_for(tmp_path: Path) -> None:
    class Part(transformers.BertModel):
        """Does not use its pooler."""

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
            return super().forward(input_ids, attention_mask).last_hidden_state

    Part.__name__ = "BertModel"
    torch.manual_seed(0)
    model = Part(transformers.BertConfig(**BERT)).eval()
    surgery = operated(model)
    kept = surgery.save_pretrained(tmp_path / "out").surgeon_graft.kept  # type: ignore[union-attr]
    assert kept == ("pooler.dense.weight", "pooler.dense.bias")
    surgery.model = None
    with pytest.raises(UsageError, match=r"The graph does not use pooler\.dense\.weight, pooler\.dense\.bias"):
        surgery.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def pruned() -> transformers.BertModel:
    """Every feed-forward layer with another width."""
    model = bert()
    for layer, width in zip(model.encoder.layer, (13, 8), strict=True):
        layer.intermediate.dense = torch.nn.Linear(model.config.hidden_size, width)
        layer.output.dense = torch.nn.Linear(width, model.config.hidden_size)
    return model


def test_layers_of_any_width_come_back(tmp_path: Path) -> None:
    surgery = operated(pruned())
    surgery.save_pretrained(tmp_path / "out")
    made = transformers.BertModel.from_pretrained(tmp_path / "out")
    expected = surgery.graph(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    assert torch.allclose(made(IDS).last_hidden_state, expected, atol=1e-5)


def test_what_the_config_does_not_describe_is_refused(tmp_path: Path) -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    surgery = surgeon.Pipeline([Moeify(experts=4, skip=("*.0*",)), Lower()]).run(model := pruned(), inputs=inputs)
    message = r"encoder\.layer\.0\.intermediate\.dense\.weight is \[13, \d+\], and by the config \[\d+, \d+\]"
    with pytest.raises(UsageError, match=message):
        surgery.save_pretrained(tmp_path / "out", model=model)
    del model.encoder.layer[0]
    with pytest.raises(UsageError, match=r"encoder\.layer\.1\S+ is not there, and by the config \["):
        operated(model).save_pretrained(tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_content_is_left_alone(tmp_path: Path, shelf: Shelf) -> None:
    surgery = operated(bert())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="exists and is not empty"):
        surgery.save_pretrained(tmp_path)
    with pytest.raises(SaveError, match="not an exported model"):
        surgery.save_pretrained(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_that_is_not_of_transformers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8), torch.nn.LayerNorm(8))
    surgery = surgeon.Pipeline([Moeify(experts=4)]).run(model.eval(), inputs=torch.randn(2, 8))
    with pytest.raises(UsageError, match="Sequential is not a model of transformers"):
        surgery.save_pretrained(tmp_path / "out")


def test_the_command(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_surgeon("export", str(shelf.surgery))
    assert result.code == 0, result.err
    assert "transformer.h.0…1.mlp.c_fc  4 experts × 32  (2 layers)" in result.out
    assert 'transformers.GPT2LMHeadModel.from_pretrained("surgery-hf")' in result.out
    again = run_surgeon("export", str(shelf.surgery))
    assert (again.code, "exists and is not empty" in again.err) == (4, True)
    assert run_surgeon("export", str(shelf.surgery), "--overwrite", "--output", "json").json["bytes"] > 10_000


def test_a_changed_base_is_not_used(shelf: Shelf, tmp_path: Path) -> None:
    moved = tmp_path / "surgery"
    shutil.copytree(shelf.surgery, moved)
    record = json.loads((moved / "surgery.json").read_text())
    record["input"]["sha256"] = "0" * 64
    (moved / "surgery.json").write_text(json.dumps(record))
    assert run_surgeon("export", str(moved), "-o", str(tmp_path / "out")).code == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(loaded(ids).logits, shelf.model()(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_exported_model_can_be_opened_like_any_other(shelf: Shelf) -> None:
    result = run_surgeon("inspect", str(shelf.exported))
    assert result.code == 0, result.err
    assert re.search(r"transformer\.h\.1\.mlp\.c_fc +4 × 32 +dynamic", result.out)


def test_an_exported_model_can_be_converted_further_and_exported_again(tmp_path: Path) -> None:
    inputs = {"input_ids": IDS}
    passes: Any = [(Moeify(experts=4, only=("encoder.layer.0",)), Lower()), (Moeify(experts=2),)]
    dense = bert()
    made: Any = dense
    for index, some in enumerate(passes):
        surgeon.Pipeline(some).run(made, inputs=inputs).save_pretrained(tmp_path / str(index))
        made, info = transformers.BertModel.from_pretrained(tmp_path / str(index), output_loading_info=True)
        assert not any(info.values())
    assert len(surgeon.get_tau(made)) == 2
    torch.testing.assert_close(made(IDS)[0], dense(IDS)[0], rtol=1e-4, atol=1e-5)


def test_generate(shelf: Shelf) -> None:
    result = run_surgeon("generate", str(shelf.surgery), "the film was", "--tau", "0.9", "--max-new-tokens", "5",
                         "--rounds", "1", "--output", "json")  # fmt: skip
    assert result.code == 0, result.err
    settings = result.json["settings"]
    assert [setting["tau"] for setting in settings] == [0.0, 0.9, None]
    first, second, dense = settings
    assert first["same"] == first["tokens"] and first["text"] == dense["text"]  # noqa: PT018
    assert first["executed"] == 1.0 > second["executed"]
    assert dense["ratio"] is None


def test_generate_from_an_exported_model(shelf: Shelf) -> None:
    options = ("the film was", "--max-new-tokens", "3", "--rounds", "1")
    settings = run_surgeon("generate", str(shelf.exported), *options, "--output", "json").json["settings"]
    assert [(setting["ratio"], setting["same"]) for setting in settings] == [(None, None)]
    alone = run_surgeon("generate", str(shelf.exported), *options)
    assert alone.code == 0, alone.err
    assert "Give it with --dense" in alone.out
    both = run_surgeon("generate", str(shelf.exported), *options, "--dense", str(shelf.dense))
    assert both.out.startswith("tau 0, dense:\nthe film was")


def test_the_record_does_not_say_where_the_model_lay(shelf: Shelf) -> None:
    assert str(shelf.dense.parent) not in (shelf.exported / "surgeon.json").read_text()
    assert str(shelf.dense.parent) not in (shelf.exported / "README.md").read_text()


def test_a_chat_template_writes_the_special_tokens_itself(shelf: Shelf) -> None:
    opened = open_generator(shelf.surgery, None, stage=nullcontext)
    given = opened.tokenizer
    given.chat_template = "{{ messages[0]['content'] }}"
    tokenizer = Mock(wraps=given, chat_template=given.chat_template)
    for chat in (False, True):
        options = GenerateOptions(2, chat=chat, rounds=1)
        generate(replace(opened, tokenizer=tokenizer), "the film", [], options, stage=nullcontext)
    assert [call.kwargs["add_special_tokens"] for call in tokenizer.call_args_list] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chat",), "The tokenizer has no chat template"),
        (("--tau", "2"), "--tau"),
        (("--dense", "nowhere"), "No file or directory 'nowhere'"),
        (("--max-new-tokens", "1000"), "Give a lower --max-new-tokens"),
    ],
)
def test_generate_refuses(shelf: Shelf, options: tuple[str, ...], message: str) -> None:
    result = run_surgeon("generate", str(shelf.surgery), "the film", *options)
    assert result.code in (2, 3)
    assert message in result.err
