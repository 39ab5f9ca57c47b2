"""Models of transformers with converted layers: from_pretrained computes the same, and generate writes the same tokens.

A few architectures always run; `pytest --zoo` runs all that have feed-forward layers.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.calls import as_args_kwargs
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify
from surgeon.tracing.setup import without_caches

from .zoo import huggingface
from .zoo.case import Case

QUICK = {"LlamaForCausalLM", "GPTNeoXForCausalLM", "Phi3ForCausalLM", "AlbertForMaskedLM", "T5ForConditionalGeneration"}
# All their layers are computed in the code of larger modules, or their linear layers return more than a tensor.
NO_PLACE = {"RwkvForCausalLM", "IBertForMaskedLM"}
# Their code branches on data.
UNTRACEABLE = {"TimeSeriesTransformerForPrediction", "AutoformerForPrediction"}


def _cases() -> list[object]:
    cases = [case for case in huggingface.CASES.values() if case.required_count and not case.untraceable]
    found = [case for case in cases if case.name.partition("/")[2] not in UNTRACEABLE]
    return [pytest.param(case, id=case.name) for case in found]


def _tokens(model: Any, inputs: Any) -> torch.Tensor:
    given: Any = {name: inputs[name] for name in ("input_ids", "attention_mask", "input_features") if name in inputs}
    if model.config.is_encoder_decoder:
        given["decoder_start_token_id"] = 1
    with torch.no_grad():
        made: torch.Tensor = model.generate(
            **given, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return made


@pytest.mark.parametrize("case", _cases())
def test_same_outputs_and_tokens(case: Case, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name = case.name.partition("/")[2]
    if name not in QUICK and not request.config.getoption("--zoo"):
        pytest.skip("runs with --zoo")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library says of how its model is built
        model: Any = case.build().eval()
    torch.manual_seed(1)
    args, kwargs = as_args_kwargs(case.inputs(2))
    surgery = surgeon.Pipeline([Moeify(router_width=8), Lower()]).run(model, inputs=(args, kwargs))
    if name in NO_PLACE:
        with pytest.raises(UsageError, match="No converted layer of the graph can be put into"):
            surgeon.graft(model, surgery)
        return
    grafted: Any = surgeon.graft(model, surgery)
    assert len(find_moes(grafted)) == len(find_moes(surgery.graph)) - len(grafted.surgeon_graft.refused)
    grafted.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert surgeon.get_tau(loaded) == surgeon.get_tau(grafted)
    with without_caches(model), without_caches(loaded):
        want, got = (call_reproducibly(made, args, kwargs) for made in (model, loaded))
    assert relative_error(got, want) <= case.tolerance
    if model.can_generate() and ("input_ids" in kwargs or "input_features" in kwargs):
        try:
            dense = _tokens(model, kwargs)
        except Exception as error:  # tiny configs that cannot generate even dense
            pytest.skip(f"the dense model does not generate: {error}")
        assert torch.equal(_tokens(loaded, kwargs), dense)
