"""Every wrong option and argument: its words, its exit code, and that nothing is left on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import NET, Run, left


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nonsense",), "No such command 'nonsense'. See surgeon --help."),
        (("apply", "x", "--nope"), "No such option: --nope. See surgeon apply --help."),
        (("apply",), "Missing argument 'MODEL'. See surgeon apply --help."),
        (("sweep", "x"), "Missing option '--data'. See surgeon sweep --help."),
        (("inspect", "x", "--output", "xml"), "'xml' is not one of"),
        (("apply", "x"), "Say which passes to run: --passes sparsify,moeify. surgeon passes lists them."),
        (("apply", "x", "--passes", ","), "Say which passes to run"),
        (("apply", "x", "--passes", "moefy"), "No pass 'moefy'. Did you mean 'moeify'?"),
        (("explain", "moeify"), "'moeify' is a pass, not a model. To see its options, run surgeon passes moeify."),
        (("inspect", "lower"), "'lower' is a pass, not a model. To see its options, run surgeon passes lower."),
        (("passes", "lowr"), "No pass 'lowr'. Did you mean 'lower'?"),
        (("explain", "x", "--passes", "moeify,sparsify"), "sparsify must run before moeify"),
        (("explain", "x", "--passes", "zzz"), "No pass 'zzz'. There are: mlpify, rotate, halt-tokens, swap-activation"),
        (("apply", "x", "--passes", "moeify", "--set", "experts=3"), "write pass.option=value"),
        (("apply", "x", "--passes", "moeify", "--set", "moeify.expert=3"), "has no option 'expert'. Did you mean"),
        (("apply", "x", "--passes", "moeify", "--set", "moeify.experts=two"), "moeify.experts=two: "),
        (("apply", "x", "--passes", "moeify", "--set", "lower.only=a"), "'lower', which is not among the passes"),
        (("apply", "x", "--passes", "moeify,sparsify"), "sparsify must run before moeify"),
        (("apply", "x", "--passes", "lower"), "lower works on layers that skip by tau, but there are none."),
        (("apply", "x", "--passes", "mlpify"), "mlpify needs data"),
        (("apply", "x", "--passes", "moeify", "--tau", "1.5"), "--tau 1.5 is not a number from 0 to 1."),
        (("apply", "x", "--passes", "sparsify", "--tau", "0.5"), "--tau needs layers that skip. Add moeify"),
        (("apply", "x", "--passes", "moeify", "--tau", "0.5"), "--tau needs fitted routers. Give --data to fit them."),
        (("apply", "x", "--passes", "moeify", "--set", "moeify.tau=0.5"), "moeify needs data: tau needs routers that"),
        (("apply", "x", "--passes", "moeify", "--resume"), "--resume continues training, but this run trains nothing"),
        (("apply", "x", "--passes", "moeify", "--recipe", "r"), "Give --recipe or --passes, not both."),
        (("apply", "x", "--recipe", "nothing.json"), "There is no recipe and no file nothing.json"),
        (("diff", "x", "--stat", "--full"), "Give --stat or --full, not both."),
        (("sweep", "x", "--data", "d", "--tau", "0,high"), "--tau 0,high: give numbers from 0 to 1"),
        (("sweep", "x", "--data", "d", "--tau", "2"), "--tau 2: give numbers from 0 to 1"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(run: Run, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    result = run(*args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert words in result.err
    assert left(tmp_path) == set()


def test_errors_are_json_where_json_is_asked_for(run: Run) -> None:
    for args in (("inspect", "nothing", "--output", "json"), ("--output=json", "inspect", "nothing")):
        result = run(*args)
        assert result.code == 3
        assert result.json["error"]["type"] == "LoadError"
        assert result.json["error"]["exit_code"] == 3
        assert result.err.rstrip().endswith(result.json["error"]["message"])
    assert run("inspect", "--output", "json").json["error"] == {
        "type": "UsageError", "message": "Missing argument 'MODEL'. See surgeon inspect --help.", "exit_code": 2
    }  # fmt: skip


def test_unexpected_errors_are_one_line_and_a_hint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("boom\nmore")

    monkeypatch.setattr("surgeon.jobs.inspect.measure", fail)
    result = run("-q", "inspect", *NET)
    assert result.code == 4
    assert result.err.splitlines() == [
        "error: RuntimeError: boom", "This error was not expected. Run again with --debug to see the traceback. "
        "To report it, add what surgeon doctor says.",
    ]  # fmt: skip
    result = run("-q", "inspect", *NET, "--debug")
    assert result.code == 4
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("error: RuntimeError: boom\n")


def test_data_errors_exit_with_2(run: Run) -> None:
    for options, words in (
        (("--data", "reviews.csv", "--label", "stars"), "stars"),
        (("--data", "nothing.csv"), "No file or folder 'nothing.csv'"),
        (("--data", "reviews.csv", "--batch-size", "0"), "--batch-size is 0, but must be at least 1."),
        (("--data", "reviews.csv", "--task", "poetry"), "poetry"),
    ):
        result = run("-q", "apply", "--passes", "moeify", "bert", *options)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


def test_inputs_that_are_missing_or_wrong_exit_with_2(run: Run) -> None:
    result = run("-q", "inspect", "nets:gelu")
    assert result.code == 2
    assert "Give example inputs: --inputs module:function" in result.err
    assert run("-q", "inspect", "nets:gelu", "--inputs", "nothing").code == 2
