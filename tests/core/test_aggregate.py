"""The aggregated dataset: a queue in which each state is used as often as was set, and then makes room."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch

from ddil_core.aggregate import AggregatedDataset
from ddil_core.errors import WrongCommand
from tests.core.closed_form import normal

SHAPE = (2, 3, 3)


def filled(uses: int = 1, states: int = 6, capacity: int = 16, seed: int = 0) -> tuple[AggregatedDataset, list[int]]:
    dataset = AggregatedDataset(capacity, uses, SHAPE)
    z = normal(states, *SHAPE, seed=seed)
    places = dataset.add(z, 1, torch.arange(states), -z)
    dataset.enqueue(places, torch.Generator().manual_seed(seed))
    return dataset, places


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_every_state_is_used_exactly_as_often_as_set(uses: int) -> None:
    dataset, places = filled(uses)
    assert dataset.pending == 6 * uses
    passes = []
    for _ in range(uses):
        drawn = dataset.take(6)
        passes.append(drawn.tolist())
        assert sorted(passes[-1]) == sorted(places)  # all of them once before any of them again
        dataset.release(drawn)
        assert dataset.used == 6
    assert dataset.pending == 0
    assert len(dataset) == 0
    assert uses == 1 or passes[0] != passes[1]


def test_older_states_come_first() -> None:
    dataset, first = filled()
    second = dataset.add(normal(3, *SHAPE), 2, torch.arange(3), normal(3, *SHAPE))
    dataset.enqueue(second, torch.Generator())
    assert set(dataset.take(6).tolist()) == set(first)
    assert set(dataset.take(3).tolist()) == set(second)


def test_a_state_that_is_drawn_twice_into_one_batch_counts_once() -> None:
    dataset, places = filled(uses=2, states=1)
    drawn = dataset.take(2)
    assert drawn.tolist() == places * 2
    assert (dataset.collected, dataset.used) == (1, 1)
    dataset.release(drawn)
    assert len(dataset) == 0
    assert Counter(dataset.free).most_common(1)[0][1] == 1


def test_states_keep_what_was_stored_with_them() -> None:
    dataset = AggregatedDataset(8, 1, SHAPE)
    z, target = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    first = dataset.add(z, 3, torch.tensor([7, 5]), target)
    second = dataset.add(z + 1, 0, torch.tensor([1, 2]), target + 2)
    assert torch.equal(dataset.z[first], z)
    assert torch.equal(dataset.z[second], z + 1)
    assert torch.equal(dataset.target[first], target)
    assert torch.equal(dataset.target[second], target + 2)
    assert dataset.transition[[*first, *second]].tolist() == [3, 3, 0, 0]
    assert dataset.row[[*first, *second]].tolist() == [7, 5, 1, 2]


def test_released_places_are_reused() -> None:
    dataset = AggregatedDataset(4, 1, SHAPE)
    places = dataset.add(normal(4, *SHAPE), 0, torch.arange(4), normal(4, *SHAPE))
    dataset.enqueue(places, torch.Generator())
    drawn = dataset.take(2)
    assert len(dataset) == 4  # drawn, but its target may still be asked for
    dataset.release(drawn)
    assert len(dataset) == 2
    again = dataset.add(normal(2, *SHAPE, seed=9), 2, torch.tensor([8, 9]), normal(2, *SHAPE, seed=8))
    assert set(again) == set(drawn.tolist())
    assert torch.equal(dataset.z[again], normal(2, *SHAPE, seed=9))
    assert torch.equal(dataset.target[again], normal(2, *SHAPE, seed=8))


def test_its_size_is_bounded() -> None:
    dataset, _ = filled(capacity=8)
    with pytest.raises(WrongCommand) as error:
        dataset.add(normal(3, *SHAPE), 0, torch.arange(3), normal(3, *SHAPE))
    assert str(error.value) == (
        "the aggregated dataset holds at most 8 states and 6 are still to be used; "
        "raise ddil.capacity or lower ddil.collect_every"
    )
    assert len(dataset) == 6
    assert dataset.collected == 6


def test_a_state_is_used_at_least_once() -> None:
    with pytest.raises(WrongCommand, match=r"at least once, not 0 times$"):
        AggregatedDataset(8, 0, SHAPE)


def test_saved_midway_it_goes_on_the_same() -> None:
    dataset, _ = filled(uses=2)
    dataset.release(dataset.take(4))
    file = io.BytesIO()
    kept = dataset.state_dict()
    torch.save(kept, file)
    file.seek(0)
    other = AggregatedDataset(16, 2, SHAPE)
    other.load_state_dict(torch.load(file, weights_only=True))
    for held in (dataset, other):
        new = held.add(normal(3, *SHAPE, seed=5), 2, torch.arange(3), normal(3, *SHAPE, seed=6))
        held.enqueue(new, torch.Generator().manual_seed(1))
    assert len(kept["free"]) == 10  # what was saved does not change with the dataset
    while dataset.pending:
        a, b = dataset.take(1), other.take(1)
        for name in ("z", "target", "transition", "row", "remaining"):
            assert torch.equal(getattr(dataset, name)[a], getattr(other, name)[b])
        dataset.release(a)
        other.release(b)
    assert (dataset.collected, dataset.used, len(dataset)) == (other.collected, other.used, len(other)) == (9, 9, 0)
