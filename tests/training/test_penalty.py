"""Sparsity: what is penalised and measured, and the control that finds the weight of the penalty."""

from __future__ import annotations

import json

import pytest
import torch

from surgeon.kernels.activations import active_share
from surgeon.passes.report import PassReport
from surgeon.training.loop import FitReport
from surgeon.training.penalty import (
    AlphaControl,
    AlphaSchedule,
    Sparsity,
    alpha_at,
    l1,
    penalised_values,
    square_hoyer,
)


def test_l1_is_the_sum_per_token_in_float32() -> None:
    a = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    assert l1(a).tolist() == [[3.5, 0.0]]
    assert l1(a).dtype == torch.float32


def test_penalties_agree_about_one_active_neuron() -> None:
    a = torch.tensor([0.0, 3.0, 0.0])
    assert (float(square_hoyer(a)), float(l1(a))) == (pytest.approx(1.0), 3.0)


@pytest.mark.parametrize(
    ("activation", "want"),
    [("relu", [0.0, 0.0, 2.0]), ("relu2", [0.0, 0.0, 4.0]), ("gelu", [0.0, 2.0, 7.0]), ("silu", [0.0, 2.0, 7.0])],
)
def test_where_an_activation_leaves_no_zeros_its_shifted_input_is_penalised(activation: str, want: list[float]) -> None:
    assert penalised_values(torch.tensor([-9.0, -3.0, 2.0]), activation, -5.0).tolist() == want


def test_small_differences_survive_the_shift_in_half_precision() -> None:
    z = torch.tensor([0.01, 0.02], dtype=torch.bfloat16)
    assert penalised_values(z, "gelu", -10.0).tolist() == pytest.approx((z.float() + 10).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "at"), [("constant", [1, 1, 1]), ("linear", [0, 0.5, 1]), ("linear_warmup", [0, 1, 1])]
)
def test_alpha_over_time(schedule: AlphaSchedule, at: list[float]) -> None:
    assert [alpha_at(schedule, 0.5, done) for done in (0.0, 0.5, 1.0)] == [0.5 * share for share in at]


