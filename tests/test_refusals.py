"""Every public function refuses arguments of another kind with an error of surgeon that says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import SurgeonError, UsageError
from surgeon.measure.sweep import sweep
from surgeon.passes import Lower, Moeify
from tests.small_models import stack, vectors

MODEL = nn.Linear(3, 3)
TAKES_A_MODEL: tuple[Callable[[Any], Any], ...] = (
    surgeon.find_moes, surgeon.get_tau, surgeon.get_rule, lambda x: surgeon.set_tau(x, 0.1),
    lambda x: surgeon.set_rule(x, "max"), lambda x: surgeon.token_load(x, vectors()),
    lambda x: surgeon.compensate(x, [vectors()]), lambda x: surgeon.tune(x, [vectors()], 0.5, inputs=vectors()),
    lambda x: surgeon.compare({"a": x}, [vectors()], None), lambda x: sweep(x, [], None, inputs=vectors()),
    lambda x: surgeon.Pipeline([Moeify()]).run(x, inputs=vectors()),
)  # fmt: skip
TAKES_A_GRAPH: tuple[Callable[[Any], Any], ...] = (
    surgeon.find_ffns, surgeon.to_networkx, Moeify().apply, Moeify().explain,
)  # fmt: skip


@pytest.fixture(scope="module")
def surgery() -> surgeon.Surgery:
    return surgeon.Pipeline([Moeify(experts=4), Lower()]).run(stack("relu"), inputs=vectors())


@pytest.mark.parametrize("call", [*TAKES_A_MODEL, *TAKES_A_GRAPH])
def test_a_surgery_is_no_graph(call: Callable[[Any], Any], surgery: surgeon.Surgery) -> None:
    for other in (3, None, "bert-moe"):
        with pytest.raises(UsageError, match="takes a graph"):
            call(other)
    with pytest.raises(UsageError, match=r"an object of type Surgery\. Give (its graph: )?surgery\.graph"):
        call(surgery)


@pytest.mark.parametrize("call", TAKES_A_GRAPH)
def test_a_model_is_traced_first(call: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError, match=r"surgeon\.trace\(model, inputs\)"):
        call(MODEL)
    if call is not surgeon.to_networkx:  # it shows any graph
        with pytest.raises(UsageError, match=r"a graph of other ops\. Trace it first"):
            call(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3))))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: surgeon.set_tau(g, "0.1"), "tau is '0.1', but must be a number from 0 to 1"),
        (lambda g: surgeon.set_tau(g, {"*": None}), "tau is None, but must be a number from 0 to 1"),
        (lambda g: surgeon.set_tau(g, 0.1, 3), "The path 3 is no text."),
        (lambda g: surgeon.load(3), "A directory is named by its path, but got an object of type int."),
        (lambda g: surgeon.graft(stack("relu"), MODEL), "A directory is named by its path"),
        (lambda g: surgeon.Pipeline(Moeify()), "Pipeline takes a list of passes"),
        (lambda g: surgeon.Pipeline("moeify"), "Pipeline takes a list of passes"),
        (lambda g: surgeon.Pipeline([Moeify]), "Write Moeify()."),
        (lambda g: surgeon.Pipeline(["moeify"]), "Pipeline takes passes, but got 'moeify'."),
        (lambda g: surgeon.Pipeline([Lower()]).run(g, verify="no"), "verify is 'no', but must be one of off, fast"),
        (lambda g: surgeon.Pipeline([Lower()]).run(g, seed="a"), "seed is 'a', but must be a whole number."),
        (lambda g: surgeon.Pipeline([Lower()]).run(g, teacher=3), "takes a graph or a model, but got an object of"),
        (lambda g: surgeon.Pipeline([Lower()]).run(g, data="a.csv"), "The data is a str, not a list of batches"),
        (lambda g: surgeon.Data.of([], loss="mse"), "loss is 'mse', but must be a function"),
        (lambda g: surgeon.Data.of([], task="x"), "No task 'x'. Known: causal-lm"),
        (lambda g: surgeon.compare([g], [], None), "compare takes graphs by name"),
        (lambda g: surgeon.compare({"a": g}, 3, None, dense=g), "The data is a int, not a list of batches"),
        (lambda g: surgeon.compare({"a": g}, [], "x", dense=g), "No task 'x'. Known: causal-lm"),
        (lambda g: surgeon.compare({"a": g}, [], None, dense=g, keep="a"), "The share of the dense quality to keep"),
        (lambda g: surgeon.compare({"a": g}, [vectors()], None, dense=g, taus=0.1), "taus is 0.1, but must be a list"),
        (lambda g: surgeon.compensate(g, 3), "The data is a int, not a list of batches"),
        (lambda g: surgeon.tune(g, [], "0.5", inputs=vectors()), "The budget is '0.5', but must be"),
        (lambda g: surgeon.trace(3, vectors()), "The model is a int"),
        (lambda g: surgeon.trace(MODEL, "x"), "The example inputs are of type str."),
    ],
)
def test_other_arguments(call: Any, words: str, surgery: surgeon.Surgery) -> None:
    with pytest.raises(SurgeonError) as error:
        call(surgery.graph)
    assert words in str(error.value)


def test_arguments_of_a_surgery(surgery: surgeon.Surgery) -> None:
    for call in (lambda: surgery.save(3), lambda: surgery.save_pretrained(3, model=stack("relu"))):  # type: ignore[arg-type, return-value]
        with pytest.raises(UsageError, match="A directory is named by its path"):
            call()
    with pytest.raises(UsageError, match=r"No detail .all"):
        surgery.diff().text("all")  # type: ignore[arg-type]
