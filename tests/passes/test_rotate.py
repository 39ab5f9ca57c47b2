"""The pass `rotate`: exact on every family, refused where it cannot be, and what it is worth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.data.data import Data
from surgeon.errors import UsageError, VerificationError
from surgeon.grafting import turned
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.traced import fork
from surgeon.jobs.demo import DigitsViT
from surgeon.passes import Lower, Moeify, Recover, Refit, Rotate, Sparsify, SparsifyInputs
from surgeon.passes import rotate as module
from surgeon.sites.stream import Stream
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from surgeon.training.loop import RunSettings
from tests.small_models import HIDDEN, VOCABULARY, WIDTH, correlated_vectors, hugging_face, stack, tokens, vectors

Case = tuple[nn.Module, dict[str, Tensor]]
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def transformers_model(kind: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """torch's own encoder with the norm first, with the tokens in the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, norm_first=True)
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(1, 7, WIDTH))
        self.encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))  # type: ignore[no-any-return]


def case(name: str) -> Case:
    """A small model of a family, with norms that have gains, and inputs for it."""
    torch.manual_seed(0)
    ids, gqa = {"input_ids": tokens()["input_ids"]}, {**_SMALL, "num_key_value_heads": 2}
    made: nn.Module
    match name:
        case "digits":
            made, inputs = DigitsViT(dim=16, depth=1, hidden=32).eval(), {"pixel_values": torch.randn(3, 1, 8, 8)}
        case "encoder":
            made, inputs = Encoder().eval(), ids
        case "gpt2" | "t5" | "vit":
            made, inputs = hugging_face(name)
        case "llama":
            made, inputs = transformers_model("LlamaForCausalLM", "LlamaConfig", **gqa), ids
        case "gemma":
            made, inputs = transformers_model("GemmaForCausalLM", "GemmaConfig", **gqa, head_dim=8), ids
        case "qwen3":
            made, inputs = transformers_model("Qwen3ForCausalLM", "Qwen3Config", **gqa, head_dim=8), ids
        case "phi":
            made, inputs = transformers_model("PhiForCausalLM", "PhiConfig", **_SMALL), ids
        case "neox":
            made, inputs = transformers_model("GPTNeoXForCausalLM", "GPTNeoXConfig", **_SMALL), ids
        case "opt":
            options = {**_SMALL, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH}
            made, inputs = transformers_model("OPTForCausalLM", "OPTConfig", **options), ids
        case "gptj":
            options = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_inner": HIDDEN}
            made = transformers_model("GPTJForCausalLM", "GPTJConfig", vocab_size=VOCABULARY, n_positions=32, **options)
            inputs = ids
        case "beit":
            options = {"image_size": 16, "patch_size": 8, "hidden_size": WIDTH, "intermediate_size": HIDDEN}
            options |= {"num_hidden_layers": 1, "num_attention_heads": 2}
            made = transformers_model("BeitForImageClassification", "BeitConfig", **options)
            inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
        case _:
            raise KeyError(name)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made, inputs


def of_dtype(given: Case, dtype: torch.dtype) -> Case:
    made, inputs = given
    return copy.deepcopy(made).to(dtype), {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }


def rotated(given: Case, *after: surgeon.Pass, **options: Any) -> Surgery:
    made, inputs = given
    return Pipeline([Rotate(**options), *after]).run(made, inputs=inputs, data=[inputs] * 3)


def streams(surgery: Surgery) -> list[str]:
    return [site.path for site in surgery.reports[0].sites if site.before.startswith("stream")]


def error_of(surgery: Surgery, given: Case) -> float:
    """The difference between the surgery's output and the model's."""
    return relative_error(answer(surgery.graph.eval(), given[1]), answer(*given))


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = call_reproducibly(model, (), inputs)
    return found if isinstance(found, Tensor) else found.logits  # type: ignore[no-any-return]


# --- exact ------------------------------------------------------------------------------------------------------------

