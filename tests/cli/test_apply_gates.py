"""`surgeon apply` where a pass changes nothing, does not fit, or does not keep what it must keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgeon.errors import NothingChangedError
from surgeon.jobs.apply import check_changed
from surgeon.passes.report import PassReport
from surgeon.sites.rejection import Rejection

from .harness import NET, Run, left


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--passes", "lower", "bert-moe"),
            "lower had nothing to do. bert.encoder.layer.0.moe and 1 more: it is already lowered.",
        ),
        (
            ("--passes", "moeify", "nets:linear", "--inputs", "nets:inputs"),
            "moeify changed nothing: the model has no feed-forward layer. See surgeon inspect.",
        ),
        (
            ("--passes", "moeify", *NET, "--set", "moeify.skip=*"),
            "moeify changed nothing: its options only and skip exclude every feed-forward layer. See surgeon inspect.",
        ),
        (
            ("--passes", "swap-activation", "nets:relu", "--inputs", "nets:inputs"),
            "swap-activation had nothing to do. blocks.0.mlp and 1 more: its activation is already relu.",
        ),
        (
            ("--passes", "moeify", *NET, "--set", "moeify.only=pooler"),
            "moeify changed 0 of 1 sites. pooler: tanh between linears 16→16→3",
        ),
    ],
)
def test_a_pass_that_changes_nothing_exits_with_1_and_saves_nothing(
    run: Run, tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    result = run("-q", "apply", *args, "-o", "out")
    assert result.code == 1
    assert result.err.startswith(f"error: {words}")
    assert left(tmp_path) == set()


def test_an_activation_that_is_relu_already_is_a_note(run: Run) -> None:
    result = run(
        "-q", "apply", "--passes", "swap-activation,moeify", "nets:relu", "--inputs", "nets:inputs", "--dry-run"
    )
    assert result.code == 0
    assert "note: swap-activation had nothing to do. blocks.0.mlp and 1 more: its activation is" in result.out


def test_most_common_reason_is_named(run: Run) -> None:
    report = PassReport(
        "sparsify",
        {},
        [],
        (
            Rejection("odd", "it is odd", "a"),
            Rejection("even", "it is even (linear_1)", "b"),
            Rejection("even", "it is even (x_2)", "c"),
        ),
    )
    with pytest.raises(NothingChangedError) as error:
        check_changed(report, "feed-forward layer")
    assert str(error.value) == (
        "sparsify changed 0 of 3 sites. b and 1 more: it is even (linear_1). See surgeon explain."
    )


def test_more_experts_than_neurons_are_an_error_in_the_options(run: Run) -> None:
    result = run("-q", "apply", "--passes", "moeify", *NET, "--set", "moeify.experts=65")
    assert result.code == 2
    assert result.err == "error: blocks.0.mlp: 65 experts were asked for, but it has 64 neurons\n"


def test_a_failed_verification_exits_with_4(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.passes.verification.tolerance_for", lambda *outputs: -1.0)
    result = run("-q", "apply", "--passes", "moeify", *NET)
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("error: moeify must not change the output")
    assert left(tmp_path) == set()
