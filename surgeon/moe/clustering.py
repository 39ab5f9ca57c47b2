"""Clustering into clusters of equal size, used to split the neurons of an FFN into experts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from surgeon.errors import UsageError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

_KMEANS_ITERATIONS = 20


def balanced_clusters(
    features: NDArray[np.floating] | Tensor, clusters: int, *, seed: int, refinements: int = 15
) -> Tensor:
    """Group the rows of `features` into clusters of exactly n / clusters rows each, close together in L2 distance.

    K-means gives the first centroids. Then rows are assigned to centroids with room for n / clusters rows each,
    greedily, those first that would lose most by not getting their nearest centroid (their regret); the centroids move
    to the means, and so on. The best of these assignments is returned. This is the balanced k-means split of
    MoEfication (arXiv 2110.01786, expert construction), which D2DMoE (arXiv 2310.04361, expert clustering) uses too;
    they solve the assignment exactly, at a much higher cost.

    Args:
        features: [n, d], finite, any floating dtype; rows are compared as they are, so scale or normalise them before.
        clusters: how many, a divisor of n.
        seed: same seed, features and library versions: same labels.
        refinements: how often to reassign; it ends earlier when nothing changes.

    Returns:
        Labels in [0, clusters), int64 [n], on the CPU.

    Raises:
        UsageError: `features` is not a finite matrix, `clusters` does not divide n, or `refinements` is not positive.
    """
    points = _as_points(features)
    n = len(points)
    if clusters < 1 or n % clusters:
        raise UsageError(
            f"{n} rows cannot be split into {clusters} clusters of equal size; "
            f"the nearest numbers that divide {n}: {', '.join(map(str, nearest_divisors(n, clusters)))}"
        )
    if refinements < 1:
        raise UsageError(f"refinements must be at least 1, got {refinements}")
    if clusters == 1:
        return torch.zeros(n, dtype=torch.int64)
    if clusters == n:
        return torch.arange(n)

    # Before threads are limited: that holds for the libraries that are loaded by then.
    from sklearn.cluster import KMeans

    best_score, best_labels = -np.inf, np.empty(0, dtype=np.int64)
    # One thread: with more, the order of summation and with it the labels would depend on timing.
    with threadpool_limits(limits=1):
        kmeans = KMeans(clusters, n_init=1, max_iter=_KMEANS_ITERATIONS, random_state=seed)
        centroids = _fitted_centroids(kmeans, points)
        previous = None
        for _ in range(refinements):
            distances = np.square(centroids).sum(1) - 2 * points @ centroids.T  # up to a constant for each row
            labels = _assign(distances, n // clusters)
            if previous is not None and np.array_equal(labels, previous):
                break
            previous = labels
            # All clusters have the same size, so sorting by label lays them out as blocks.
            centroids = points[np.argsort(labels, kind="stable")].reshape(clusters, n // clusters, -1).mean(1)
            # For clusters of equal size the inertia is a constant minus a multiple of this.
            score = float(np.square(centroids, dtype=np.float64).sum())
            if score > best_score:
                best_score, best_labels = score, labels
    return torch.from_numpy(best_labels)


def nearest_divisors(n: int, k: int) -> tuple[int, ...]:
    """Return the divisors of `n` nearest to `k`: the largest below and the smallest above it, or `k` if it is one.

    `nearest_divisors(3072, 13)` is `(12, 16)`. There is only one for `k` outside [1, n].
    """
    if n < 1:
        raise UsageError(f"only positive numbers have divisors here, got {n}")
    divisors = [divisor for divisor in range(1, n + 1) if n % divisor == 0]
    if k in divisors:
        return (k,)
    below = [divisor for divisor in divisors if divisor < k]
    above = [divisor for divisor in divisors if divisor > k]
    return (*below[-1:], *above[:1])


def _as_points(features: NDArray[np.floating] | Tensor) -> NDArray[np.float32]:
    """`features` in fp32, moved to mean zero, which changes no distance and loses fewer digits."""
    array = features.detach().float().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"features must be a matrix [n, d], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise UsageError("features contain NaN or infinity")
    centred: NDArray[np.float32] = (array - array.mean(0, dtype=np.float64)).astype(np.float32)
    return centred


def _fitted_centroids(kmeans: KMeans, points: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct rows than clusters is fine here: the assignment fills every cluster.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Two OpenMP runtimes in one process: not ours to solve, and harmless with one thread.
        warnings.filterwarnings("ignore", message=".*OpenMP.*", category=RuntimeWarning)
        centroids: NDArray[np.float32] = kmeans.fit(points).cluster_centers_
    return centroids


def _assign(distances: NDArray[np.float32], capacity: int) -> NDArray[np.int64]:
    """Assign each row to a column, at most `capacity` rows per column, in order of regret, each to the best left."""
    preferences = np.argsort(distances, axis=1, kind="stable")
    nearest_two = np.take_along_axis(distances, preferences[:, :2], axis=1)
    regret = nearest_two[:, 1] - nearest_two[:, 0]
    room = [capacity] * distances.shape[1]
    labels = np.empty(len(distances), dtype=np.int64)
    for row in np.argsort(-regret, kind="stable").tolist():
        for column in preferences[row]:
            if room[column]:
                room[column] -= 1
                labels[row] = column
                break
    return labels
