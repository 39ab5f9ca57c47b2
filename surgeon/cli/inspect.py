"""Commands that look at models: inspect, passes, explain, diff, doctor."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated, Any

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import (
    Arch,
    Inputs,
    Model,
    PassList,
    Settings,
    Task,
    TrustPickle,
)
from surgeon.cli.reading import build, check_no_pass
from surgeon.errors import UsageError


@command
def inspect(
    run: Run,
    model: Model,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the graph, by module path.")] = False,
    inputs: Inputs = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
    task: Task = None,
) -> None:
    """Show a model's layers and what they cost.

    Feed-forward, expert and standalone linear layers, each with its share of the multiply-adds.

    Example: surgeon inspect path/to/bert

    JSON: {model, kind, inputs, task, cost, ffns, experts, linears, refused, notes, graph}
    """
    from surgeon.jobs.inspect import inspect as look
    from surgeon.jobs.open_model import open_model
    from surgeon.render.inspect import inspection_view

    check_no_pass(model)
    opened = open_model(model, inputs=inputs, trust_pickle=trust_pickle, arch=arch, task=task, stage=run.screen.stage)
    with run.screen.stage("measuring"):
        found = look(opened, with_graph=graph)
    run.screen.show(inspection_view(found))
    run.screen.result(found)


@command
def passes(
    run: Run,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One pass, with its options.")] = None,
) -> None:
    """List the passes, or show one of them.

    Of one pass: what it does, its options, what it needs and promises, and an example.

    Example: surgeon passes moeify

    JSON: {passes: [{name, summary, description, works_on, makes, must_precede, preserves, needs_data, trains}],
    recipes: {name: {summary, passes: [[name, options]]}}}; of one pass its {name, ..., trains, options: [{name, type,
    default, help}], example}
    """
    from surgeon.jobs.pass_help import describe, example_of, options_of
    from surgeon.passes import PASSES
    from surgeon.render.inspect import pass_help_view, passes_view
    from surgeon.surgery.recipe import RECIPES, find_pass

    if name is None:
        run.screen.show(passes_view(PASSES.values(), RECIPES))
        recipes = {name: {"summary": what, "passes": steps} for name, (what, steps) in RECIPES.items()}
        run.screen.result({"passes": [describe(kind) for kind in PASSES.values()], "recipes": recipes})
        return
    kind = find_pass(name)
    with run.screen.stage(f"running {name} on a small model"):
        example = example_of(kind)
    about, options = describe(kind), options_of(kind)
    run.screen.show(pass_help_view(kind, about["description"], options, example))
    run.screen.result({**about, "options": options, "example": example})


@command
def explain(
    run: Run,
    model: Model,
    passes: PassList = None,
    at: Annotated[str | None, typer.Option("--at", metavar="PATH", help="Only here, patterns with * allowed.")] = None,
    settings: Settings = None,
    inputs: Inputs = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
    task: Task = None,
) -> None:
    """Say why a pass changes a site, or does not.

    For each candidate: that it would be changed, or the first condition that failed and the value seen.
    Each pass is asked about the graph that the passes before it would leave. Nothing is trained or saved.

    Example: surgeon explain path/to/bert --passes moeify --at "*.layer.0"

    JSON: {passes: [{name, looks_for, matched: [[path, site]], rejected: [[path, reason]]}]}
    """
    from surgeon.jobs.inspect import explain as ask
    from surgeon.jobs.open_model import open_model
    from surgeon.render.inspect import explanation_view

    check_no_pass(model)
    built = build(passes, settings)
    opened = open_model(model, inputs=inputs, trust_pickle=trust_pickle, arch=arch, task=task, stage=run.screen.stage)
    with run.screen.stage("asking the passes"):
        found = ask(opened, built, at)
    run.screen.show(explanation_view(found))
    run.screen.result({"passes": found})


@command
def diff(
    run: Run,
    first: Annotated[str, typer.Argument(metavar="A", help="A saved surgery, or any model to compare with B.")],
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="Another model.", show_default=False)] = None,
    stat: Annotated[bool, typer.Option("--stat", help="Totals only.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every site, node and parameter.")] = False,
    inputs: Inputs = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
) -> None:
    """Show what passes changed, or compare two models.

    One saved surgery: what each of its passes changed. Two models, saved or not: their sites side by side.

    Example: surgeon diff bert-surgery

    Example: surgeon diff path/to/bert bert-surgery --full

    JSON: {passes: [{report, graph}]} of one; {names, costs, sites, difference, note, nodes} of two
    """
    from surgeon.jobs.diff import compare_models
    from surgeon.jobs.open_model import open_model
    from surgeon.render.inspect import comparison_view
    from surgeon.surgery.artifact import load_diff
    from surgeon.text.diff import diff_view

    if stat and full:
        raise UsageError("Give --stat or --full, not both.")
    detail: Any = "stat" if stat else "full" if full else "sites"
    if second is None:
        recorded = load_diff(first)
        run.screen.show(diff_view(recorded.passes, detail))
        run.screen.result(recorded)
        return
    opened = [
        open_model(spec, inputs=inputs, trust_pickle=trust_pickle, arch=arch, stage=run.screen.stage)
        for spec in (first, second)
    ]
    with run.screen.stage("comparing"):
        found = compare_models(*opened, with_nodes=full)
    run.screen.show(comparison_view(found, detail))
    run.screen.result(found)


@command
def doctor(
    run: Run,
    build: Annotated[
        bool, typer.Option("--build", help="Build the native CPU kernels now, which the first call would do else.")
    ] = False,
) -> None:
    """Check that everything works on this machine.

    Versions, devices, native kernels, disk space, and a tiny surgery from tracing to loading.

    Example: surgeon doctor --build

    JSON: {checks: [{name, state, found, advice}]}
    """
    from surgeon.jobs.doctor import examine
    from surgeon.render.inspect import doctor_view

    with run.screen.stage("building" if build else "examining"):
        checks = examine(build=build)
    run.screen.show(doctor_view(checks))
    run.screen.result({"checks": checks})
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)
