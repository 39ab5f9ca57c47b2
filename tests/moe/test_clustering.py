import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.moe import clustering
from surgeon.moe.clustering import balanced_clusters, nearest_divisors


def blobs(clusters: int, size: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((clusters, 8)).astype(np.float32) * 10
    truth = generator.permutation(np.repeat(np.arange(clusters), size))
    return centres[truth] + spread * generator.standard_normal((clusters * size, 8)).astype(np.float32), truth


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    groups = [points[labels == label] for label in np.unique(labels)]
    return float(sum(np.square(group - group.mean(0)).sum() for group in groups))


def test_finds_separate_blobs() -> None:
    points, truth = blobs(6, 10, spread=0.1)
    labels = balanced_clusters(points, 6, seed=0).numpy()
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 6


@settings(max_examples=15, deadline=None)
@given(clusters=st.integers(2, 9), size=st.integers(1, 7), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_sizes_are_equal_and_labels_repeat(clusters: int, size: int, width: int, seed: int) -> None:
    points = np.random.default_rng(seed).standard_normal((clusters * size, width))
    labels = balanced_clusters(points, clusters, seed=seed)
    assert labels.dtype == torch.int64
    assert torch.bincount(labels, minlength=clusters).tolist() == [size] * clusters
    assert torch.equal(labels, balanced_clusters(points, clusters, seed=seed))


def test_rows_that_would_lose_most_choose_first() -> None:
    distances = np.array([[0.0, 1.0], [0.0, 9.0]], dtype=np.float32)
    assert clustering._assign(distances, np.array([1, 1])).tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_of_given_sizes_go_where_as_many_rows_are(seed: int) -> None:
    points, truth = blobs(3, 10, spread=0.1)
    rows = [np.flatnonzero(truth == blob)[:size] for blob, size in ((0, 3), (1, 10), (2, 10))]
    kept = np.random.default_rng(seed).permutation(np.concatenate(rows))
    labels = balanced_clusters(points[kept], [10, 10, 3], seed=seed, refinements=1).numpy()
    assert np.bincount(labels).tolist() == [10, 10, 3]
    assert len({(a, b) for a, b in zip(truth[kept], labels, strict=True)}) == 3


def test_refinements_do_not_lose_and_beat_a_random_split() -> None:
    points, _ = blobs(12, 16, spread=6.0)
    once, often = (balanced_clusters(points, 16, seed=1, refinements=r).numpy() for r in (1, 15))
    assert inertia(points, often) < inertia(points, once)
    assert inertia(points, once) < 0.8 * inertia(points, np.arange(len(points)) % 16)


def test_wide_rows_lose_nothing_by_their_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    columns = np.arange(1, 301) ** -0.5  # as in trained weights, some directions matter more than others
    points = (generator.standard_normal((512, 300)) * columns).astype(np.float32)
    reduced = [balanced_clusters(points, 16, seed=seed) for seed in range(4)]
    assert torch.equal(reduced[0], balanced_clusters(points, 16, seed=0))
    seen = clustering._principal_components(points - points.mean(0), 0)
    assert seen.shape == (512, 96)
    monkeypatch.setattr(clustering, "_COMPONENTS", 300)
    full = [balanced_clusters(points, 16, seed=seed) for seed in range(4)]
    assert not torch.equal(reduced[0], full[0])
    assert np.mean([inertia(points, x.numpy()) for x in reduced]) < 1.005 * np.mean(
        [inertia(points, x.numpy()) for x in full]
    )


def test_finds_more_blobs_than_components() -> None:
    generator = np.random.default_rng(0)
    truth = generator.permutation(np.repeat(np.arange(128), 4))
    points = generator.standard_normal((128, 200))[truth] + 0.05 * generator.standard_normal((512, 200))
    labels = balanced_clusters(points, 128, seed=0).tolist()
    assert len(set(zip(truth.tolist(), labels, strict=True))) == 128


def test_a_constant_offset_changes_nothing() -> None:
    points, _ = blobs(4, 8, spread=3.0)
    shifted = balanced_clusters(points.astype(np.float64) + 2.0**10, 4, seed=0)
    assert torch.equal(shifted, balanced_clusters(points, 4, seed=0))


@pytest.mark.parametrize("width", [8, 128])
@pytest.mark.parametrize("power", [-90, 90])
def test_the_size_of_all_values_changes_nothing(width: int, power: int) -> None:
    """Squares of large ones are infinite in float32."""
    points = torch.randn(128, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(balanced_clusters(points, 4, seed=0), balanced_clusters(points * 2.0**power, 4, seed=0))


def test_identical_rows_are_spread_over_all_clusters() -> None:
    assert torch.bincount(balanced_clusters(np.ones((12, 3)), 4, seed=0)).tolist() == [3] * 4


def test_one_cluster_and_one_row_each() -> None:
    points = torch.randn(6, 2)
    assert balanced_clusters(points, 1, seed=0).tolist() == [0] * 6
    assert sorted(balanced_clusters(points, 6, seed=0).tolist()) == list(range(6))


def test_accepts_half_precision_and_gradients() -> None:
    points, truth = blobs(3, 4, spread=0.1)
    tensor = torch.from_numpy(points).bfloat16().requires_grad_()
    assert len(set(zip(truth, balanced_clusters(tensor, 3, seed=0).tolist(), strict=True))) == 3


@pytest.mark.parametrize(
    ("features", "clusters", "message"),
    [
        (np.zeros((3072, 1)), 13, "nearest divisors of 3072: 12, 16"),
        (np.zeros((4, 1)), 0, "nearest divisors of 4: 1"),
        (np.zeros((4, 1)), 8, "nearest divisors of 4: 4"),
        (np.zeros((4, 1)), [3, 2], "must be positive and add up to 4"),
        (np.zeros((4, 1)), [4, 0], "must be positive and add up to 4"),
        (np.zeros(4), 2, "must be a matrix"),
        (np.full((4, 1), np.nan), 2, "NaN"),
    ],
)
def test_refuses(features: np.ndarray, clusters: int | list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        balanced_clusters(features, clusters, seed=0)


def test_nearest_divisors() -> None:
    assert nearest_divisors(3072, 13) == (12, 16)
    assert nearest_divisors(3072, 12) == (12,)
    assert nearest_divisors(7, 3) == (1, 7)
    assert nearest_divisors(7, 9) == (7,)
    assert nearest_divisors(7, 0) == (1,)
    with pytest.raises(UsageError, match="positive"):
        nearest_divisors(0, 1)


THREADS = """
import numpy as np
from threadpoolctl import threadpool_info
from surgeon.moe import clustering

fitted, seen = clustering._fitted_centroids, []

def look(*args):
    made = fitted(*args)
    seen.extend((pool["user_api"], pool["filepath"], pool["num_threads"]) for pool in threadpool_info())
    return made

clustering._fitted_centroids = look
clustering.balanced_clusters(np.random.default_rng(0).standard_normal((64, 4)), 8, seed=0)
print(any("sklearn" in path or "scikit_learn" in path for _, path, _ in seen), {count for *_, count in seen})
"""


def test_scikit_learn_loaded_by_the_first_call_has_one_thread_too() -> None:
    two = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False, env=two)
    assert (done.returncode, done.stdout) == (0, "True {1}\n"), done.stderr
