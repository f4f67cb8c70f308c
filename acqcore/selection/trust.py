"""How well a row's label agrees with the labels of similar rows, by leave-one-out ridge regression."""

from __future__ import annotations

import torch

from acqcore import checks
from acqcore.defaults import standard_defaults

#: Candidate ridge strengths, relative to the mean squared singular value of the scaled vectors.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@standard_defaults()
@torch.no_grad()
def label_trust(
    vectors: torch.Tensor,  # [n, d]
    labels: torch.Tensor,  # [n] int64
) -> torch.Tensor:
    """Margin of each row's label over the best other label, as predicted from the other n - 1 rows.

    A ridge regression of one-hot labels on the vectors predicts row i from all rows but i. One factorization gives all
    n predictions, ``y_i - (y_i - f_i) / (1 - H_ii)`` with hat matrix ``H``. A positive margin means the other rows
    agree with the label. Random labels, texts of no class and classes that the vectors do not separate score negative
    or near 0. The ridge is the one in ``RIDGES`` with the smallest squared leave-one-out error.

    Args:
        vectors: ``[n, d]`` floating point, such as the student's hidden states of the prompts. Columns are centred and
            scaled to unit variance.
        labels: ``[n]`` int64, arbitrary numbers; equal numbers form a class.

    Returns:
        ``[n]`` float32 on the device of the vectors; all 0 if there is only one class.

    Raises:
        TypeError: vectors are not floating point, labels are not a tensor. ValueError: a wrong shape, a vector that is
            not finite, labels of the wrong length or dtype.

    Sources: Allen 1974 (PRESS, the leave-one-out identity); Northcutt, Jiang & Chuang 2021 (confident learning:
    out-of-sample predictions as a test of labels).
    """
    checks.vectors("vectors", vectors)
    checks.labels(labels, len(vectors))
    x = vectors.double()
    mean = x.mean(dim=0)
    x = x - mean
    spread = x.square().mean(dim=0).sqrt()
    x = x / spread.where(spread > 1e-12 * mean.abs(), torch.inf)  # 0 for a column that is constant up to rounding
    classes, index = labels.to(vectors.device).unique(return_inverse=True)
    if len(classes) < 2:
        return torch.zeros(len(vectors), device=vectors.device)
    y = torch.nn.functional.one_hot(index, len(classes)).double()
    left, singular, _ = torch.linalg.svd(x, full_matrices=False)
    eigen = singular.square()
    inner = left.mT @ (y - y.mean(dim=0))
    best: torch.Tensor | None = None
    least = float("inf")
    for ridge in RIDGES:
        shrunk = eigen / (eigen + ridge * eigen.mean()).clamp_min(torch.finfo(eigen.dtype).tiny)  # 0 without variance
        fitted = y.mean(dim=0) + left @ (shrunk[:, None] * inner)
        hat = 1 / len(y) + left.square() @ shrunk  # the mean is fitted too
        without = y - (y - fitted) / (1 - hat).clamp_min(1e-9)[:, None]
        error = float((without - y).square().sum())
        if error < least:
            best, least = without, error
    assert best is not None
    own = best.gather(1, index[:, None])[:, 0]
    other = best.scatter(1, index[:, None], -torch.inf).amax(dim=1)
    return (own - other).float()
