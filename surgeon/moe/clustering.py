"""Clustering into clusters of given sizes, used to split the neurons of an FFN into experts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
# Wider rows are compared by this many principal components. On the weights and activations of trained models that
# finds slightly better clusters than all columns do, and for wide layers it takes a seventh of the time.
_COMPONENTS = 96


def balanced_clusters(
    features: NDArray[np.floating] | Tensor, clusters: int | Sequence[int], *, seed: int, refinements: int = 15
) -> Tensor:
    """Group the rows of `features` into clusters of given sizes, close together in L2 distance.

    K-means gives the first centroids. Then the rows are assigned greedily to centroids, each of which takes as many
    rows as its cluster has. Rows go first that would lose most without their nearest centroid (their regret). The
    centroids move to the means, and the assignment is repeated. The best assignment is returned. Rows of more than 96
    columns are compared by their first 96 principal components.

    This is the balanced k-means split of MoEfication (arXiv 2110.01786, expert construction), which D2DMoE (arXiv
    2310.04361, expert clustering) uses too. They solve the assignment exactly, at a much higher cost.

    Args:
        features: [n, d], finite, any floating dtype. Rows are compared without scaling, so normalise them before.
        clusters: the number of clusters of equal size, a divisor of n. Or the size of each cluster.
        seed: the same seed, features and library versions give the same labels.
        refinements: the most assignments to make. It stops earlier when nothing changes.

    Returns:
        The number of each row's cluster, int64 [n], on the CPU.

    Raises:
        UsageError: `features` is not a finite matrix, `clusters` does not divide n, the sizes are not positive or do
            not add up to n, or `refinements` is not positive.
    """
    points = _as_points(features)
    n = len(points)
    if isinstance(clusters, int):
        if clusters < 1 or n % clusters:
            raise UsageError(
                f"{n} rows cannot be split into {clusters} clusters of equal size. "
                f"The nearest divisors of {n}: {', '.join(map(str, nearest_divisors(n, clusters)))}."
            )
        sizes = np.full(clusters, n // clusters)
    else:
        sizes = np.array(clusters, dtype=np.int64)
        if sizes.size == 0 or sizes.min() < 1 or sizes.sum() != n:
            raise UsageError(f"The sizes of the clusters must be positive and add up to {n}, the number of rows.")
    if refinements < 1:
        raise UsageError(f"refinements is {refinements}, but must be at least 1.")
    if len(sizes) == 1:
        return torch.zeros(n, dtype=torch.int64)
    if len(sizes) == n:
        return torch.arange(n)

    # Import before threads are limited: the limit only affects libraries that are already loaded.
    from sklearn.cluster import KMeans

    best_score, best_labels = -np.inf, np.empty(0, dtype=np.int64)
    # Use one thread. With more, the order of summation, and so the labels, would depend on timing.
    with threadpool_limits(limits=1):
        points = _principal_components(points, seed)
        kmeans = KMeans(len(sizes), n_init=1, max_iter=_KMEANS_ITERATIONS, random_state=seed)
        centroids = _fitted_centroids(kmeans, points, sizes)
        previous = None
        for _ in range(refinements):
            distances = np.square(centroids).sum(1) - 2 * points @ centroids.T  # up to a constant for each row
            labels = _assign(distances, sizes)
            if previous is not None and np.array_equal(labels, previous):
                break
            previous = labels
            # Sorting by label lays the clusters out as blocks.
            blocks = np.split(points[np.argsort(labels, kind="stable")], sizes.cumsum()[:-1])
            centroids = np.stack([block.mean(0) for block in blocks])
            # The inertia is a constant minus this.
            score = float((np.square(centroids, dtype=np.float64).sum(1) * sizes).sum())
            if score > best_score:
                best_score, best_labels = score, labels
    return torch.from_numpy(best_labels)


def clusters_around(points: Tensor, centroids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Assign rows to given centroids once, each of which takes as many rows as its cluster has.

    Rows go first that would lose most without their nearest centroid, as in `balanced_clusters`.

    Args:
        points, centroids: [n, d] and [clusters, d], without scaling.
        sizes: the size of each cluster. They add up to n.

    Returns:
        The number of each row's cluster, int64 [n], on the CPU.
    """
    if len(sizes) == 1:
        return torch.zeros(len(points), dtype=torch.int64)
    distances = centroids.square().sum(1) - 2 * points @ centroids.t()  # up to a constant for each row
    return torch.from_numpy(_assign(distances.cpu().numpy(), np.array(sizes)))


