"""Timing in turn, cells, and what they say about each other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from surgeon.bench import methods as all_methods
from surgeon.bench.engines import ENGINES
from surgeon.bench.grid import Cell, time_grid
from surgeon.bench.layer import Case, Problem
from surgeon.bench.machine import Machine, examine
from surgeon.bench.method import Method
from surgeon.bench.methods import METHODS
from surgeon.bench.timing import TimedCall, cache_size, median_seconds
from surgeon.bench.whole import repeated
from surgeon.errors import UsageError
from surgeon.kernels.gpu_model.cost import LayerShape
from surgeon.progress import Progress

CPU = torch.device("cpu")
MACHINE = Machine("cpu", "a processor", "AVX2", 1, "2.13", "native", None, "thread", {"float32": 1e9}, 1e9)
SHAPE = LayerShape(8, 32, 4)


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptying the real one takes longer than everything else here."""
    monkeypatch.setattr("surgeon.bench.timing.cache_size", lambda: 1024)


def test_calls_are_timed_in_turn_and_at_least_five_times() -> None:
    seen = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    calls = {"a": TimedCall(lambda: seen.append("a"), around), "b": TimedCall(lambda: seen.append("b"))}
    found = median_seconds(calls, CPU, seconds=1e-9, threads=2)
    assert set(found) == {"a", "b"}
    assert all(seconds >= 0 for seconds in found.values())
    assert seen == ["in", "a", "out", "b"] * 5


def test_what_comes_first_is_not_timed() -> None:
    calls = {"": TimedCall(lambda: None, first=lambda: time.sleep(0.02))}
    assert median_seconds(calls, CPU, seconds=1e-9, threads=2)[""] < 0.01


