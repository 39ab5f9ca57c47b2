"""The byte-and-FLOP model of a GPU: cases computed by hand, what must be monotone, and its bounds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.kernels.gpu_model.cost import (
    ASSUMPTIONS,
    LayerShape,
    best_size,
    break_even,
    fastest_way,
    predict,
)
from surgeon.kernels.gpu_model.devices import DEVICES, Device, find_device

H100 = DEVICES["h100"]
BERT = LayerShape(768, 3072, 128)

devices = st.sampled_from(list(DEVICES.values()))
layers = st.builds(
    lambda width, experts, size, gated: LayerShape(width, experts * size, size, gated),
    st.sampled_from([64, 768, 4096]),
    st.sampled_from([1, 8, 128]),
    st.sampled_from([1, 6, 16, 24, 128, 512]),
    st.booleans(),
)
tokens = st.sampled_from([1, 2, 16, 17, 300, 8192, 100_000])
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])


def test_one_token_takes_as_long_as_reading_the_weights() -> None:
    found = predict(H100, LayerShape(8192, 32768, 128), 1, 0.25)
    weights = 2 * 8192 * 32768 * 2  # bytes
    assert found.dense.bound == found.ours.bound == "memory"
    assert found.dense.seconds == pytest.approx(weights / (0.9 * 3.35e12) + 3 * 5e-6, rel=1e-3)
    # One kernel, a fill and a conversion; 64 experts add to the output.
    sums = 64 * 8192 * 4 / (0.22 * H100.cache)
    assert found.ours.seconds == pytest.approx(0.25 * weights / (0.9 * 3.35e12) + sums + 3 * 5e-6, rel=1e-3)


def test_many_tokens_take_as_long_as_the_arithmetic() -> None:
    found = predict(H100, BERT, 8192, 1.0, way="experts")
    flops = 2 * 8192 * 2 * 768 * 3072
    assert found.dense.bound == "arithmetic"
    assert found.dense.seconds == pytest.approx(flops / (0.7 * 989e12) + 3 * 5e-6)
    assert found.ours.parts["arithmetic"] == pytest.approx(flops / (0.5 * 989e12))  # 64 full tiles of 128 rows
    assert found.ours.parts["launches"] == pytest.approx(7 * 5e-6)  # the output does not fit in the cache
    assert predict(H100, BERT, 4096, 1.0, way="experts").ours.parts["launches"] == pytest.approx(7 * 5e-6)


def test_a_small_layer_takes_as_long_as_its_launches() -> None:
    found = predict(H100, LayerShape(64, 256, 64), 300, 0.5)
    assert found.dense.bound == found.ours.bound == "launches"
    assert found.ratio < 1.0


def test_one_token_is_not_padded() -> None:
    found = predict(H100, LayerShape(768, 3072, 6), 1, 1.0, "float32").ours
    assert found.parts["arithmetic"] == pytest.approx(2 * 2 * 768 * 3072 / (0.35 * 67e12))
    few = predict(H100, LayerShape(768, 3072, 6), 2, 1.0, "float32").ours
    assert few.parts["arithmetic"] == pytest.approx(16 * 16 / 6 * found.parts["arithmetic"])


def test_small_experts_pay_for_their_padding() -> None:
    def arithmetic(size: int, dtype: str = "bfloat16") -> float:
        return predict(H100, LayerShape(768, 3072, size), 8192, 1.0, dtype, way="experts").ours.parts["arithmetic"]

    assert arithmetic(6) == pytest.approx(16 / 6 * arithmetic(16))
    assert arithmetic(24) == pytest.approx(32 / 24 * arithmetic(32))
    assert arithmetic(16) == pytest.approx(arithmetic(128))
    assert arithmetic(384) == pytest.approx(arithmetic(128))
    assert arithmetic(24, "float32") == pytest.approx(64 / 24 * arithmetic(64, "float32"))


def test_an_output_that_outgrows_the_cache_is_added_up_in_memory() -> None:
    few, many = (predict(H100, BERT, n, 0.3, way="experts").ours for n in (8_000, 80_000))
    pairs = 8_000 * 24 * 0.3
    # 8,000 · 768 · 4 bytes fit in half of the cache: what is read is weights, rows, scores, plan, and the result.
    once = 2 * BERT.weights + 2 * 2 * 8_000 * 768 + 4 * (8_000 * 24 + 2 * pairs)
    assert few.parts["memory"] == pytest.approx(once / (0.9 * 3.35e12))
    assert few.parts["sums"] == pytest.approx(pairs * 768 * 4 / (0.22 * H100.cache))
    # Ten times as many pairs, each written and read in 2 bytes.
    assert many.parts["sums"] == pytest.approx(10 * pairs * 768 * 2 * 2 / (0.57 * 3.35e12))


@settings(max_examples=60, deadline=None)
@given(devices, layers, tokens, dtypes)
def test_more_of_anything_never_takes_less(device: Device, layer: LayerShape, count: int, dtype: str) -> None:
    times = [predict(device, layer, count, share, dtype).ours.seconds for share in (0.001, 0.05, 0.2, 0.5, 0.99, 1.0)]
    assert times == sorted(times)
    more = predict(device, layer, 2 * count, 0.2, dtype)
    less = predict(device, layer, count, 0.2, dtype)
    assert more.dense.seconds >= less.dense.seconds
    wider = dataclasses.replace(layer, width=2 * layer.width)
    assert predict(device, wider, count, 0.2, dtype).ours.seconds >= less.ours.seconds
    faster = dataclasses.replace(device, memory=2 * device.memory, cache=2 * device.cache)
    assert predict(faster, layer, count, 0.2, dtype).ours.seconds <= less.ours.seconds


@settings(max_examples=60, deadline=None)
@given(devices, layers, tokens, dtypes, st.sampled_from([0.01, 0.2, 1.0]))
def test_no_time_is_below_its_parts(device: Device, layer: LayerShape, count: int, dtype: str, share: float) -> None:
    found = predict(device, layer, count, share, dtype)
    for estimate in (found.dense, found.ours):
        longest = max(estimate.parts.values())
        assert longest <= estimate.seconds <= 3 * longest
        assert estimate.parts[estimate.bound] == longest
    # What is selected cannot be computed faster than at the published rate, nor read faster than memory gives it.
    assert found.ours.seconds > 2 * count * share * layer.weights / device.rates[dtype]


@settings(max_examples=40, deadline=None)
@given(devices, layers, tokens, dtypes)
def test_at_break_even_both_take_the_same(device: Device, layer: LayerShape, count: int, dtype: str) -> None:
    share = break_even(device, layer, count, dtype)
    if share == 0.0:
        assert predict(device, layer, count, 1e-6, dtype).ratio < 1.0
    elif share == 1.0:
        assert predict(device, layer, count, 1.0, dtype).ratio >= 1.0
    else:
        assert predict(device, layer, count, share, dtype).ratio >= 1.0
        assert predict(device, layer, count, min(1.0, share + 2e-4), dtype).ratio < 1.0


def test_the_best_size_is_the_fastest_and_dense_wins_where_it_is_faster() -> None:
    found = best_size(H100, 768, 3072, 8192, 0.1, sizes=(6, 24, 128))
    assert set(found.predictions) == {6, 24, 128}
    assert found.size == 128
    assert all(found.predictions[128].ours.seconds <= one.ours.seconds for one in found.predictions.values())
    assert best_size(H100, 768, 3072, 8192, 0.9).size is None
    # A share of its own for each size: small experts that need much less win.
    cheap = best_size(H100, 4096, 16384, 1, {128: 0.5, 16: 0.05}, sizes=(128, 16))
    assert cheap.size == 16


def test_the_way_is_the_one_that_was_fastest_on_an_h100() -> None:
    def ways(tokens: int, width: int = 768, hidden: int = 3072, *, gated: bool = False) -> list[str]:
        sizes = (512, 128, 32) if gated else (256, 128, 24, 6)
        return [fastest_way(H100, LayerShape(width, hidden, size, gated), tokens) for size in sizes]

    assert ways(1) == ["experts"] * 4
    assert ways(512) == ways(2048) == ["masked"] * 4
    assert ways(16384) == ["experts", "spread", "masked", "masked"]
    assert ways(2048, 4096, 14336, gated=True) == ["experts", "spread", "spread"]
    assert ways(8192, 4096, 14336, gated=True) == ["experts", "spread", "spread"]
    # The less is selected, the less pays whoever computes nothing else.
    assert fastest_way(H100, LayerShape(768, 3072, 24), 16384, share=0.001) == "experts"
    assert fastest_way(H100, BERT, 16384, share=0.9) == "masked"


def test_the_way_does_not_depend_on_what_is_selected() -> None:
    found = [predict(H100, BERT, 16384, share) for share in (0.01, 0.2, 1.0)]
    assert {one.way for one in found} == {"spread"}
    assert found[0].ours.seconds < found[1].ours.seconds < found[2].ours.seconds


def test_spread_computes_the_second_product_whole() -> None:
    layer, share = LayerShape(4096, 16384, 128, gated=True), 0.25
    found = predict(H100, layer, 8192, share, way="spread").ours
    product = 2 * 8192 * 4096 * 16384  # FLOP of one of three
    by_expert = 2 * (8192 * share / 128 + 0.5) * 128 * product / 8192
    expected = by_expert / (0.5 * 989e12) + product / (0.7 * 989e12)
    assert found.parts["arithmetic"] == pytest.approx(expected)
    assert found.parts["sums"] == 0.0
    assert found.parts["launches"] == pytest.approx(7 * 5e-6)


def test_masked_costs_as_much_whatever_is_selected_but_for_what_is_read() -> None:
    layer = LayerShape(4096, 16384, 128, gated=True)
    few, every = (predict(H100, layer, 8192, share, way="masked") for share in (0.01, 1.0))
    assert few.dense.seconds < few.ours.seconds < every.ours.seconds < 1.2 * few.dense.seconds
    assert few.ours.parts["arithmetic"] == few.dense.parts["arithmetic"]


def test_what_is_not_known_is_refused() -> None:
    for call, words in (
        (lambda: find_device("b99"), "No model of a device 'b99'. There are: h100, h200, a100."),
        (lambda: LayerShape(768, 3072, 100), "Experts of 100 neurons do not divide a hidden width of 3072: 72 neurons"),
        (lambda: LayerShape(768, 0, 1), "at least 1"),
        (lambda: predict(H100, BERT, 1, 0.5, "int8"), "No model of int8. There are: float32, bfloat16, float16."),
        (lambda: predict(H100, BERT, 0, 0.5), "0 tokens that select 0.5"),
        (lambda: predict(H100, BERT, 1, 1.5), "Give at least 1 token, and a share above 0 and at most 1"),
        (lambda: best_size(H100, 768, 3072, 1, 0.5, sizes=(7,)), "None of the sizes 7 divides"),
    ):
        with pytest.raises(UsageError, match=words.replace("(", r"\(")):
            call()
    assert find_device("H100") is H100
    assert len(ASSUMPTIONS) == 5
