"""Texts of protocols that stand for one text for each training seed: ``{training_seed}`` in them is the seed."""

from __future__ import annotations

TRAINING_SEED = "{training_seed}"


def require_seeds(text: str, training_seeds: int | None, what: str) -> None:
    """Refuse a text without its number of seeds, and a number of seeds that the text does not take.

    Args:
        text: The text.
        training_seeds: The number of seeds; None for a text that is complete.
        what: What messages call the text.

    Raises:
        ValueError: one of the two is missing.
    """
    if training_seeds is None and TRAINING_SEED in text:
        raise ValueError(f"{what} holds {TRAINING_SEED}, and nothing says how many seeds there are: say training_seeds")
    if training_seeds is not None and TRAINING_SEED not in text:
        raise ValueError(
            f"{what} has {training_seeds} training_seeds and no place for them: write {TRAINING_SEED} where the seed "
            "stands, or leave training_seeds out"
        )


def for_each_seed(text: str, training_seeds: int | None) -> list[str]:
    """Return the text for each of the seeds 0, 1 and so on; a text that is complete alone."""
    return [text.replace(TRAINING_SEED, str(seed)) for seed in range(training_seeds or 1)]
