"""L-BFGS for many small problems at once. Each row equals ``torch.optim.LBFGS`` without a line search.

torch's own class flattens all parameters into one vector, so that a batch of problems would share one history and one
step size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CURVATURE = 1e-10
"""Smallest product sᵀy of a pair (s, y) that enters the history. torch uses the same bound."""


class BatchedLBFGS:
    """Turn gradients [B, N] into steps [B, N]. Each row has its own history (Nocedal, 1980).

    Without a ``radius`` the first step is −lr · g · min(1, 1/|g|₁), as in torch. With a ``radius`` the first step has
    the length lr · radius, and no later step is longer.

    Args:
        lr: The learning rate.
        history: The number of pairs (s, y) in memory. A pair that a row rejects still counts.
        radius: The longest step, before ``lr``; None for no limit.
    """

    def __init__(self, lr: float, history: int, radius: float | None = None) -> None:
        self.lr, self.history, self.radius = lr, history, radius
        self.reset()

    def reset(self) -> None:
        """Clear the history, for a new objective."""
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._previous: tuple[Tensor, Tensor] | None = None

    def step(self, gradient: Tensor) -> Tensor:
        """Return the step [B, N] to add to the point where ``gradient`` [B, N] was computed."""
        if self._previous is None:
            step = -self.lr * self._first_scale(gradient) * gradient
        else:
            self._remember(gradient)
            step = self._shortened(-self.lr * self._inverse_hessian(gradient))
        self._previous = (gradient, step)
        return step

    def _first_scale(self, gradient: Tensor) -> Tensor:
        """Return the scale of the first step, [B, 1]. Set the scale of the inverse Hessian until a pair is known."""
        if self.radius is None:
            self._scale = gradient.new_ones(len(gradient), 1)
            return (1 / gradient.abs().sum(1, keepdim=True)).clamp(max=1.0)
        length = gradient.norm(dim=1, keepdim=True)
        self._scale = torch.where(length > 0, self.radius / length, torch.zeros_like(length))
        return self._scale

    def _shortened(self, step: Tensor) -> Tensor:
        if self.radius is None:
            return step
        return step * (self.lr * self.radius / step.norm(dim=1, keepdim=True)).clamp(max=1.0)

    def _remember(self, gradient: Tensor) -> None:
        assert self._previous is not None
        y, s = gradient - self._previous[0], self._previous[1]
        product = (y * s).sum(1, keepdim=True)
        fits = product > CURVATURE
        # ρ = 0 removes a row's rejected pair from both loops of _inverse_hessian.
        rho = torch.where(fits, 1 / product, torch.zeros_like(product))
        self._pairs = [*self._pairs, (s, y, rho)][-self.history :]
        self._scale = torch.where(fits, product / (y * y).sum(1, keepdim=True), self._scale)

    def _inverse_hessian(self, gradient: Tensor) -> Tensor:
        """Return the estimated inverse Hessian times the gradient, by the two-loop recursion."""
        q, coefficients = gradient, []
        for s, y, rho in reversed(self._pairs):
            coefficients.append(rho * (s * q).sum(1, keepdim=True))
            q = q - coefficients[-1] * y
        r = self._scale * q
        for (s, y, rho), a in zip(self._pairs, reversed(coefficients), strict=True):
            r = r + (a - rho * (y * r).sum(1, keepdim=True)) * s
        return r