def test_the_cache_has_a_size() -> None:
    assert 16 << 20 <= cache_size() <= 256 << 20


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    wanted = [Case(SHAPE, "float32", tokens, "uniform", share, "gelu") for tokens in (1, 40) for share in (0.25, 1.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgeon.bench.timing.cache_size", lambda: 1024)
        return time_grid(wanted, ["dense", "loop", "ours", "ours_dense"], MACHINE, seconds=1e-4)


def test_ratios_are_those_of_the_times(cells: list[Cell]) -> None:
    assert [(cell.tokens, cell.share, cell.executed) for cell in cells] == [
        (tokens, share, share) for tokens in (1, 40) for share in (0.25, 1.0)
    ]
    for cell in cells:
        ms = {name: timing.milliseconds for name, timing in cell.methods.items()}
        assert list(ms) == ["dense", "loop", "ours", "ours_dense"]
        assert all(value is not None and value > 0 for value in ms.values())
        assert all(timing.error is not None and timing.error < 1e-5 for timing in cell.methods.values())
        assert ms["ours"] is not None
        assert cell.gain == pytest.approx(ms["dense"] / ms["ours"])
        assert cell.kernel_gain == pytest.approx(ms["ours_dense"] / ms["ours"])
        assert cell.ceiling == 1 / cell.share
        assert cell.of_limit == pytest.approx(cell.limit / ms["ours"])


def test_the_limit_is_arithmetic_or_memory(cells: list[Cell]) -> None:
    one, _, many, _ = cells
    # 2 of 8 experts of 4 neurons: 128 weights, 4 bytes each, at 1 GB/s and 1 GFLOP/s.
    assert (one.limit, one.limited_by) == (pytest.approx(1000 * 2 * 4 * 16 * 4 / 1e9), "memory")
    assert (many.limit, many.limited_by) == (pytest.approx(1000 * 2 * 80 * 4 * 16 / 1e9), "arithmetic")


def test_the_limit_leaves_out_what_relu_switches_off(cells: list[Cell]) -> None:
    wanted = [Case(SHAPE, "float32", tokens, "uniform", 0.25, "relu") for tokens in (1, 40)]
    for cell, all_neurons in zip(time_grid(wanted, ["ours"], MACHINE, seconds=1e-4), cells[::2], strict=True):
        assert cell.limited_by == all_neurons.limited_by
        assert all_neurons.limit / 2 < cell.limit < all_neurons.limit  # it needs w1, and some rows of w2


def test_a_half_type_is_limited_by_the_faster_product() -> None:
    slow = dataclasses.replace(MACHINE, gemm={"float32": 1e9, "bfloat16": 1e8})
    limits = [
        time_grid([Case(SHAPE, "bfloat16", 40, "uniform", 1.0, "gelu")], ["ours"], machine, seconds=1e-4)[0].limit
        for machine in (slow, dataclasses.replace(slow, gemm={"float32": 1e9, "bfloat16": 2e9}))
    ]
    assert limits == [pytest.approx(1000 * 2 * 320 * 4 * 16 / rate) for rate in (1e9, 2e9)]


def test_layers_follow_each_other_where_a_call_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Problem] = []
    calls: list[int] = []

    def prepare(problem: Problem) -> Callable[[], torch.Tensor]:
        prepared.append(problem)
        place = len(prepared)

        def call() -> torch.Tensor:
            calls.append(place)
            return problem.x

        return call

    monkeypatch.setitem(METHODS, "ours", Method("", prepare))
    time_grid([Case(SHAPE, "float32", tokens, "uniform", 0.5) for tokens in (16, 17)], ["ours"], MACHINE, seconds=1e-9)
    assert [len(problem.x) for problem in prepared] == [16] * 9 + [17] * 2
    assert calls == [*range(1, 10)] * 6 + [10, 11] * 6  # each once before they are timed, and five times then
    assert len({float(problem.experts.w1[0, 0, 0]) for problem in prepared[:9]}) == 9


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    wanted = ["compiled", "published", "ours"]
    moments: list[Progress] = []
    gated = dataclasses.replace(SHAPE, gated=True)
    (cell,) = time_grid(
        [Case(gated, "float32", 2, "uniform", 0.5)], wanted, MACHINE, seconds=1e-4, progress=moments.append
    )
    assert cell.methods["compiled"].why == "no C++ compiler was found"
    assert cell.methods["published"].why == "the published method has no gated layers"
    assert cell.methods["compiled"].milliseconds is cell.methods["published"].error is None
    assert (cell.gain, cell.kernel_gain) == (None, None)
    assert cell.of_limit is not None
    assert [(moment.done, moment.total) for moment in moments] == [(0, 0), (1, 1)]


def test_the_machine_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.bench.machine._SIDE", {"cpu": 32})
    monkeypatch.setattr("surgeon.bench.machine._BUFFER", {"cpu": 1 << 16})
    monkeypatch.setattr("surgeon.bench.machine.cache_size", lambda: 1024)
    threads = torch.get_num_threads()
    found = examine(CPU, 1, ["bfloat16"], 1e-4)
    assert list(found.gemm) == ["float32", "bfloat16"]
    assert min(found.gemm.values()) > 0
    assert found.bandwidth is not None
    assert found.bandwidth > 0
    assert (found.clock, found.gpu) == ("thread", None)
    assert found.processor
    assert found.kernels.startswith(("native", "torch backend"))
    bare = examine(CPU, 2)
    assert (bare.gemm, bare.bandwidth, bare.clock) == ({}, None, "wall")
    assert torch.get_num_threads() == threads


def test_every_method_has_a_summary() -> None:
    ours = ["ours", "ours_dense", "ours_int8", "ours_int4", "ours_fp8"]
    assert [name for name in METHODS if name not in ENGINES][-5:] == ours
    assert all(method.summary for method in all_methods.METHODS.values())


def test_example_inputs_are_repeated() -> None:
    inputs = ((torch.arange(6).view(2, 3),), {"mask": torch.ones(2, 1), "scale": torch.tensor(2.0), "flag": True})
    (x,), kwargs = repeated(inputs, 5)
    assert x[:, 0].tolist() == [0, 3, 0, 3, 0]
    assert kwargs["mask"].shape == (5, 1)
    assert (kwargs["scale"], kwargs["flag"]) == (2.0, True)
    assert repeated(torch.ones(4, 2), 1)[0][0].shape == (1, 2)
    for wrong, batch in ((torch.tensor(1.0), 2), (torch.ones(2), 0)):
        with pytest.raises(UsageError, match=f"repeated to {batch} samples"):
            repeated(wrong, batch)


def test_example_inputs_are_made_longer_and_shorter() -> None:
    ids = torch.arange(6).view(2, 3)
    (x,), kwargs = repeated(((ids,), {"mask": ids + 10, "image": torch.ones(2, 4, 5), "size": torch.ones(3)}), 1, 5)
    assert x.tolist() == [[0, 1, 2, 0, 1]]
    assert kwargs["mask"].tolist() == [[10, 11, 12, 10, 11]]
    assert (kwargs["image"].shape, kwargs["size"].shape) == ((1, 4, 5), (3,))
    assert repeated(ids, 2, 2)[0][0].tolist() == [[0, 1], [3, 4]]
    for wrong, length in ((torch.ones(2), 2), (ids, 0)):
        with pytest.raises(UsageError, match=f"repeated to {length} tokens"):
            repeated(wrong, 1, length)