def nearest_divisors(n: int, k: int) -> tuple[int, ...]:
    """Return the divisors of `n` nearest to `k`: the largest below and the smallest above, or `k` if it divides `n`.

    `nearest_divisors(3072, 13)` is `(12, 16)`. There is only one if `k` is outside [1, n].
    """
    if n < 1:
        raise UsageError(f"n is {n}, but must be positive to have divisors.")
    divisors = [divisor for divisor in range(1, n + 1) if n % divisor == 0]
    if k in divisors:
        return (k,)
    below = [divisor for divisor in divisors if divisor < k]
    above = [divisor for divisor in divisors if divisor > k]
    return (*below[-1:], *above[:1])


def _as_points(features: NDArray[np.floating] | Tensor) -> NDArray[np.float32]:
    """Convert `features` to float32 with mean zero and sizes up to 1. This keeps which rows are near to which."""
    array = features.detach().float().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"features has shape {array.shape}, but must be a matrix [n, d].")
    if not np.isfinite(array).all():
        raise UsageError("features contains NaN or infinity. All values must be finite.")
    centred = np.empty(array.shape, dtype=np.float32)
    # In float64, a part at a time: a copy of all in float64 would be twice as large as the weights themselves.
    np.subtract(array, array.mean(0, dtype=np.float64), out=centred, casting="unsafe")
    # Squares of large values would be infinite. A power of two changes no digit.
    _, exponent = np.frexp(max(centred.max(), -centred.min()))
    np.ldexp(centred, -exponent, out=centred)
    return centred


def _principal_components(points: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Return the first principal components of centred rows, or the rows if they have no more columns than that."""
    if min(points.shape) <= _COMPONENTS:
        return points
    from sklearn.utils.extmath import randomized_svd

    left, sizes, _ = randomized_svd(points, _COMPONENTS, n_iter=2, random_state=seed)
    return np.ascontiguousarray(left * sizes, dtype=np.float32)


def _fitted_centroids(kmeans: KMeans, points: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the centroids of k-means. If clusters differ in size, larger ones get the centroids of more rows."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # There may be fewer distinct rows than clusters: the assignment fills every cluster anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Two OpenMP runtimes in one process are harmless with one thread.
        warnings.filterwarnings("ignore", message=".*OpenMP.*", category=RuntimeWarning)
        centroids: NDArray[np.float32] = kmeans.fit(points).cluster_centers_
    if sizes.min() == sizes.max():
        return centroids
    rows = np.bincount(kmeans.labels_, minlength=len(sizes))
    ordered = np.empty_like(centroids)
    ordered[np.argsort(-sizes, kind="stable")] = centroids[np.argsort(-rows, kind="stable")]
    return ordered


def _assign(distances: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Assign each row, in order of regret, to its best column that has fewer rows than its size."""
    nearest_two = np.partition(distances, 1, axis=1)[:, :2]
    regret = nearest_two[:, 1] - nearest_two[:, 0]
    room = sizes.tolist()
    full = np.zeros(len(sizes), dtype=distances.dtype)  # infinite for the columns that take no more rows
    labels = np.empty(len(distances), dtype=np.int64)
    for row in np.argsort(-regret, kind="stable").tolist():
        column = int((distances[row] + full).argmin())
        labels[row] = column
        room[column] -= 1
        if not room[column]:
            full[column] = np.inf
    return labels