# Models whose norms compute in float32 whatever the model's type is.
IN_FLOAT32 = ("t5", "llama", "gemma", "qwen3")
FAMILIES = {
    "digits": ["model"], "encoder": ["encoder"], "gpt2": ["transformer"], "t5": ["decoder"], "vit": ["vit"],
    "llama": ["model"], "gemma": ["model"], "qwen3": ["model"], "phi": ["model"], "neox": ["gpt_neox"],
    "opt": ["model.decoder"], "gptj": ["transformer"], "beit": ["beit"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in FAMILIES), *((name, torch.float32) for name in ("digits", "gpt2", "gemma"))],
    ids=str,
)
def test_the_output_stays_and_the_cost_too(name: str, dtype: torch.dtype) -> None:
    given = of_dtype(case(name), dtype)
    surgery = rotated(given)
    report = surgery.reports[0]
    assert streams(surgery) == FAMILIES[name]
    assert error_of(surgery, given) < (1e-12 if dtype is torch.float64 and name not in IN_FLOAT32 else 3e-6)
    assert report.before is not None
    assert report.after is not None
    assert report.after.multiply_adds == report.before.multiply_adds
    sites = {site.path: site for site in report.sites}
    assert all(site.multiply_adds[0] == site.multiply_adds[1] for site in report.sites)
    change = sites[FAMILIES[name][0]]
    assert report.after.parameters - report.before.parameters == change.parameters[1] - change.parameters[0]
    text = {str(node.target) for node in surgery.graph.graph.nodes}
    assert "aten.rms_norm.default" in text
    assert name == "vit" or "aten.layer_norm.default" not in text


def test_weights_are_turned_and_those_of_the_model_are_not() -> None:
    given = case("gpt2")
    before = {name: tensor.clone() for name, tensor in given[0].state_dict().items()}
    surgery = rotated(given)
    after = surgery.graph.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in given[0].state_dict().items())
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"):
        assert after[name].shape == before[name].shape
        assert (after[name] - before[name]).abs().max() > 0.1


def test_a_head_that_shares_its_weight_with_the_embedding_gets_its_own() -> None:
    surgery = rotated(case("gpt2"))
    state = dict(surgery.graph.named_parameters(remove_duplicate=False))
    assert state["lm_head.weight"].data_ptr() != state["transformer.wte.weight"].data_ptr()
    report = surgery.reports[0]
    assert report.before is not None
    assert report.after is not None
    # The head's weight and its bias are new, and the norms of two layers and the last one have no gain and no bias.
    added = VOCABULARY * WIDTH + VOCABULARY - 5 * 2 * WIDTH
    assert report.after.parameters - report.before.parameters == added


def test_the_components_come_from_the_data() -> None:
    """In the turned basis the inputs of the readers are not correlated, the last ones have the most energy."""
    made = stack("pre-norm", 1)
    data = correlated_vectors()
    surgery = Pipeline([Rotate()]).run(made, inputs=data[0], data=data)
    first = next(node for node in surgery.graph.graph.nodes if str(node.target) == "aten.rms_norm.default")
    capture = surgeon.graph.capture.Capture(surgery.graph.eval(), [first.name])  # type: ignore[attr-defined]
    x = torch.cat([capture(**batch)[1][first.name].flatten(0, -2) for batch in data]).double()
    energies = (x.t() @ x / len(x)).diagonal()
    assert energies[WIDTH // 2 :].sum() > 0.8 * energies.sum()
    words = {site.path: site.after for site in surgery.reports[0].sites}
    assert "% of the energy in half of the channels" in words["model"]


def test_values_alone_in_a_model_with_norms_behind() -> None:
    given = of_dtype(hugging_face("bert"), torch.float64)
    surgery = rotated(given)
    report = surgery.reports[0]
    assert [rejection.code for rejection in report.rejected] == ["post-norm"]
    assert [site.path for site in report.sites] == [f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)]
    assert 0 < error_of(surgery, given) < 1e-12
    assert rotated(given, heads=False).reports[0].sites == ()


