"""L-BFGS for many small problems at once: row by row, as ``torch.optim.LBFGS`` without a line search does one.

torch's own flattens all parameters into one vector, so that a batch of problems would share one history and one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

CURVATURE = 1e-10
"""A pair (s, y) whose product is not above this tells nothing of the curvature, and is not remembered (as in torch)."""


class BatchedLBFGS:
    """Gradients [B, N] in, steps [B, N] out, each row with its own memory (Nocedal, 1980).

    The first step is −lr g · min(1, 1/|g|₁), as torch has it. With a ``radius`` it is lr · radius long, which sets the scale of the
    steps until curvature is known, and no later step is longer. ``history`` pairs are remembered; one that a row rejects takes up
    its place there.
    """

    def __init__(self, lr: float, history: int, radius: float | None = None) -> None:
        self.lr, self.history, self.radius = lr, history, radius
        self.forget()

    def forget(self) -> None:
        """Begin anew, as for another objective."""
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._before: tuple[Tensor, Tensor] | None = None

    def step(self, gradient: Tensor) -> Tensor:
        """The step [B, N] to be added to the point at which ``gradient`` [B, N] was found."""
        if self._before is None:
            step = -self.lr * self._opening(gradient) * gradient
        else:
            self._remember(gradient)
            step = self._shortened(-self.lr * self._inverse_hessian(gradient))
        self._before = (gradient, step)
        return step

    def _opening(self, gradient: Tensor) -> Tensor:
        """The first step's scale [B, 1], and that of the inverse Hessian until a pair is known."""
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
        assert self._before is not None
        y, s = gradient - self._before[0], self._before[1]
        product = (y * s).sum(1, keepdim=True)
        fits = product > CURVATURE
        # A row's rejected pair gets ρ = 0, which takes it out of both loops below.
        rho = torch.where(fits, 1 / product, torch.zeros_like(product))
        self._pairs = [*self._pairs, (s, y, rho)][-self.history :]
        self._scale = torch.where(fits, product / (y * y).sum(1, keepdim=True), self._scale)

    def _inverse_hessian(self, gradient: Tensor) -> Tensor:
        """The inverse Hessian's estimate times the gradient: the two loops."""
        q, along = gradient, []
        for s, y, rho in reversed(self._pairs):
            along.append(rho * (s * q).sum(1, keepdim=True))
            q = q - along[-1] * y
        r = self._scale * q
        for (s, y, rho), a in zip(self._pairs, reversed(along), strict=True):
            r = r + (a - rho * (y * r).sum(1, keepdim=True)) * s
        return r
