"""Nuclear norms of centred rows without each group of a jackknife, from one singular value decomposition.

G = C Cᵀ of the centred rows C [n, k] has the eigenvalues σ², and the nuclear norm is tr √G = Σ σ. To leave a group of r
rows out and to centre the others projects onto the complement of an r-dimensional space, with an orthonormal basis E
that is orthogonal to the constant vector. With √λ = 1/2π ∫ t^(−1/2) log(1 + λ/t) dt and Jacobi's identity for the
determinant of a block of the inverse,

    tr √G_kept − tr √G = 1/2π ∫₀^∞ t^(−1/2) log det(Eᵀ t (G + t)⁻¹ E) dt,

a determinant of order r for each node t. The trapezoidal rule in log t converges exponentially, to about 1e-13 of the
norm here.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
STEP = 0.34
"""The step in log √t: the error falls as exp(−π² / step), here 2e-13 of the change."""
LOW, HIGH = 36.0, 5.0
"""The nodes √t lie between e^(−LOW) of the norm and e^HIGH of the largest σ. The rest is below 1e-13 r of the norm."""


def nuclear_norm(matrix: Array) -> float:
    """Return the sum of the singular values."""
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def nuclear_norms_without(rows: Array, labels: Array) -> tuple[float, Array]:
    """Return the nuclear norm of rows [n, k] less their mean, and that of the rows without each group, [groups].

    ``labels`` [n] are 0 … groups − 1. At least two rows remain without a group, and each mean is that of the rows that
    remain.
    """
    n, groups = len(rows), int(labels.max()) + 1
    vectors, singular = _decompose(rows - rows.mean(axis=0))
    if singular[0] == 0:
        return 0.0, np.zeros(groups)
    norm, scale = float(singular.sum()), float(singular[0])
    norms = np.empty(groups)
    for group in range(groups):
        removed = vectors[labels == group]
        size = len(removed)
        # e_i − 1/n for the rows i of the group, made orthonormal.
        basis = removed + (1 / np.sqrt(1 - size / n) - 1) / size * removed.sum(axis=0)
        norms[group] = norm + scale * _change(basis, singular / scale)
    return norm, norms


def _decompose(centred: Array) -> tuple[Array, Array]:
    """Return the left singular vectors [n, n − 1] that are orthogonal to the constant vector, and σ [n − 1]."""
    n = len(centred)
    # A reflection takes the constant vector to the first axis, where the centred rows have nothing.
    normal = np.full(n, 1 / np.sqrt(n))
    normal[0] -= 1.0
    normal *= np.sqrt(2 / (normal @ normal))
    reflected = centred - np.outer(normal, normal @ centred)
    left, found, _ = np.linalg.svd(reflected[1:])
    singular = np.zeros(n - 1)
    singular[: len(found)] = found
    return np.concatenate([np.zeros((1, n - 1)), left]) - np.outer(normal, normal[1:] @ left), singular


def _change(basis: Array, singular: Array) -> float:
    """Return tr √G_kept − tr √G for E in coordinates of singular vectors, [r, n − 1], and σ ≤ 1, [n − 1]."""
    squares = np.square(singular)
    first = (basis * squares) @ basis.T
    lost = float(np.trace(first))
    if lost == 0:
        return 0.0
    # For large t the integrand is −lost/t + lost · pole/t² − …, as is −lost/(t + pole), whose integral is known.
    pole = float(np.square(basis * squares).sum() - 0.5 * np.square(first).sum()) / lost
    total = 0.0
    for root in np.exp(np.arange(np.log(singular.sum()) - LOW, HIGH, STEP)):
        t = root * root
        log_root = np.log(_factor_diagonal(basis * np.sqrt(t / (squares + t)))).sum()
        total += root * (2 * float(log_root) + lost / (t + pole))
    return STEP * total / np.pi - lost / (2 * np.sqrt(pole))


def _factor_diagonal(matrix: Array) -> Array:
    """Return the diagonal, positive, of a triangular L with L Lᵀ = A Aᵀ for a matrix A [r, k] of full rank."""
    try:
        diagonal = np.diagonal(np.linalg.cholesky(matrix @ matrix.T))
    except np.linalg.LinAlgError:  # not positive definite within rounding
        diagonal = np.zeros(1)
    if diagonal.min() <= 1e-4 * diagonal.max():
        # A Aᵀ loses half of the digits. The orthogonal factorisation keeps them, in eight times the time.
        triangle = np.linalg.qr(matrix.T, mode="reduced")[1]
        diagonal = np.maximum(np.abs(np.diagonal(triangle)), np.finfo(np.float64).tiny)
    return diagonal
