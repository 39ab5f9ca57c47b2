"""Fit what a linear layer reads to the inputs that are left, with a low rank beside them, in closed form.

A layer W d is to be brought near by A s + M d. Here d [d_in] is what inputs are away from their centres, s is d with
zeros for what is skipped, A is any matrix, and M has a small rank. For a given M the best A s is (W - M) times the best
linear guess of d from s. What it misses is (W - M) e, e being what cannot be guessed. So the best M has the outputs
U Uᵀ W, with the principal components U of W e (reduced-rank regression): they are computed for every token, and so the
covariance of e is all that is needed of the data.

R-Sparse (arXiv 2504.19449) keeps A = W for inputs that are read, and gives the others the truncated SVD of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fitted:
    """A s + low_out low_in d + offset. read: A [d_out, d_in]. low_in [r, d_in], low_out [d_out, r]. offset [d_out].

    All have the dtype of the weight they were fitted for. Without a low rank r is 0.
    """

    read: Tensor
    low_in: Tensor
    low_out: Tensor
    offset: Tensor

    def __call__(self, s: Tensor, d: Tensor) -> Tensor:
        """What the layer gives for deviations d [N, d_in], of which s [N, d_in] is left: [N, d_out]."""
        return s @ self.read.t() + d @ self.low_in.t() @ self.low_out.t() + self.offset


def fit(weight: Tensor, d: Tensor, s: Tensor, rank: int, ridge: float) -> Fitted:
    """Return what comes nearest to the layer on the data.

    Args:
        weight: W [d_out, d_in]. d: deviations [N, d_in]. s: what is left of them, [N, d_in]. All float32 or float64.
        rank: of M, from 0 to the smaller of d_in and d_out.
        ridge: how strongly A is drawn to W - M, relative to the mean square of s.
    """
    wide, mean_d, mean_s = weight.double(), d.mean(0).double(), s.mean(0).double()
    gram, cross = _covariance(s, s), _covariance(d, s)
    kept = gram.clone()
    gram.diagonal().add_(ridge * float(s.double().square().mean()) + 1e-30)
    # The ridge draws to the identity: what is kept is guessed to be itself.
    guess = torch.linalg.solve(gram, (cross - kept).t()).t()
    guess.diagonal().add_(1.0)
    low_in, low_out = wide.new_zeros(0, wide.shape[1]), wide.new_zeros(len(wide), 0)
    missing = wide
    if rank:
        both = guess @ cross.t()
        unknown = _covariance(d, d) - both - both.t() + guess @ kept @ guess.t()
        low_out = _principal(wide, unknown, rank)
        low_in = low_out.t() @ wide
        missing = wide - low_out @ low_in
    read = missing @ guess
    offset = missing @ mean_d - read @ mean_s
    return Fitted(*(part.to(weight.dtype).contiguous() for part in (read, low_in, low_out, offset)))


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """The covariance [d, d] of a and b [N, d], float64. Means are taken away first, so float32 is enough for sums."""
    return ((a - a.mean(0)).t() @ (b - b.mean(0))).double() / len(a)


def _principal(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The principal components [d_out, rank] of weight · e for e with this covariance [d_in, d_in]."""
    d_out, d_in = weight.shape
    if d_out <= d_in:
        components: Tensor = torch.linalg.eigh(weight @ covariance @ weight.t()).eigenvectors
        return components[:, -rank:]
    # The outputs lie in d_in dimensions.
    basis, inner = torch.linalg.qr(weight)
    components = torch.linalg.eigh(inner @ covariance @ inner.t()).eigenvectors
    return basis @ components[:, -rank:]  # type: ignore[no-any-return]