def test_active_are_those_above_a_hundredth_of_the_largest() -> None:
    a = torch.tensor([[100.0, 2.0, 0.5, -3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert active_share(a).tolist() == [0.75, 1.0, 0.0]


def test_shares_of_small_values() -> None:
    a = torch.tensor([[1000.0, -99.0, 9.0, 0.9, 0.0], [10.0, 10.0, 10.0, 10.0, 0.05]])
    found = Sparsity.of(a)
    assert found.zero == pytest.approx(1 / 10)
    assert found.below_10th == pytest.approx((4 + 1) / 10)
    assert found.below_100th == pytest.approx((3 + 1) / 10)
    assert found.below_1000th == pytest.approx(2 / 10)


def test_a_silent_token_has_no_active_neuron() -> None:
    assert Sparsity.of(torch.zeros(2, 4)) == Sparsity(1.0, 1.0, 1.0, 1.0)
    assert Sparsity.of(torch.zeros(2, 4)).active == 0.0


def test_active_is_the_mean_active_share() -> None:
    a = torch.tensor([[100.0, 2.0, 0.5, -3.0], [0.0, 0.0, 0.0, 0.0]])
    assert Sparsity.of(a).active == pytest.approx(float(active_share(a).mean()))


def test_sparsity_of_activations_that_carry_gradients() -> None:
    assert Sparsity.of(torch.ones(2, 4, requires_grad=True)).zero == 0.0


def test_reports_bring_sparsity_back_from_json() -> None:
    pair = Sparsity(0.1, 0.4, 0.3, 0.2), Sparsity(0.9, 0.99, 0.97, 0.95)
    fit = FitReport(3, 1.0, 2.0, ((1, {"task loss": 0.5}),), 2, {"h.0.mlp": pair})
    report = PassReport("sparsify", {"target": {"*": 0.1}}, ["h.0.mlp"], (), fit=fit)
    assert PassReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    old = report.to_dict()
    del old["fit"]["sparsity"]  # as earlier versions wrote it
    read = PassReport.from_dict(json.loads(json.dumps(old))).fit
    assert read is not None
    assert read.sparsity == {}


# --- control ----------------------------------------------------------------------------------------------------------


def driven(targets: list[float], steps: int = 200, speed: float = 0.05) -> tuple[AlphaControl, torch.Tensor]:
    """Layers whose activity falls faster the more weight they get, and recovers without any."""
    control, active = AlphaControl(targets, 1e-3), torch.full((len(targets),), 0.5)
    for step in range(steps):
        control.observe(active, step / steps)
        push = (control.alphas / 1e-3).log() * speed
        active = (active * (-push).exp()).clamp(1e-3, 0.5)
    return control, active


def test_every_layer_is_driven_to_its_own_target() -> None:
    _, active = driven([0.1, 0.02, 0.4])
    assert active.tolist() == pytest.approx([0.1, 0.02, 0.4], rel=0.25)


def test_a_layer_above_its_goal_gets_more_weight_and_one_below_less() -> None:
    control = AlphaControl([0.1, 0.9], 1e-3)
    assert control.alphas.tolist() == pytest.approx([1e-3, 1e-3])
    for _ in range(20):
        control.observe(torch.tensor([0.5, 0.5]), 1.0)
    high, low = control.alphas.tolist()
    assert high > 2e-3
    assert low < 0.5e-3


def test_a_layer_without_a_target_has_no_weight() -> None:
    control, alone = AlphaControl([None, 0.1], 1e-3), AlphaControl([0.1], 1e-3)
    for _ in range(20):
        control.observe(torch.tensor([0.5, 0.5]), 1.0)
        alone.observe(torch.tensor([0.5]), 1.0)
        assert control.alphas.tolist() == [0.0, float(alone.alphas)]


def test_weights_stay_within_limits() -> None:
    control = AlphaControl([0.001], 1e-3)
    for _ in range(2000):
        control.observe(torch.tensor([0.9]), 1.0)
    assert float(control.alphas) <= torch.tensor(2.0 + 2.0).exp()
    for _ in range(4000):
        control.observe(torch.tensor([1e-9]), 1.0)
    assert 0 < float(control.alphas) < 1e-6


def test_the_goal_moves_slowly_from_where_the_layer_starts() -> None:
    """At the start no layer is above its goal, so nothing jumps."""
    control = AlphaControl([0.01], 1e-3)
    control.observe(torch.tensor([0.5]), 0.0)
    assert float(control.alphas) == pytest.approx(1e-3)


def test_observations_in_one_step_count_as_one() -> None:
    once, often = AlphaControl([0.1], 1e-3), AlphaControl([0.1], 1e-3, per_step=4)
    for step in range(100):
        active = torch.tensor([0.5 - 0.004 * step])
        once.observe(active, step / 100)
        for part in range(4):
            often.observe(active, (step + part / 4) / 100)
    grown, want = (float((one.alphas / 1e-3).log()) for one in (often, once))
    assert grown == pytest.approx(want, rel=0.05)


def test_control_goes_on_from_a_checkpoint() -> None:
    whole = AlphaControl([0.1, 0.2], 1e-3)
    part = AlphaControl([0.1, 0.2], 1e-3)
    values = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    for step in range(15):
        whole.observe(values[step], step / 30)
        part.observe(values[step], step / 30)
    resumed = AlphaControl([0.1, 0.2], 1e-3)
    resumed.load_state_dict({name: value.clone() for name, value in part.state_dict().items()})  # type: ignore[union-attr]
    for step in range(15, 30):
        whole.observe(values[step], step / 30)
        resumed.observe(values[step], step / 30)
    assert torch.equal(whole.alphas, resumed.alphas)


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([1.0, 0.0, 0.0, 0.0], 1.0),
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([2.0, 2.0, 0.0, 0.0], 2.0),
        ([3.0, 4.0], 49 / 25),
        ([1.0, -2.0, 3.0], 36 / 14),
        ([0.0, 0.0, 0.0], 0.0),
    ],
)
def test_square_hoyer(values: list[float], want: float) -> None:
    assert float(square_hoyer(torch.tensor(values))) == pytest.approx(want, rel=1e-5)


def test_square_hoyer_is_per_token_in_float32() -> None:
    a = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=torch.bfloat16)
    assert square_hoyer(a).dtype == torch.float32
    assert torch.allclose(square_hoyer(a), torch.tensor([[2.0, 1.0]]))


def test_square_hoyer_does_not_depend_on_scale() -> None:
    a = torch.rand(3, 7)
    assert torch.allclose(square_hoyer(a * 100), square_hoyer(a), rtol=1e-4)