# --- what is wrong is noticed -----------------------------------------------------------------------------------------


def without_last(field: str) -> Callable[[Stream], Stream]:
    return lambda site: dataclasses.replace(site, **{field: getattr(site, field)[:-1]})


@pytest.mark.parametrize("field", ["writers", "tables", "readers", "norms"])
def test_a_part_of_the_stream_that_is_not_turned_is_noticed(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._turn_stream
    spoil = without_last(field)
    monkeypatch.setattr(module, "_turn_stream", lambda graph, site, basis: original(graph, spoil(site), basis))
    with pytest.raises(VerificationError, match="rotate must not change the output"):
        rotated(case("digits"))


def test_values_that_are_turned_on_one_side_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.fold
    monkeypatch.setattr(module, "fold", lambda graph, folds: original(graph, list(folds)[:1]))
    with pytest.raises(VerificationError, match=r"first site that differs is blocks\.0\.attention\.proj"):
        rotated(case("digits"), skip=("model",))


# --- with the other passes --------------------------------------------------------------------------------------------


def test_less_error_where_inputs_are_skipped() -> None:
    """On digits after a little training: the outputs of layers that skip half of their inputs."""
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8) * torch.rand(64, 1, 1, 1)
    made = DigitsViT(dim=16, depth=1, hidden=32).eval()
    errors = {}
    for name, first in (("plain", []), ("rotated", [Rotate()])):
        passes = [*first, SparsifyInputs(tau=0.5), Refit()]
        surgery = Pipeline(passes).run(made, inputs=images[:4], data=[images[:32]])
        errors[name] = F.mse_loss(surgery.graph(images[32:]), made(images[32:])).item()
    assert errors["rotated"] < 0.8 * errors["plain"]


@pytest.mark.parametrize("name", ["digits", "llama"])  # which drop nothing in training
def test_layers_are_compared_with_those_of_the_dense_model_in_one_basis(name: str) -> None:
    model, inputs = case(name)
    passes = [Rotate(), Moeify(experts=4, steps=1), Recover(tau=0.0, steps=1, distill_layers=1.0)]
    surgery = Pipeline(passes).run(model, inputs=inputs, data=Data([inputs], task="imitate"))
    fit = surgery.reports[-1].fit
    assert fit is not None
    _, losses = fit.losses[0]  # nothing was trained yet
    assert losses["layer error"] < 1e-9


def test_layers_that_cannot_be_compared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = module.find_streams
    monkeypatch.setattr(module, "find_streams", lambda graph: ([], []) if graph.meta.get("original") else find(graph))
    model, inputs = case("gpt2")
    graph = surgeon.trace(model, inputs)
    original = fork(graph).eval()
    original.meta["original"] = True
    data = Data([inputs], task="imitate")
    settings = RunSettings(original=original)
    Rotate().apply(graph, inputs=inputs, data=data, settings=settings)
    Moeify(experts=4).apply(graph)
    with pytest.raises(UsageError, match="rotate turned the stream of transformer, and could not"):
        Recover(tau=0.0, steps=1, distill_layers=1.0).apply(graph, inputs=inputs, data=data, settings=settings)


def test_saved_and_loaded_with_other_passes(tmp_path: Path) -> None:
    data = [(batch, torch.arange(8) % 3) for batch in correlated_vectors(batches=4)]
    passes = [
        Sparsify(steps=1), Rotate(), Moeify(experts=4, steps=1), SparsifyInputs(tau=0.3), Refit(), Recover(steps=1),
        Lower(),
    ]  # fmt: skip
    surgery = Pipeline(passes).run(stack("pre-norm"), inputs=vectors(), data=data)
    surgery.save(tmp_path / "made")
    graph = surgeon.load(tmp_path / "made")
    assert torch.equal(graph(**vectors()), surgery.graph.eval()(**vectors()))
    surgeon.set_tau(graph, 0.1)
    assert torch.isfinite(graph(**vectors(2, 9))).all()


