"""The pipeline: order is checked before anything runs, every pass is verified, and the input is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.dynamic.knobs import get_tau
from surgeon.errors import DataError, LoadError, PassError, SurgeonError, TraceError, UsageError, VerificationError
from surgeon.graph.traced import TracedGraph
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Mlpify, Moeify, Sparsify, SwapActivation
from surgeon.passes.base import REWRITING
from surgeon.progress import Progress
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import HIDDEN, hugging_face, labelled_vectors, stack, vectors

SWAP, SPARSIFY, MLPIFY, MOEIFY, LOWER = (
    SwapActivation(), Sparsify(steps=1), Mlpify(steps=1), Moeify(experts=4, router_width=8, steps=1), Lower(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([], "No passes to run"),
        (
            [LOWER],
            "works on layers that skip by tau, but there are none. Put moeify, early-exit or sparsify-inputs before it",
        ),
        ([LOWER, MOEIFY], "Put moeify, early-exit or sparsify-inputs before it|moeify must run before lower"),
        ([MOEIFY, LOWER, MOEIFY], "moeify must run before lower"),
        ([SPARSIFY, SWAP], "swap-activation must run before sparsify. Swap the two passes"),
        ([MOEIFY, SPARSIFY], "sparsify must run before moeify"),
        ([MOEIFY, MLPIFY], "mlpify must run before moeify"),
        ([Sparsify(), MLPIFY], "mlpify must run before sparsify"),
        ([MOEIFY, SWAP], "swap-activation must run before moeify"),
        ([MLPIFY, MOEIFY], "mlpify needs data.* data=, or dry_run=True"),
        ([Moeify(tau=0.5)], "moeify needs data: tau needs routers that were fitted. Give data=, or dry_run=True"),
    ],
)
def test_wrong_order_is_refused_before_anything_runs(passes: Any, words: str) -> None:
    class Untouchable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the model was run")

    with pytest.raises(UsageError, match=words):
        Pipeline(passes).run(Untouchable(), inputs=torch.zeros(2, 2))


@pytest.mark.parametrize(
    "passes",
    [[SWAP, MLPIFY, SPARSIFY, MOEIFY, LOWER], [MLPIFY, SWAP, SPARSIFY, MOEIFY], [MOEIFY, MOEIFY], [LOWER, LOWER]],
)
def test_orders_that_work(passes: Any) -> None:
    Pipeline(passes).check(there={"moe"} if passes[0] is LOWER else (), has_data=True)


def test_surgery_holds_graph_reports_and_snapshots(traces: Any) -> None:
    graph, inputs = traces("stack:relu"), vectors()
    surgery = Pipeline([MOEIFY, LOWER]).run(graph, inputs=inputs, seed=3)
    assert isinstance(surgery.graph, TracedGraph)
    assert [report.name for report in surgery.reports] == ["moeify", "lower"]
    assert len(surgery.snapshots) == 3
    assert surgery.inputs is inputs
    assert (surgery.seed, surgery.data) == (3, None)
    assert torch.allclose(surgery.graph(**inputs), graph(**inputs), atol=1e-5)
    assert not find_moes(graph)


def test_a_hugging_face_model_needs_nothing_but_itself() -> None:
    model, inputs = hugging_face("bert")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    surgery = Pipeline([MOEIFY, LOWER]).run(model)
    assert set(surgery.inputs) >= {"input_ids", "attention_mask"}
    assert surgery.reports[0].max_error is not None
    got, want = surgery.graph(**inputs), model(**inputs)
    assert type(got) is type(want)
    assert torch.allclose(got.logits, want.logits, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_other_models_need_inputs() -> None:
    with pytest.raises(UsageError, match="inputs"):
        Pipeline([MOEIFY]).run(stack())


def test_a_graph_without_inputs_is_not_verified(traces: Any, tmp_path: Path) -> None:
    surgery = Pipeline([MOEIFY]).run(traces("stack:relu"))
    assert surgery.reports[0].max_error is None
    assert any("no example inputs" in note for note in surgery.reports[0].notes)
    with pytest.raises(PassError, match="saved with its example inputs"):
        surgery.save(tmp_path / "saved")


def test_training_mode_of_the_model_is_kept() -> None:
    for training in (True, False):
        model = stack("relu", layers=1).train(training)
        surgery = Pipeline([SWAP, MOEIFY]).run(model, inputs=vectors())
        assert surgery.graph.training == model.training == training


def test_later_passes_do_not_run_after_a_failure(traces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Moeify, "rewrite", broken)
    done: list[str] = []
    graph = traces("stack:gelu")
    code = graph.code
    with pytest.raises(PassError, match=r"moeify failed at blocks\.0\.ffn.*broken on purpose"):
        Pipeline([SWAP, MOEIFY, LOWER]).run(graph, inputs=vectors(), on_pass=lambda one: done.append(one.report.name))
    assert done == ["swap-activation"]
    assert graph.code == code


def test_verification_failure_names_pass_site_and_difference(traces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Moeify.rewrite

    def wrong(self: Any, graph: Any, site: Any, seen: Any = None) -> Any:
        change = original(self, graph, site, seen)
        if site.path == "blocks.1.ffn":
            with torch.no_grad():
                graph.get_parameter(f"{change.made[0]}.b2")[0].add_(1.0)
        return change

    monkeypatch.setattr(Moeify, "rewrite", wrong)
    with pytest.raises(VerificationError, match=r"moeify must not change.*tolerance: 1e-04.*blocks\.1\.ffn"):
        Pipeline([MOEIFY]).run(traces("stack:relu"), inputs=vectors())
    surgery = Pipeline([MOEIFY]).run(traces("stack:relu"), inputs=vectors(), verify="off")
    assert surgery.reports[0].max_error is None


def test_full_verification_tries_other_inputs(traces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that shows in other rows only."""
    seen: list[torch.Tensor] = []
    original = surgeon.passes.verification.call_reproducibly

    def recorded(model: Any, args: Any, kwargs: Any) -> Any:
        seen.append(kwargs["x"])
        return original(model, args, kwargs)

    monkeypatch.setattr(surgeon.passes.verification, "call_reproducibly", recorded)
    inputs = vectors()
    Pipeline([MOEIFY]).run(traces("stack:relu"), inputs=inputs)
    fast, seen[:] = len(seen), []
    Pipeline([MOEIFY]).run(traces("stack:relu"), inputs=inputs, verify="full")
    assert len(seen) > fast
    assert any(not torch.equal(ids, inputs["x"]) for ids in seen)


