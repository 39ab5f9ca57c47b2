"""The diff: a line for each group of sites at several widths, and what every pass says of itself."""

from __future__ import annotations

import pytest

from surgeon.graph.snapshot import GraphDiff, NodeRecord
from surgeon.measure.cost import Cost
from surgeon.passes.report import PassDiff, PassReport, SiteChange
from surgeon.sites.rejection import Rejection
from surgeon.surgery.diff import Diff
from surgeon.text.diff import Detail, diff_text, diff_view
from surgeon.text.plain import plain_text
from surgeon.training.loop import FitReport
from surgeon.training.penalty import Sparsity
from tests.text.reports import report


def diff(*reports: PassReport) -> Diff:
    nodes = GraphDiff(
        (
            NodeRecord("gelu_10", "encoder.layer.10", "gelu", "gelu(linear_65)", ("linear_65",), "2×8×1536"),
            NodeRecord("gelu_2", "encoder.layer.2", "gelu", "gelu(linear_17)", ("linear_17",), "2×8×1536"),
        ),
        (NodeRecord("moe_2", "encoder.layer.2", "moe", "moe(add)", ("add",), "2×8×384"),),
        (("encoder.layer.2.fc.weight", (1536, 384)),),
    )
    return Diff(tuple(PassDiff(one, nodes) for one in reports))


def test_diff_says_what_a_pass_did_in_one_line_a_group() -> None:
    header, parameters, adds, columns, sites, refused, note = diff_text(diff(report()).passes, "sites").splitlines()[:7]
    assert header == "moeify  6 of 7 sites  same output (differs by 2e-07)  not trained  23 s"
    assert parameters == "  parameters     22.6 M → 23.0 M  +1.8%"
    assert adds == "  multiply-adds  176 M → 184 M    +4.5%  100% of what can be skipped ran"
    assert columns.split() == ["site", "was", "→", "is", "parameters", "mult-adds/token", "ran"]
    assert sites == (
        "  encoder.layer.0…5  ×6  FFN 384→1536→384 gelu → 48 experts × 32, router 128"
        "  1.18 M → 1.24 M  1.18 M → 1.23 M  100%"
    )
    assert note.startswith("  note: The routers were not trained")
    assert refused == "  refused pooler: tanh between linears 384→384→2 is a pooler or a classifier head, not an FFN"


def test_str_of_a_diff_is_its_text() -> None:
    one = diff(report())
    assert str(one) == diff_text(one.passes, "sites")
    assert one.text("stat") == diff_text(one.passes, "stat")


@pytest.mark.parametrize("detail", ["sites", "stat", "full"])
@pytest.mark.parametrize("width", [80, 100, 120])
def test_diff_fits_the_terminal(width: int, detail: str) -> None:
    several = diff(report(name="swap-activation", preserved=False, max_error=0.31), report())
    lines = plain_text(diff_view(several.passes, detail), width).splitlines()  # type: ignore[arg-type]
    assert max(map(len, lines)) <= width
    joined = " ".join(" ".join(lines).split())
    assert "176 M → 184 M" in joined
    assert "moeify" in joined
    assert not any(line != line.rstrip() for line in lines)


def test_narrow_terminals_get_three_lines_a_group() -> None:
    lines = plain_text(diff_view(diff(report()).passes, "sites"), 80).splitlines()
    start = lines.index("  encoder.layer.0…5  ×6")
    assert lines[start + 1] == "    FFN 384→1536→384 gelu → 48 experts × 32, router 128"
    assert lines[start + 2].startswith("    1.18 M → 1.24 M parameters, 1.18 M → 1.23 M multiply-adds/token, 100% ran")


def test_full_diff_has_every_site_and_node_by_module_path() -> None:
    text = diff_text(diff(report()).passes, "full")
    assert all(f"encoder.layer.{index} " in text for index in range(6))
    assert text.index("  encoder.layer.2\n") < text.index("  encoder.layer.10\n")
    assert "    - gelu_2 = gelu(linear_17) : 2×8×1536\n    + moe_2 = moe(add) : 2×8×384" in text
    assert "  parameters\n    - encoder.layer.2.fc.weight [1536, 384]" in text