@pytest.mark.parametrize("name", ["llama", "gemma"])  # gains of w, and of 1 + w with a tied head
def test_a_turned_stream_is_grafted_into_a_model_with_rms_norms(name: str, tmp_path: Path) -> None:
    made, inputs = case(name)
    tied = made.config.tie_word_embeddings
    before = {key: value.clone() for key, value in made.state_dict().items()}
    surgery = rotated((made, inputs), Moeify(experts=4), SparsifyInputs(tau=0.3), Lower())
    grafted = surgeon.graft(made, surgery)
    assert torch.equal(answer(grafted, inputs), answer(surgery.graph.eval(), inputs))
    assert relative_error(answer(grafted, inputs), answer(made, inputs)) > 1e-4  # what is skipped shows
    assert not grafted.config.tie_word_embeddings
    surgery.save_pretrained(tmp_path / "made")
    again = type(made).from_pretrained(tmp_path / "made")
    assert torch.equal(answer(again, inputs), answer(grafted, inputs))
    again.generate(inputs["input_ids"][:1], max_new_tokens=2)
    assert made.config.tie_word_embeddings == tied
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_a_stream_alone_is_grafted() -> None:
    made, inputs = case("gemma")
    grafted = surgeon.graft(made, rotated((made, inputs)))
    assert relative_error(answer(grafted, inputs), answer(made, inputs)) < 1e-5
    assert not torch.allclose(grafted.model.embed_tokens.weight, made.model.embed_tokens.weight, atol=1e-2)
    assert not any(grafted.model.norm.weight)  # Gemma's gain is one more


def test_a_gain_that_comes_otherwise_from_its_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made, inputs = case("llama")
    surgery = rotated((made, inputs))
    find = turned.find_streams

    def doubled(graph: Any) -> Any:
        sites, refused = find(graph)
        norms = [dataclasses.replace(norm, gain=2 * norm.gain) for norm in sites[0].norms]
        return [dataclasses.replace(sites[0], norms=tuple(norms))], refused

    monkeypatch.setattr(turned, "find_streams", doubled)
    with pytest.raises(UsageError, match="how its gain comes from its weight is not known"):
        surgeon.graft(made, surgery)


def test_a_turned_stream_has_no_place_among_layer_norms_but_turned_values_have() -> None:
    made, inputs = case("gpt2")
    more = SparsifyInputs(tau=0.3)
    with pytest.raises(UsageError, match=r"turned the residual stream \(transformer\).*skip=\['transformer'\]\)"):
        surgeon.graft(made, rotated((made, inputs), more))
    surgery = rotated((made, inputs), more, skip=("transformer",))
    grafted = surgeon.graft(made, surgery)
    surgeon.set_tau(grafted, 0.0)
    assert relative_error(answer(grafted, inputs), answer(made, inputs)) < 1e-5


def test_without_data_it_is_refused_and_a_dry_run_says_what_would_change() -> None:
    with pytest.raises(UsageError, match="rotate needs data"):
        Pipeline([Rotate()]).run(stack("pre-norm"), inputs=vectors())
    surgery = Pipeline([Rotate()]).run(stack("pre-norm"), inputs=vectors(), dry_run=True)
    assert [site.after for site in surgery.reports[0].sites] == ["to be turned"] * 3


def test_it_must_come_first() -> None:
    with pytest.raises(UsageError, match="rotate must run before sparsify-inputs"):
        Pipeline([SparsifyInputs(), Rotate()]).run(stack("pre-norm"), inputs=vectors(), dry_run=True)


def test_values_that_are_not_finite_are_refused() -> None:
    graph = surgeon.trace(stack("pre-norm"), vectors())
    broken = [{"x": torch.full_like(vectors()["x"], torch.inf)}]
    report = Rotate().apply(graph, inputs=vectors(), data=Data.of(broken), settings=RunSettings())
    assert {rejection.code for rejection in report.rejected} == {"not-finite"}
    assert report.matched == []