def consumable() -> tuple[nn.Module, list[nn.Parameter]]:
    """A stack of layers, and the weight matrices of its feed-forward layers."""
    torch.manual_seed(0)
    model = stack("gelu").eval()
    return model, [parameter for parameter in model.parameters() if parameter.dim() == 2 and HIDDEN in parameter.shape]


def test_a_consumed_model_gives_its_weights_away() -> None:
    passes = [Moeify(experts=4, router_width=8), Lower()]
    model, weights = consumable()
    assert weights
    kept = Pipeline(passes).run(model, inputs=vectors(), verify="full")
    assert all(weight.numel() for weight in weights)
    expected = kept.graph(**vectors())
    moved = Pipeline(passes).run(model, inputs=vectors(), verify="full", consume=True)
    assert not any(weight.numel() for weight in weights)
    assert torch.equal(moved.graph(**vectors()), expected)
    assert [report.max_error for report in moved.reports] == [report.max_error for report in kept.reports]


def test_a_model_that_passes_train_on_is_not_consumed() -> None:
    model, weights = consumable()
    Pipeline([MOEIFY]).run(model, inputs=vectors(), data=labelled_vectors(), consume=True)
    assert all(weight.numel() for weight in weights)


@pytest.mark.parametrize("consume", [False, True])
def test_a_consumed_model_is_verified_site_by_site_too(consume: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = Moeify.rewrite

    def wrong(self: Moeify, graph: TracedGraph, site: Any, seen: Any) -> Any:
        change = rewrite(self, graph, site, seen)
        if site.path == "blocks.1.ffn":
            with torch.no_grad():
                graph.get_submodule(change.made[0]).w2.mul_(3)
        return change

    monkeypatch.setattr(Moeify, "rewrite", wrong)
    model, _ = consumable()
    with pytest.raises(VerificationError, match=r"the first site that differs is blocks\.1\.ffn, by"):
        Pipeline([MOEIFY]).run(model, inputs=vectors(), consume=consume)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = stack("relu", layers=1)
    with torch.no_grad():
        model.blocks[0].ffn.fc1.weight[0, 0] = float("nan")
    with pytest.raises(LoadError, match=r"blocks\.0\.ffn\.fc1\.weight"):
        Pipeline([MOEIFY]).run(model, inputs=vectors())


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(TraceError):
        Pipeline([MOEIFY]).run(nn.Linear(4, 4), inputs=torch.zeros(2, 5))


def test_data_that_can_be_read_once_is_refused(traces: Any) -> None:
    with pytest.raises(DataError):
        Pipeline([MOEIFY]).run(traces("stack:relu"), inputs=vectors(), data=iter(labelled_vectors(1)))


def test_progress_and_data_are_passed_on(traces: Any) -> None:
    moments: list[Progress] = []
    surgery = Pipeline([SPARSIFY, MOEIFY]).run(
        traces("stack:relu"), inputs=vectors(), data=labelled_vectors(1), progress=moments.append
    )
    rewriting = {f"{name}: {REWRITING}" for name in ("sparsify", "moeify")}
    shown = list(dict.fromkeys(moment.what for moment in moments if moment.total and moment.what not in rewriting))
    assert shown == ["sparsify", "moeify: calibration", "moeify routers"]
    assert [moment.what for moment in moments if not moment.total] == [
        f"{name}: {what}" for name in ("sparsify", "moeify") for what in ("finding layers", REWRITING, "verifying")
    ]
    assert surgery.data
    assert all(report.fit is not None for report in surgery.reports)


def test_dry_run_rewrites_and_trains_nothing(traces: Any) -> None:
    passes = [SWAP, MLPIFY, SPARSIFY, MOEIFY, LOWER]
    surgery = Pipeline(passes).run(traces("stack:gelu"), inputs=vectors(), data=labelled_vectors(1), dry_run=True)
    assert all(report.matched for report in surgery.reports)
    assert all(report.fit is None for report in surgery.reports)


def test_same_seed_same_result(traces: Any) -> None:
    states = []
    for seed in (1, 1, 2):
        surgery = Pipeline([SPARSIFY, MOEIFY]).run(
            traces("stack:relu"), inputs=vectors(), data=labelled_vectors(1), seed=seed
        )
        states.append(surgery.graph.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_random_state_of_the_caller_is_left(traces: Any) -> None:
    graph = traces("stack:relu")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Pipeline([SPARSIFY, MOEIFY]).run(graph, inputs=vectors(), data=labelled_vectors(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_interrupted_pipeline_resumes_to_the_same_result(traces: Any, tmp_path: Path) -> None:
    passes = [Sparsify(steps=4, lr=1e-3), Moeify(experts=4, router_width=8, steps=6)]
    data = labelled_vectors(2)
    want = Pipeline(passes).run(traces("stack:relu"), inputs=vectors(), data=data)

    def interrupt(moment: Progress) -> None:
        if moment.what.startswith("moeify") and moment.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline(passes).run(traces("stack:relu"), inputs=vectors(), data=data, workdir=tmp_path, progress=interrupt)
    surgery = Pipeline(passes).run(traces("stack:relu"), inputs=vectors(), data=data, workdir=tmp_path, resume=True)
    assert [report.fit.resumed_at for report in surgery.reports if report.fit is not None] == [4, 3]
    for name, value in want.graph.state_dict().items():
        assert torch.allclose(surgery.graph.state_dict()[name], value, atol=1e-6), name


def test_tau_through_the_surgery(traces: Any) -> None:
    surgery = Pipeline([MOEIFY, LOWER]).run(traces("stack:relu"), inputs=vectors())
    assert surgery.set_tau(0.5) is surgery
    assert set(get_tau(surgery.graph).values()) == {0.5}
    surgery.set_tau(0.25, "blocks.0.ffn")
    assert get_tau(surgery.graph) == {"blocks.0.ffn.moe": 0.25, "blocks.1.ffn.moe": 0.5}


def test_a_finished_surgery_can_be_continued(traces: Any) -> None:
    first = Pipeline([MOEIFY]).run(traces("stack:relu"), inputs=vectors()).set_tau(0.5)
    second = Pipeline([LOWER]).run(first.graph, inputs=vectors())
    assert {site.form for site in find_moes(second.graph)} == {"dynamic"}
    assert {site.form for site in find_moes(first.graph)} == {"module"}
    assert set(get_tau(second.graph).values()) == {0.5}


def test_every_error_has_an_exit_code() -> None:
    assert {cls.__name__: cls.exit_code for cls in (UsageError, DataError, LoadError, TraceError, PassError)} == {
        "UsageError": 2, "DataError": 2, "LoadError": 3, "TraceError": 3, "PassError": 4,
    }  # fmt: skip
    assert all(issubclass(cls, SurgeonError) for cls in (UsageError, LoadError, TraceError, VerificationError))
