"""The command line: what every command answers, every error's words and exit code, and what is left on disk."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from typer.testing import CliRunner

import surgeon
from surgeon.artifact import read_record
from surgeon.cli import app
from surgeon.errors import NothingChangedError, SaveError, UsageError
from surgeon.jobs.applying import check_changed
from surgeon.jobs.workdir import WorkDirectory
from surgeon.passes import PASSES
from surgeon.report import PassReport

COMMANDS = ("demo", "inspect", "passes", "explain", "apply", "diff", "sweep", "doctor")
NETS = """
import os
from pathlib import Path

import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), act(), nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, x):
        return x + self.mlp(self.norm(x))

class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.blocks = nn.Sequential(Block(act), Block(act))
        self.pooler, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.pooler(self.blocks(self.query(x)).mean(1))))

class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1

def gelu():
    torch.manual_seed(0)
    return Net(nn.GELU)

def relu():
    torch.manual_seed(0)
    return Net(nn.ReLU)

def linear():
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))

def branches():
    return Branches()

def inputs():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

class Interrupted(list):
    # Stands in for a user who presses Ctrl-C.
    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == 4 and Path("interrupt").exists():
                raise KeyboardInterrupt
            yield batch

def data():
    generator = torch.Generator().manual_seed(0)
    return Interrupted(
        (torch.randn(8, 5, 16, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(6)
    )
"""
NET = ("nets:gelu", "--inputs", "nets:inputs")
DATA = ("--data", "nets:data", "--task", "classification")


class Result:
    """What one run of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def run_surgeon(*args: str) -> Result:
    result = CliRunner().invoke(app, args, prog_name="surgeon")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output or "--debug" in args
    assert "\x1b" not in result.output
    return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with models, data and saved surgeries that no test changes."""
    place = tmp_path_factory.mktemp("shelf")
    (place / "nets.py").write_text(NETS)
    here = Path.cwd()
    os.chdir(place)
    sys.path.insert(0, str(place))
    try:
        bert(place)
        assert run_surgeon("apply", "--passes", "moeify", *NET, "-o", "masked").code == 0
        passes = "swap-activation,sparsify,moeify,lower"
        result = run_surgeon("apply", "--passes", passes, "--set", "moeify.experts=4", "bert", "-o", "bert-moe")
        assert result.code == 0, result.err
        (place / "apply.txt").write_text(result.out)
        yield place
    finally:
        os.chdir(here)
        sys.path.remove(str(place))
        sys.modules.pop("nets", None)


def bert(place: Path) -> None:
    """A tiny BERT with a tokenizer, and reviews for it to tell apart."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=40, num_labels=2,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(place / "bert")
    good, bad, rest = ["good", "fine", "great"], ["bad", "poor", "dull"], ["the", "film", "was", "a", "plot", "very"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *good, *bad, *rest]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(place / "bert")
    choose = random.Random(0)
    with (place / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(40):
            label = choose.randint(0, 1)
            line = [*choose.choices(rest, k=choose.randint(3, 8)), choose.choice(good if label else bad)]
            writer.writerow([" ".join(line), label])


@pytest.fixture
def run(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty directory from which the shelf's models can be reached."""
    monkeypatch.chdir(tmp_path)
    for name in ("bert", "bert-moe", "masked", "reviews.csv"):
        (tmp_path / name).symlink_to(shelf / name)
    return run_surgeon


def left(place: Path) -> set[str]:
    """What is in a directory beside the links to the shelf, hidden files included."""
    return {path.name for path in place.iterdir() if not path.is_symlink()}


# --- help and options -------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_without_loading_torch() -> None:
    code = (
        "import sys; from surgeon.cli import app\n"
        "try: app(['--help'], prog_name='surgeon')\n"
        "finally: print({name for name in ('torch', 'rich.table', 'transformers', 'pydantic') if name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("set()")
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)
    assert "Exit codes: 0 done" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run_surgeon(name, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert f"Example: surgeon {name}" in text
    assert "JSON: {" in text
    assert all(option in text for option in ("--output <rich|plain|json>", "--verbose", "--quiet", "--debug"))


def test_no_arguments_show_the_help() -> None:
    result = run_surgeon()
    assert result.code == 0
    assert result.out.startswith("Usage: surgeon")


def test_version_and_module_entry() -> None:
    done = subprocess.run([sys.executable, "-m", "surgeon", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"surgeon \d+\.\d+\.\d+\n", done.stdout)
    assert run_surgeon("--version").out == done.stdout


@pytest.mark.parametrize("before", [True, False])
def test_output_can_stand_before_and_after_the_command(before: bool) -> None:
    option = ("--output", "json")
    result = run_surgeon(*option, "passes") if before else run_surgeon("passes", *option)
    assert [one["name"] for one in result.json["passes"]] == list(PASSES)


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
        (("passes", "lowr"), "No pass 'lowr'. Did you mean 'lower'?"),
        (("explain", "x", "--passes", "zzz"), "No pass 'zzz'. There are: swap-activation, sparsify"),
        (("apply", "x", "--passes", "moeify", "--set", "experts=3"), "write pass.option=value"),
        (("apply", "x", "--passes", "moeify", "--set", "moeify.expert=3"), "has no option 'expert'. Did you mean"),
        (("apply", "x", "--passes", "moeify", "--set", "moeify.experts=two"), "moeify.experts=two: "),
        (("apply", "x", "--passes", "moeify", "--set", "lower.only=a"), "'lower', which is not among the passes"),
        (("apply", "x", "--passes", "moeify,sparsify"), "sparsify must run before moeify"),
        (("apply", "x", "--passes", "lower"), "lower works on experts, and there are none: put moeify before it."),
        (("apply", "x", "--passes", "mlpify"), "mlpify needs data"),
        (("apply", "x", "--passes", "moeify", "--tau", "1.5"), "--tau 1.5: tau is a share of the largest score"),
        (("apply", "x", "--passes", "sparsify", "--tau", "0.5"), "--tau needs experts: put moeify among the passes."),
        (("apply", "x", "--passes", "moeify", "--resume"), "--resume continues training, and this run trains nothing"),
        (("apply", "x", "--passes", "moeify", "--recipe", "r"), "Give --recipe, or --passes with --set, not both."),
        (("apply", "x", "--recipe", "nothing.json"), "--recipe nothing.json: there is no such file."),
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

    monkeypatch.setattr("surgeon.jobs.inspection.measure", fail)
    result = run("-q", "inspect", *NET)
    assert result.code == 4
    assert result.err.splitlines() == [
        "error: RuntimeError: boom", "This is not an expected error. Run with --debug for the traceback."
    ]  # fmt: skip
    result = run("-q", "inspect", *NET, "--debug")
    assert result.code == 4
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("error: RuntimeError: boom\n")


# --- models that cannot be opened -------------------------------------------------------------------------------------


class Boxed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_models_that_cannot_be_loaded_or_traced_exit_with_3(run: Run, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "weights.pt")
    torch.save(nn.Linear(3, 3), tmp_path / "module.pt")
    (tmp_path / "cut.pt2").write_bytes(b"PK\x03\x04")
    shutil.copytree(tmp_path / "bert", tmp_path / "nan")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "nan/model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "masked", tmp_path / "damaged")
    with (tmp_path / "damaged/model.pt2").open("r+b") as file:
        file.truncate(1000)
    for args, words in (
        (["nothing"], "No file or directory 'nothing'. Models are not downloaded"),
        (["weights.pt"], "weights.pt is a state dict, not a model. Give --arch gpt2."),
        (["module.pt"], "module.pt holds pickled code, which loading would run. If you trust it: --trust-pickle."),
        (["cut.pt2"], "cut.pt2"),
        (["nan"], "that are NaN or infinite"),
        (["damaged"], "is damaged or was changed"),
        (["nets:nothing"], "nets has no 'nothing'"),
        (["nets:branches", "--inputs", "nets:inputs"], "Branches cannot be traced"),
    ):
        result = run("-q", "inspect", *args)
        assert (result.code, result.out) == (3, ""), args
        assert words in result.err.partition("error: ")[2]
    assert "no saved surgery" in run("diff", "bert").err
    assert run("diff", "bert").code == 3


def test_inputs_that_are_missing_or_wrong_exit_with_2(run: Run) -> None:
    result = run("-q", "inspect", "nets:gelu")
    assert result.code == 2
    assert "Give example inputs: --inputs module:function" in result.err
    assert run("-q", "inspect", "nets:gelu", "--inputs", "nothing").code == 2


def test_trusted_pickles_state_dicts_and_programs_open(run: Run, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 4)
    torch.save(net, tmp_path / "module.pt")
    torch.save(x, tmp_path / "x.pt")
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    import nets

    torch.save(nets.gelu().state_dict(), tmp_path / "weights.pt")
    for args in (
        ["module.pt", "--trust-pickle", "--inputs", "x.pt"],
        ["net.pt2"],
        ["weights.pt", "--arch", "nets:gelu", "--inputs", "nets:inputs"],
    ):
        result = run("-q", "--output", "json", "inspect", *args)
        assert result.code == 0, result.err
        assert result.json["ffns"]


# --- inspect, passes, explain, doctor ---------------------------------------------------------------------------------


def test_inspect_shows_sites_shares_and_refusals(run: Run) -> None:
    result = run("inspect", *NET)
    assert result.code == 0
    assert result.err.splitlines() == ["loading nets:gelu ...", "tracing Net ...", "measuring ..."]
    assert result.out.startswith("nets:gelu  Python function\n")
    assert re.search(r"^2 feed-forward layers  \d+% of the multiply-adds$", result.out, re.MULTILINE)
    assert re.search(r"^  blocks\.0\.mlp +16→64→16 +gelu +\d+%$", result.out, re.MULTILINE)
    assert "refused pooler: tanh between linears 16→16→3 is a pooler" in result.out
    assert re.search(r"^2 standalone linear layers  ", result.out, re.MULTILINE)
    assert re.search(r"^  1 ×  16→16  query +\d", result.out, re.MULTILINE)


def test_inspect_json_has_shares_that_add_up(run: Run) -> None:
    found = run("inspect", *NET, "--output", "json").json
    assert set(found) == {
        "model", "kind", "inputs", "task", "cost", "ffns", "experts", "linears", "refused", "notes", "graph"
    }  # fmt: skip
    assert found["ffns"][1] == {
        "path": "blocks.1.mlp", "shape": [16, 64, 16], "share": pytest.approx(found["ffns"][0]["share"]),
        "activation": "gelu", "gated": False, "calls": 1,
    }  # fmt: skip
    assert found["inputs"] == {"x": [2, 5, 16]}
    known = sum(layer["share"] for layer in found["ffns"] + found["linears"])
    assert known == pytest.approx(1 - 2 * 16 * 3 / found["cost"]["multiply_adds"])  # the rest is the head
    assert found["graph"] is None


def test_inspect_prints_the_graph_by_module_path(run: Run) -> None:
    result = run("-q", "inspect", *NET, "--graph")
    assert re.search(r"^  blocks\.0\.mlp\.1\n    gelu = gelu\(linear_\d\) : ", result.out, re.MULTILINE)
    assert " for x 2×5×16" in result.out
    graph = run("-q", "inspect", *NET, "--graph", "--output", "json").json["graph"]
    assert [path for path, line in graph if line.startswith("gelu = ")] == ["blocks.0.mlp.1"]


def test_inspect_shows_the_experts_of_a_saved_surgery(run: Run) -> None:
    result = run("-q", "inspect", "bert-moe")
    assert re.search(r"^bert-moe  saved surgery, sequence-classification$", result.out, re.MULTILINE)
    assert re.search(r"^  bert\.encoder\.layer\.0\.moe +4 × 8 +dynamic +0 +100% +\d+%$", result.out, re.MULTILINE)
    assert "no feed-forward layer" in result.out  # routers are not taken for one
    assert ".router" not in result.out


def test_passes_are_listed_with_what_they_promise() -> None:
    result = run_surgeon("passes")
    lines = {
        line.split()[0]: line for line in result.out.splitlines() if line.split()[:1] and line.split()[0] in PASSES
    }
    assert set(lines) == set(PASSES)
    assert re.search(r"^sparsify +stays until trained +to train +Put a square-Hoyer tap", lines["sparsify"])
    assert re.search(r"^mlpify +changes +needed ", lines["mlpify"])
    assert re.search(r"^lower +stays +Lower each", lines["lower"])


@pytest.mark.parametrize("name", list(PASSES))
def test_a_pass_is_shown_with_options_and_a_living_example(name: str) -> None:
    result = run_surgeon("-q", "passes", name)
    assert result.code == 0
    assert f"--set {name}.OPTION=VALUE" in result.out
    assert re.search(r"^    \+ ", result.out, re.MULTILINE)
    shown = run_surgeon("-q", "passes", name, "--output", "json").json
    assert {"name", "summary", "works_on", "preserves", "needs_data", "trains", "options", "example"} <= set(shown)
    assert [option["name"] for option in shown["options"]][-2:] == ["only", "skip"]
    assert all(option["help"] and option["type"] for option in shown["options"])
    assert shown["example"]["report"]["matched"]


def test_options_are_described_in_words() -> None:
    options = {one["name"]: one for one in run_surgeon("-q", "passes", "moeify", "--output", "json").json["options"]}
    assert (options["experts"]["type"], options["experts"]["default"]) == ("integer or none", None)
    assert options["schedule"]["type"] == "constant|linear|cosine"
    assert options["only"]["type"] == "list"
    assert next(iter(options)) == "experts"


def test_explain_names_every_candidate_and_the_first_condition_that_failed(run: Run) -> None:
    result = run("-q", "explain", *NET, "--passes", "sparsify,moeify,lower")
    assert result.code == 0
    assert "sparsify  changes 2 of 3 candidates" in result.out
    assert re.search(r"✓ +blocks\.0\.mlp +FFN 16→64→16 gelu", result.out)
    assert re.search(r"✗ +pooler +tanh between linears 16→16→3 is a pooler", result.out)
    # lower is asked about the graph that moeify leaves
    assert re.search(r"lower  changes 2 of 2 candidates\n +✓ +blocks\.0\.mlp\.moe", result.out)


def test_explain_says_which_value_does_not_fit(run: Run) -> None:
    options = ("--passes", "moeify", "--set", "moeify.experts=5", "--at", "*.1.mlp", "--output", "json")
    (one,) = run("-q", "explain", *NET, *options).json["passes"]
    assert one["matched"] == []
    assert one["rejected"] == [["blocks.1.mlp", "64 neurons do not divide by 5 experts. Nearest: 4, 8."]]


def test_explain_says_where_there_is_no_candidate(run: Run) -> None:
    result = run("-q", "explain", *NET, "--passes", "moeify", "--at", "blocks.7.mlp")
    assert result.code == 2
    assert "No candidate at 'blocks.7.mlp': nothing there looks like a feed-forward layer." in result.err
    assert "Nearest candidates: blocks.1.mlp, blocks.0.mlp." in result.err
    result = run("-q", "explain", "nets:linear", "--inputs", "nets:inputs", "--passes", "moeify")
    assert "moeify  finds no feed-forward layer" in result.out


def test_doctor_checks_from_python_to_a_surgery() -> None:
    result = run_surgeon("-q", "doctor")
    assert result.code == 0, result.out
    names = ["python", "torch", "gpu", "packages", "triton", "compiler", "disk", "temporary files", "a tiny surgery"]
    assert all(re.search(rf"^[✓·]  {name} ", result.out, re.MULTILINE) for name in names)
    assert result.out.rstrip().endswith("Everything works.")


def test_doctor_says_what_to_do_about_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *args: object, **options: object) -> None:
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr("surgeon.jobs.doctor.Pipeline.run", fail)
    monkeypatch.setattr("surgeon.jobs.doctor.shutil.disk_usage", lambda path: SimpleNamespace(free=12_000_000))
    monkeypatch.setattr("surgeon.jobs.doctor.shutil.which", lambda name: None)
    monkeypatch.setattr("surgeon.jobs.doctor._PACKAGES", ("torch", "no-such-package"))
    monkeypatch.delenv("CXX", raising=False)
    result = run_surgeon("-q", "doctor")
    assert result.code == 1
    assert re.search(r"^✗  a tiny surgery +RuntimeError: no kernel\n +Reinstall torch", result.out, re.MULTILINE)
    assert re.search(r"^✗  disk +0\.0 GB free", result.out, re.MULTILINE)
    assert re.search(r"^✗  packages +missing: no-such-package\n +pip install no-such-package", result.out, re.MULTILINE)
    assert re.search(r"^·  compiler +no C\+\+ compiler, and none is needed", result.out, re.MULTILINE)
    assert "3 problem(s) found." in result.out
    states = {one["name"]: one["state"] for one in run_surgeon("-q", "doctor", "--output", "json").json["checks"]}
    assert states["a tiny surgery"] == "failed"


# --- apply ------------------------------------------------------------------------------------------------------------


def test_apply_shows_each_pass_the_total_and_what_comes_next(shelf: Path) -> None:
    out = (shelf / "apply.txt").read_text()
    heads = [line for line in out.splitlines() if re.match(r"^(swap-activation|sparsify|moeify|lower)  \d", line)]
    assert [head.split("  ")[:2] for head in heads] == [
        ["swap-activation", "2 of 3 sites"], ["sparsify", "2 of 3 sites"], ["moeify", "2 of 3 sites"],
        ["lower", "2 of 2 sites"],
    ]  # fmt: skip
    assert "bert.encoder.layer.0…1  ×2  FFN 16→32→16 relu → 4 experts × 8, router 128" in out
    assert "note: The routers were not trained: every expert runs and the output is unchanged." in out
    assert re.search(r"^Saved to bert-moe in ", out, re.MULTILINE)
    assert out.rstrip().endswith(
        "surgeon apply --passes swap-activation,sparsify,moeify,lower --set moeify.experts=4 bert -o bert-moe "
        "--data DATA --overwrite"
    )


def test_apply_saves_what_can_be_loaded(shelf: Path, run: Run) -> None:
    record = read_record(shelf / "bert-moe")
    assert [step["name"] for step in record["recipe"]["passes"]] == ["swap-activation", "sparsify", "moeify", "lower"]
    assert record["input"]["path"] == "bert"
    assert (shelf / "bert-moe/tokenizer.json").exists()
    assert set(surgeon.get_tau(surgeon.load(shelf / "bert-moe")).values()) == {0.0}


def test_apply_trains_measures_and_sets_tau(run: Run, tmp_path: Path) -> None:
    result = run(
        "apply", "--passes", "swap-activation,sparsify,moeify,lower", "bert", "--data", "reviews.csv", "--tau", "0.5",
        "--set", "sparsify.steps=3", "--set", "moeify.steps=6", "--eval-fraction", "0.25", "--limit", "32",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "trained 3 steps in" in result.out
    assert "router loss" in result.out
    assert re.search(r"^accuracy +0\.\d+ +\d\.\d+ +on 8 samples$", result.out, re.MULTILINE)
    assert re.search(r"^  that ran .* of the experts$", result.out, re.MULTILINE)
    assert result.out.rstrip().endswith("surgeon sweep bert-surgery --data reviews.csv --limit 32 --eval-fraction 0.25")
    assert re.search(r"^moeify routers  6/6  router loss", result.err, re.MULTILINE)
    assert left(tmp_path) == {"bert-surgery"}
    assert set(surgeon.get_tau(surgeon.load("bert-surgery")).values()) == {0.5}


def test_apply_json_is_alone_on_stdout(run: Run) -> None:
    result = run("--output", "json", "apply", "--passes", "moeify", *NET, "-o", "out", "--verify", "full")
    done = result.json
    assert set(done) == {
        "model", "directory", "dry_run", "passes", "before", "after", "quality", "notes", "next", "seconds"
    }  # fmt: skip
    assert done["directory"] == "out"
    assert done["passes"][0]["matched"] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert done["passes"][0]["max_error"] < 1e-4
    assert "tracing Net ..." in result.err


def test_dry_run_changes_shows_and_saves_nothing(run: Run, tmp_path: Path) -> None:
    result = run("apply", "--passes", "mlpify,moeify,lower", *NET, "--dry-run", *DATA)
    assert result.code == 0, result.err
    assert "mlpify  2 of 3 sites" in result.out
    assert "nothing was trained and nothing was saved" in result.out
    assert result.out.rstrip().endswith(f"surgeon apply --passes mlpify,moeify,lower {' '.join((*NET, *DATA))}")
    assert left(tmp_path) == set()


def test_a_saved_surgery_can_be_gone_on_with(run: Run, tmp_path: Path) -> None:
    result = run("apply", "--passes", "lower", "masked")
    assert result.code == 0, result.err
    assert left(tmp_path) == {"masked-lower"}
    assert result.out.rstrip().endswith("surgeon sweep masked-lower --data DATA")
    assert {site.form for site in surgeon.find_moes(surgeon.load("masked-lower"))} == {"dynamic"}
    x = torch.randn(3, 4, 16)
    import nets

    with torch.no_grad():
        assert torch.allclose(surgeon.load("masked-lower")(x), nets.gelu().eval()(x), atol=1e-5)


def test_a_recipe_can_be_run_again(run: Run, tmp_path: Path) -> None:
    recipe = read_record(Path("masked"))["recipe"]
    recipe["passes"][0]["options"] = {"experts": 8, "only": ["blocks.1.*"]}
    (tmp_path / "r.json").write_text(json.dumps({**recipe, "seed": 3}))
    assert run("-q", "apply", "--recipe", "r.json", *NET, "-o", "again").code == 0
    made = read_record(Path("again"))["recipe"]
    assert made["passes"] == recipe["passes"]
    assert made["seed"] == 3
    assert run("-q", "apply", "--recipe", "masked", *NET, "--dry-run").code == 0
    (tmp_path / "r.json").write_text("{}")
    assert "--recipe r.json holds no recipe: KeyError: 'passes'." in run("apply", "x", "--recipe", "r.json").err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--passes", "lower", "bert-moe"),
            "lower changed 0 of 2 sites. 2 rejected: it is lowered already (first: bert.encoder.layer.0.moe). "
            "See surgeon explain.",
        ),
        (
            ("--passes", "moeify", "nets:linear", "--inputs", "nets:inputs"),
            "moeify changed nothing: the model has no feed-forward layer. See surgeon inspect.",
        ),
        (
            ("--passes", "moeify", *NET, "--set", "moeify.only=head"),
            "moeify changed nothing: no feed-forward layer is left by only= and skip=. See surgeon inspect.",
        ),
        (
            ("--passes", "swap-activation", "nets:relu", "--inputs", "nets:inputs"),
            "swap-activation changed nothing: all 2 activations are the wanted one already.",
        ),
        (
            ("--passes", "moeify", *NET, "--set", "moeify.only=pooler"),
            "moeify changed 0 of 1 sites. 1 rejected: tanh between linears 16→16→3",
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
    assert "note: swap-activation changed nothing: all 2 activations are the wanted one already." in result.out


def test_most_common_reason_is_named(run: Run) -> None:
    report = PassReport(
        "sparsify", {}, [], [("a", "it is odd"), ("b", "it is even (linear_1)"), ("c", "it is even (x_2)")]
    )
    with pytest.raises(NothingChangedError) as error:
        check_changed(report, "feed-forward layer")
    assert str(error.value) == (
        "sparsify changed 0 of 3 sites. 3 rejected: 2 of them, it is even (linear_1) (first: b). See surgeon explain."
    )


def test_experts_that_do_not_divide_are_named_with_those_that_do(run: Run) -> None:
    result = run("-q", "apply", "--passes", "moeify", *NET, "--set", "moeify.experts=5")
    assert result.code == 2
    assert result.err == "error: blocks.0.mlp: 64 neurons do not divide by 5 experts. Nearest: 4, 8.\n"


def test_data_errors_exit_with_2(run: Run) -> None:
    for options, words in (
        (("--data", "reviews.csv", "--label", "stars"), "stars"),
        (("--data", "nothing.csv"), "No file or folder 'nothing.csv'"),
        (("--data", "reviews.csv", "--batch-size", "0"), "batch_size=0"),
        (("--data", "reviews.csv", "--task", "poetry"), "poetry"),
    ):
        result = run("-q", "apply", "--passes", "moeify", "bert", *options)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


def test_a_failed_verification_exits_with_4(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.passes.base.tolerance_for", lambda *outputs: -1.0)
    result = run("-q", "apply", "--passes", "moeify", *NET)
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("error: moeify must not change what the graph computes")
    assert left(tmp_path) == set()


def test_a_full_disk_exits_with_4_and_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.artifact.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    result = run("-q", "apply", "--passes", "moeify", *NET, *DATA, "--set", "moeify.steps=1")
    assert result.code == 4
    assert "error: Cannot write gelu-surgery" in result.err
    # what was trained is kept, so that freeing space and --resume is enough
    assert left(tmp_path) == {"gelu-surgery.work"}
    monkeypatch.undo()
    os.chdir(tmp_path)
    assert run("-q", "apply", "--passes", "moeify", *NET, *DATA, "--set", "moeify.steps=1", "--resume").code == 0
    assert left(tmp_path) == {"gelu-surgery"}


def test_targets_are_checked_before_the_work(run: Run, tmp_path: Path, shelf: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    shutil.copytree(shelf / "masked", tmp_path / "done")
    for options, words in (
        (("-o", "file"), "file is a file."),
        (("-o", "mine", "--overwrite"), "mine holds something else than a saved surgery."),
        (("-o", "done"), "done exists. Give another directory with -o, or replace it with --overwrite."),
        (("-o", "bert/inside"), "bert/inside is the model itself, which is never changed."),
    ):
        result = run("apply", "--passes", "moeify", "bert", *options)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"error: {words}")  # no "loading": nothing was done
    assert run("apply", "--passes", "lower", "done", "-o", "done", "--overwrite").code == 2
    before = (tmp_path / "done/surgery.json").read_text()
    assert run("-q", "apply", "--passes", "moeify", *NET, "-o", "done", "--overwrite").code == 0
    assert (tmp_path / "done/surgery.json").read_text() != before
    assert left(tmp_path) == {"file", "mine", "done"}


def test_a_directory_that_cannot_be_written_exits_with_4(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.jobs.applying.os.access", lambda *args: False)
    result = run("apply", "--passes", "moeify", *NET)
    assert (result.code, result.out) == (4, "")
    assert re.match(r"error: Cannot write gelu-surgery: no permission to write to /", result.err)


def test_an_interrupted_run_can_be_resumed(run: Run, tmp_path: Path) -> None:
    args = ("apply", "--passes", "sparsify,moeify", *NET, *DATA, "--set", "sparsify.steps=2", "--set", "moeify.steps=6")
    (tmp_path / "interrupt").touch()
    stopped = run(*args)
    assert stopped.code == 130
    assert stopped.err.endswith(
        f"error: interrupted; checkpoints are in gelu-surgery.work. Go on with:\n  surgeon {' '.join(args)} --resume\n"
    )
    assert left(tmp_path) == {"interrupt", "gelu-surgery.work"}
    (tmp_path / "interrupt").unlink()

    again = run("-q", *args)
    assert again.code == 2
    assert "gelu-surgery.work holds the checkpoints of an interrupted run. --resume continues it" in again.err

    resumed = run(*args, "--resume")
    assert resumed.code == 0, resumed.err
    assert "trained 6 steps" in resumed.out
    assert "resumed at 4" in resumed.out
    assert left(tmp_path) == {"gelu-surgery"}
    assert run("-q", *args, "-o", "whole").code == 0
    x, one, two = torch.randn(2, 5, 16), surgeon.load("gelu-surgery"), surgeon.load("whole")
    for graph in (one, two):
        surgeon.set_tau(graph, 0.9)
    with torch.no_grad():
        assert torch.equal(one(x), two(x))


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    result, recipe = (
        tmp_path / "out",
        {"model": "abc", "passes": [{"name": "moeify", "options": {"lr": 0.1}}], "seed": 0},
    )
    with pytest.raises(UsageError, match=r"There is nothing to resume: no .*/out\.work"):
        WorkDirectory(result, recipe, resume=True, discard=False)
    work = WorkDirectory(result, recipe, resume=False, discard=False)
    assert not work.has_checkpoint
    (work.path / "00-moeify").mkdir()
    (work.path / "00-moeify" / "fit.json").write_text("{}")
    assert WorkDirectory(result, recipe, resume=True, discard=True).has_checkpoint
    with pytest.raises(UsageError, match=r"was another one\. Its seed: 0; now: 1\. Give the same options to resume it"):
        WorkDirectory(result, {**recipe, "seed": 1}, resume=True, discard=False)
    with pytest.raises(UsageError, match=r'Its passes: \[{"name": "moeify", .*; now: \[\]'):
        WorkDirectory(result, {**recipe, "passes": []}, resume=True, discard=False)
    with pytest.raises(UsageError, match="--resume continues it, --overwrite drops it"):
        WorkDirectory(result, recipe, resume=False, discard=False)
    work.close(done=False)
    assert work.has_checkpoint
    assert not WorkDirectory(result, recipe, resume=False, discard=True).has_checkpoint
    (work.path / "recipe.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read, so this run cannot be resumed"):
        WorkDirectory(result, recipe, resume=True, discard=False)
    work.close(done=True)
    assert left(tmp_path) == set()


def test_work_is_not_kept_in_foreign_or_closed_places(tmp_path: Path) -> None:
    (tmp_path / "x.work").mkdir()
    with pytest.raises(UsageError, match=r"x\.work is in the way"):
        WorkDirectory(tmp_path / "x", {}, resume=False, discard=True)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="Cannot write"):
        WorkDirectory(tmp_path / "file" / "x", {}, resume=False, discard=False)


def test_interrupted_without_checkpoints_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgeon.pipeline.Pipeline.run", stop)
    result = run("--output", "json", "-q", "apply", "--passes", "moeify", *NET, *DATA)
    assert result.code == 130
    assert result.json["error"] == {
        "type": "Interrupted", "message": "interrupted; nothing was saved", "exit_code": 130
    }  # fmt: skip
    assert left(tmp_path) == set()


def test_quality_that_cannot_be_measured_is_said(run: Run) -> None:
    result = run("-q", "apply", "--passes", "moeify", *NET, *DATA, "--set", "moeify.steps=1")
    assert "note: Quality was not measured: no data was held out for it." in result.out


def test_example_inputs_are_taken_from_the_data(run: Run) -> None:
    result = run("apply", "--passes", "moeify", "nets:gelu", *DATA, "--set", "moeify.steps=1")
    assert result.code == 0, result.err
    assert "note: The example inputs are the first two rows of the data." in result.err


def test_the_demo_is_not_written_over_something_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    result = run("demo", "mine")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: mine holds something else than a saved surgery.")


# --- diff and sweep ---------------------------------------------------------------------------------------------------


def test_diff_shows_what_was_recorded(run: Run, shelf: Path) -> None:
    shown = run("diff", "bert-moe").out
    assert shown.rstrip() in (shelf / "apply.txt").read_text()
    assert len(run("diff", "bert-moe", "--stat").out.splitlines()) == 5
    full = run("diff", "bert-moe", "--full").out
    assert "    + bert_encoder_layer_0_moe = bert.encoder.layer.0.moe(" in full
    recorded = run("diff", "bert-moe", "--output", "json").json
    assert [one["report"]["name"] for one in recorded["passes"]] == ["swap-activation", "sparsify", "moeify", "lower"]
    assert set(recorded["passes"][0]["graph"]) == {"changes", "parameters"}


def test_diff_puts_two_models_side_by_side(run: Run) -> None:
    args = ("-q", "diff", "nets:gelu", "masked", "--inputs", "nets:inputs")
    result = run(*args)
    assert result.code == 0
    row = r"^blocks\.0…1\.mlp +×2 +FFN 16→64→16 gelu +2 experts × 32 +2\.13 k → 4\.43 k .* - → 100%$"
    assert re.search(row, result.out, re.MULTILINE)
    assert re.search(r"^The outputs differ by \d\.\de-\d\d, relative, on nets:gelu's", result.out, re.MULTILINE)
    found = run(*args, "--full", "--output", "json").json
    assert set(found) == {"names", "costs", "sites", "difference", "note", "nodes"}
    assert found["sites"]["blocks.0.mlp"][1]["what"] == "2 experts × 32"
    assert found["difference"] < 1e-5
    assert found["nodes"]["changes"]["blocks.0.mlp.moe"]


def test_diff_of_unlike_models_says_so(run: Run) -> None:
    result = run("-q", "diff", "masked", "bert-moe", "--stat")
    assert result.code == 0
    assert "The outputs cannot be compared on the first model's example inputs: " in result.out
    assert "bert.encoder" not in result.out


def test_sweep_measures_at_each_tau_and_all_experts_first(run: Run) -> None:
    args = ("sweep", "bert-moe", "--data", "reviews.csv", "--tau", "0.5,0.9", "--eval-fraction", "0")
    result = run(*args)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["tau", "accuracy", "experts", "that", "ran", "multiply-adds", "of", "dense"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "0.5", "0.9"]
    assert lines[4].startswith("accuracy on 40 samples")
    found = run("-q", *args, "--output", "json").json
    assert set(found) == {"model", "data", "task", "dense_multiply_adds", "points"}
    first, second, third = found["points"]
    assert first["executed"] == 1.0
    assert first["executed"] > second["executed"] > third["executed"]
    assert third["multiply_adds"] < first["multiply_adds"]
    assert first["relative"] > 1.0  # the routers come on top


def test_sweep_needs_experts(run: Run) -> None:
    result = run("-q", "sweep", "nets:gelu", *DATA)
    assert result.code == 2
    assert "The graph has no experts, so tau changes nothing. Apply moeify first." in result.err
