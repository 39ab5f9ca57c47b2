"""Accuracy in 8 and 4 bits, MiniLM on movie reviews: experts of surgeon, and the dense model in other engines.

    pip install ".[examples,engines]"
    python examples/reviews.py reviews
    python examples/frontier/quantised.py work examples/frontier/results

trains the dense model, rewrites it with `surgeon apply`, quantises the experts, and measures all models on the same
snippets. It writes quantised.json and prints the tables. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import held_out
import sentiment
import torch
from torch import Tensor

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.losses import QualityMeter
from surgeon.data.quality import Scores
from surgeon.engines import onnx, openvino, torchao
from surgeon.engines.program import Program
from surgeon.jobs.evaluation import eval_batches
from surgeon.jobs.open_model import Opened, open_model
from surgeon.jobs.options import DataOptions
from surgeon.measure.sweep import sweep

DATA = "reviews"
TAUS = (0.0, 0.2, 0.5)
BATCH = 32
CALIBRATION = 10  # batches of the training data, on which ranges of inputs are measured
PASSES = {
    "swap-activation.epochs": 1, "swap-activation.lr": 5e-5, "swap-activation.precision": "bfloat16",
    "sparsify.epochs": 1, "sparsify.lr": 5e-5, "sparsify.precision": "bfloat16",
    "moeify.expert_size": 32, "moeify.epochs": 2,
}  # fmt: skip
EXPERTS = {"float32": None, "int8": {"weights": "int8"}, "int4": {"weights": "int4", "group": 32}}
"""The options of `quantize` for each model with experts; None for the one that is not quantised."""

Model = Callable[[Mapping[str, Tensor]], Tensor]
"""From inputs by name to logits."""


def make(work: Path) -> None:
    """The dense model, and the models with experts."""
    data = ("--data", DATA, "--max-length", held_out.LENGTH, "--batch-size", BATCH)
    if not (work / "dense").exists():
        held_out.train_dense(work / "dense", DATA)
    for name, quantize in EXPERTS.items():
        if (work / name).exists():
            continue
        if quantize is None:
            given = [word for option, value in PASSES.items() for word in ("--set", f"{option}={value}")]
            resume = ("--resume",) if (work / f"{name}.work").exists() else ()
            passes = ("--passes", "swap-activation,sparsify,moeify", *given, *resume)
            held_out.run("apply", work / "dense", *passes, *data, "-o", work / name)
        else:
            given = [word for option, value in quantize.items() for word in ("--set", f"quantize.{option}={value}")]
            held_out.run("apply", work / "float32", "--passes", "quantize", *given, *data, "-o", work / name)


def opened(directory: Path) -> Opened:
    options = DataOptions(DATA, task=sentiment.TASK, max_length=held_out.LENGTH, batch_size=BATCH)
    return open_model(str(directory), data=options, task=sentiment.TASK)


def in_openvino(model: Opened, linears: str) -> Model:
    """A graph in OpenVINO, its linears stored as `surgeon.engines.openvino.LINEARS` says."""
    assert model.data is not None
    program = Program(model.graph, model.inputs)
    batches = [Batch.from_any(item) for item, _ in zip(model.data.train, range(CALIBRATION), strict=False)]
    rows = [program.named(batch.args, batch.kwargs) for batch in batches]
    compiled = openvino.Compiled(openvino.quantised(openvino.convert(model.graph, program), linears, rows), threads=1)
    return lambda inputs: compiled(inputs)[0]


def in_onnxruntime(model: Opened, work: Path) -> Model:
    """A graph in ONNX Runtime, dynamically quantised."""
    file = work / "dense.onnx"
    onnx.save(Program(model.graph, model.inputs), file)
    onnx.quantise(file, file.with_suffix(".int8.onnx"))
    session = onnx.Session(file.with_suffix(".int8.onnx"), threads=1)
    return lambda inputs: session(inputs)[0]


def in_torchao(model: Opened, linears: str) -> Model:
    """A graph with torchao's linears. It is not compiled: that changes its time, not what is rounded."""
    graph = torchao.quantised(model.graph, linears)
    return lambda inputs: graph(**inputs).logits


def scores(model: Model, batches: list[Batch]) -> Scores:
    meter = QualityMeter(sentiment.TASK)
    with torch.no_grad():
        for batch in batches:
            meter.add(model(batch.kwargs), batch)
    return meter.scores()


def measure(work: Path, done: dict[str, dict[str, Any]], keep: Callable[[], None]) -> None:
    """Add what each model reaches to `done`, by its name and, with experts, by tau; `keep` is called after each."""
    dense = opened(work / "dense")
    batches = eval_batches(dense)
    reference = scores(lambda inputs: dense.graph(**inputs).logits, batches)

    def add(name: str, setting: str, value: Callable[[], dict[str, Any]]) -> None:
        if setting not in done.setdefault(name, {}):
            done[name][setting] = value()
            print(f"{name}, {setting}: {done[name][setting]['quality']['value']:.4f}", flush=True)
            keep()

    def of(way: Callable[[], Model]) -> dict[str, Any]:
        return {"quality": asdict(scores(way(), batches).quality(reference))}

    def point(graph: surgeon.TracedGraph, tau: float) -> dict[str, Any]:
        (found,) = sweep(graph, batches, sentiment.TASK, (tau,), inputs=dense.inputs, dense_scores=reference)
        return {"quality": asdict(found.quality), "executed": found.executed}

    add("dense", "torch, float32", lambda: {"quality": asdict(reference.quality())})
    add("dense", "OpenVINO, int8, static", lambda: of(lambda: in_openvino(dense, "int8")))
    add("dense", "ONNX Runtime, int8, dynamic", lambda: of(lambda: in_onnxruntime(dense, work)))
    add("dense", "torchao, int8, dynamic", lambda: of(lambda: in_torchao(dense, "int8")))
    for name in EXPERTS:
        graph = opened(work / name).graph
        for tau in TAUS:
            add(f"experts in {name}", f"{tau:g}", lambda graph=graph, tau=tau: point(graph, tau))
    whole = opened(work / "int8")
    for tau in TAUS:
        surgeon.set_tau(whole.graph, tau)
        add("experts and linears in int8", f"{tau:g}", lambda: of(lambda: in_torchao(whole, "int8")))


def tables(done: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracy of all models; in brackets the difference from the dense model, in points."""

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return ""
        quality = found["quality"]
        change = "" if quality["change"] is None else f" ({100 * quality['change']['value']:+.1f})"
        return f"{100 * quality['value']:.1f}%{change}"

    lines = ["| the dense model | accuracy |", "| --- | --- |"]
    lines += [f"| {name} | {cell(found)} |" for name, found in done["dense"].items()]
    columns = {name: found for name, found in done.items() if name != "dense"}
    lines += ["", f"| tau | experts that ran | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    for tau, found in done["experts in float32"].items():
        cells = [cell(column.get(tau)) for column in columns.values()]
        lines.append(f"| {tau} | {100 * found['executed']:.0f}% | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where the models are kept")
    parser.add_argument("results", type=Path, help="where the numbers go; those that are there are not measured again")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "quantised.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    make(args.work)
    measure(args.work, done, lambda: file.write_text(json.dumps(done, indent=1)))
    print(tables(done))


if __name__ == "__main__":
    main()
