"""Exchange single words of a prompt while its loss falls.

A gradient moves all words of a prompt at once, and it is blind to what a word far away would do. This search looks at
one place of the prompt at a time and computes the loss itself, as in coordinate descent. For a large vocabulary the
gradient ranks the words that are tried, as in HotFlip (Ebrahimi et al., 1712.06751) and GCG (Zou et al., 2307.15043).
All prompts of an image are compared on the same timesteps and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ddil_core.support.protocol import Strict

GRADIENT_COST = 3
"""Evaluations that a loss with its gradient counts for: one forwards, and about two backwards."""


class ExchangeSettings(Strict):
    """Settings of the exchange of words.

    Attributes:
        candidates: The number of words that are tried at a place: those that the gradient ranks first. None tries all
            words, which suits a small vocabulary.
        draws: The number of (timestep, noise) pairs on which an exchange must lower the loss.
        finalists: All candidates are first compared on one pair. So many of the best are then compared on all pairs.
        sweeps: The largest number of sweeps over all places. The search ends after a sweep in which no exchange helps.
        evaluations: The largest number of network evaluations for an image. No exchange begins that would pass it.
    """

    candidates: int | None = Field(default=32, ge=1)
    draws: int = Field(default=4, ge=1)
    finalists: int = Field(default=2, ge=1)
    sweeps: int = Field(default=2, ge=1)
    evaluations: int = Field(default=2000, ge=1)


@dataclass(frozen=True)
class Objective:
    """What an exchange lowers.

    Attributes:
        loss: ``loss(index, draws)`` returns the losses [B] of words int64 [B, K] on the first of ``draws`` pairs.
        gradient: ``gradient(index)`` returns the gradient [B, K, D] of the loss on all pairs, by the words' vectors.
        table: The vectors of the V words, [V, D].
    """

    loss: Callable[[Tensor, int], Tensor]
    gradient: Callable[[Tensor], Tensor]
    table: Tensor


def exchange_words(
    objective: Objective, index: Tensor, settings: ExchangeSettings, advance: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Exchange words of prompts one at a time, each only where this lowers its prompt's loss on all pairs.

    The rows are independent, and all look at the same place at the same time.

    Args:
        objective: The loss.
        index: The words int64 [B, K] of B prompts.
        settings: What is tried.
        advance: Called after each place, ``sweeps`` times K in all.

    Returns:
        The words int64 [B, K], and their losses [B].
    """
    size, places = len(objective.table), index.shape[1]
    few = size if settings.candidates is None else min(settings.candidates, size)
    finalists = min(settings.finalists, few)
    cost = few + finalists * settings.draws + (GRADIENT_COST * settings.draws if few < size else 0)
    losses, spent, without_gain = objective.loss(index, settings.draws), settings.draws, 0
    for step in range(settings.sweeps * places):
        if without_gain < places and spent + cost <= settings.evaluations:
            place = step % places
            words = _candidates(objective, index, place, few)
            best = _screened(objective, index, place, words, finalists)
            kept = losses
            for column in range(finalists):
                trial = _with_word(index, place, best[:, column])
                found = objective.loss(trial, settings.draws)
                better = found < losses
                index = torch.where(better[:, None], trial, index)
                losses = torch.where(better, found, losses)
            spent += cost
            without_gain = 0 if bool((losses < kept).any()) else without_gain + 1
        advance()
    return index, losses


def _candidates(objective: Objective, index: Tensor, place: int, few: int) -> Tensor:
    """Return the words [B, few] to try at a place: all, or those of the lowest loss by the gradient."""
    table = objective.table
    if few == len(table):
        return torch.arange(few, device=index.device).expand(len(index), -1)
    return (objective.gradient(index)[:, place] @ table.T).topk(few, dim=1, largest=False).indices


def _screened(objective: Objective, index: Tensor, place: int, words: Tensor, finalists: int) -> Tensor:
    """Return the words [B, finalists] of the lowest losses on one pair. One word at a time keeps memory constant."""
    losses = [objective.loss(_with_word(index, place, word), 1) for word in words.unbind(1)]
    best = torch.stack(losses, dim=1).topk(finalists, dim=1, largest=False).indices
    return words.gather(1, best)


def _with_word(index: Tensor, place: int, word: Tensor) -> Tensor:
    """Return words [B, K] with the words [B] at a place."""
    return torch.cat([index[:, :place], word[:, None], index[:, place + 1 :]], dim=1)