def test_stat_has_a_line_a_pass() -> None:
    fit = FitReport(120, 3.0, 33.5, ((1, {"router loss": 1.2}), (120, {"router loss": 0.03})))
    lines = diff_text(diff(report(name="lower", sites=()), report(fit=fit)).passes, "stat").splitlines()
    assert [line.split()[0] for line in lines] == ["pass", "lower", "moeify"]
    assert lines[2].split() == [
        "moeify", "6/7", "22.6", "M", "→", "23.0", "M", "176", "M", "→", "184", "M", "100%", "same", "(2e-07)", "120",
        "steps", "23", "s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preserved": False, "max_error": 0.0312}, "output moved by 3.1%"),
        ({"preserved": False, "max_error": 49.2}, "output moved by 49×"),
        ({"max_error": 0.0}, "same output  not trained"),
        ({"max_error": None}, "not verified"),
        ({"matched": [], "sites": ()}, "0 of 1 sites  nothing changed"),
        (
            {"after": Cost(23_000_000, 184_000_000, 62_000_000, 0.27)},
            "27% of what can be skipped ran, 62.0 M in all (example inputs, padding counted)",
        ),
        ({"before": None, "after": None}, "moeify  6 of 7 sites"),
        ({"notes": ("Batch size is fixed.",)}, "note: Batch size is fixed."),
        ({"notes": ()}, "same output (differs by 2e-07)  23 s"),
        ({"fit": FitReport(0, 0.0, 0.0, ())}, "  fitted without training\n"),
        ({"name": "third-party"}, "third-party  6 of 7 sites  same output (differs by 2e-07)  23 s"),
        (
            {"fit": FitReport(120, 3.0, 33.5, ((1, {"router loss": 1.2}), (120, {"router loss": 0.03})), 40)},
            "trained 120 steps in 34 s, resumed at 40: router loss 1.2 → 0.03",
        ),
    ],
)
def test_diff_tells(changes: dict[str, object], words: str) -> None:
    assert words in diff_text(diff(report(**changes)).passes)


def test_refusals_for_the_same_reason_are_one_line() -> None:
    rejected = tuple(
        Rejection("escapes", f"the hidden values (gelu_{index}) escape", f"h.{index}") for index in range(3)
    )
    text = diff_text(diff(report(rejected=rejected)).passes)
    assert "refused 3 sites, first h.0: the hidden values (gelu_0) escape" in text
    assert "h.1" not in text
    assert "refused h.1: the hidden values (gelu_1) escape" in diff_text(diff(report(rejected=rejected)).passes, "full")


DENSELY, SPARSELY = Sparsity(0.4, 0.6, 0.5, 0.45), Sparsity(0.9, 0.99, 0.968, 0.95)


def sparsified(sparsity: dict[str, tuple[Sparsity, Sparsity]]) -> PassReport:
    sites = tuple(
        SiteChange(path, "FFN 16→32→16 relu", "FFN 16→32→16 relu + tap", (9, 9), (9, 9), ("a", "a"))
        for path in sparsity
    )
    fit = FitReport(120, 3.0, 12.0, ((1, {"task loss": 1.0}), (120, {"task loss": 0.5})), sparsity=sparsity)
    cost = Cost(100, 200, 200)
    return PassReport("sparsify", {}, list(sparsity), [], sites, 13.0, cost, cost, 0.2, preserved=False, fit=fit)


def shown(sparsity: dict[str, tuple[Sparsity, Sparsity]], detail: Detail) -> list[str]:
    passes = [PassDiff(sparsified(sparsity), GraphDiff())]
    return plain_text(diff_view(passes, detail), 120).splitlines()


def test_sparsity_is_shown_layer_by_layer_with_like_layers_joined() -> None:
    same = {f"h.{index}.mlp": (DENSELY, SPARSELY) for index in range(3)}
    lines = shown({**same, "h.3.mlp": (DENSELY, DENSELY)}, "sites")
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == ["neurons"])
    assert lines[start - 1].startswith("  trained 120 steps in 12 s")
    assert lines[start].split() == ["neurons", "active", "exactly", "zero"]
    assert lines[start + 1].split() == ["h.0…2.mlp", "×3", "50%", "→", "3.2%", "40%", "→", "90%"]
    assert lines[start + 2].split() == ["h.3.mlp", "50%", "40%"]
    assert lines[start + 3].startswith("  active: above a hundredth of the token's largest value")
    assert "The full diff also shows a tenth and a thousandth" in " ".join(" ".join(lines[start + 3 :]).split())


def test_full_detail_has_every_layer_and_all_three_parts() -> None:
    lines = shown({f"h.{index}.mlp": (DENSELY, SPARSELY) for index in range(2)}, "full")
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == ["neurons"])
    assert lines[start].split() == ["neurons", "exactly", "zero", "below", "1/10", "below", "1/100", "below", "1/1000"]
    for number in range(2):
        row = " ".join(lines[start + 1 + number].split())
        assert row == f"h.{number}.mlp 40% → 90% 60% → 99% 50% → 97% 45% → 95%"


def test_passes_without_sparsity_have_no_such_table() -> None:
    assert not any("neurons" in line for line in shown({}, "sites"))
    assert not any("neurons" in line for line in shown({"h.0": (DENSELY, SPARSELY)}, "stat"))
