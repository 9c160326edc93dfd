"""The aggregated dataset: each state is used a set number of times and then makes room."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from ddil_core.distillation.aggregate import AggregatedDataset, States
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import normal

SHAPE = (2, 3, 3)


def filled(uses: int = 1, states: int = 6, capacity: int = 16, seed: int = 0) -> AggregatedDataset:
    """A dataset with a different row for each state."""
    dataset = AggregatedDataset(capacity, uses, SHAPE)
    store(dataset, range(states), seed)
    return dataset


def store(dataset: AggregatedDataset, rows: range, seed: int = 0) -> None:
    z = normal(len(rows), *SHAPE, seed=seed)
    places = dataset.add(states(z, 1, list(rows), -z))
    dataset.enqueue(places, torch.Generator().manual_seed(seed))


def states(z: Tensor, transition: int, rows: list[int], target: Tensor) -> States:
    return States(z, target, torch.full((len(z),), transition), torch.tensor(rows))


def rows_of(dataset: AggregatedDataset, count: int) -> list[int]:
    return dataset.take(count)[3].tolist()


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_every_state_is_used_exactly_as_often_as_set(uses: int) -> None:
    dataset = filled(uses)
    assert dataset.pending == 6 * uses
    passes = []
    for number in range(1, uses + 1):
        passes.append(rows_of(dataset, 6))
        assert sorted(passes[-1]) == list(range(6))  # all of them once before any of them again
        assert dataset.used == 6
        assert len(dataset) == (0 if number == uses else 6)
    assert dataset.pending == 0
    assert uses == 1 or passes[0] != passes[1]


def test_older_states_come_first() -> None:
    dataset = filled()
    store(dataset, range(6, 9))
    assert set(rows_of(dataset, 6)) == set(range(6))
    assert set(rows_of(dataset, 3)) == {6, 7, 8}


def test_a_state_that_is_drawn_twice_into_one_batch_counts_once() -> None:
    dataset = filled(uses=2, states=1)
    assert rows_of(dataset, 2) == [0, 0]
    assert (dataset.collected, dataset.used) == (1, 1)
    assert len(dataset) == 0
    assert sorted(dataset.free) == list(range(16))  # its place is free once


def test_states_keep_what_was_stored_with_them() -> None:
    dataset = AggregatedDataset(8, 1, SHAPE)
    z, target = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    first = dataset.add(states(z, 3, [7, 5], target))
    second = dataset.add(states(z + 1, 0, [1, 2], target + 2))
    dataset.enqueue(first + second, torch.Generator().manual_seed(0))
    expected = {7: (z[0], target[0], 3), 5: (z[1], target[1], 3)} | {
        1: (z[0] + 1, target[0] + 2, 0),
        2: (z[1] + 1, target[1] + 2, 0),
    }
    taken, targets, transitions, rows = dataset.take(4)
    assert sorted(rows.tolist()) == sorted(expected)
    for state, found, transition, row in zip(taken, targets, transitions.tolist(), rows.tolist(), strict=True):
        assert torch.equal(state, expected[row][0])
        assert torch.equal(found, expected[row][1])
        assert transition == expected[row][2]


def test_the_places_of_used_up_states_are_reused_and_what_was_taken_stays() -> None:
    dataset = filled(states=4, capacity=4)
    taken, targets, _, rows = dataset.take(2)
    assert len(dataset) == 2
    store(dataset, range(8, 10), seed=9)  # into the two places that have become free
    assert len(dataset) == 4
    assert torch.equal(taken, normal(4, *SHAPE)[rows])
    assert torch.equal(targets, -taken)
    assert set(rows_of(dataset, 2)) | set(rows.tolist()) == {0, 1, 2, 3}
    taken, _, _, rows = dataset.take(2)
    assert torch.equal(taken, normal(2, *SHAPE, seed=9)[rows - 8])


def test_its_size_is_bounded() -> None:
    dataset = filled(capacity=8)
    with pytest.raises(WrongCommand) as error:
        dataset.add(states(normal(3, *SHAPE), 0, [0, 1, 2], normal(3, *SHAPE)))
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
    dataset = filled(uses=2)
    dataset.take(4)
    file = io.BytesIO()
    kept = dataset.state_dict()
    torch.save(kept, file)
    file.seek(0)
    other = AggregatedDataset(16, 2, SHAPE)
    other.load_state_dict(torch.load(file, weights_only=True))
    for held in (dataset, other):
        store(held, range(6, 9), seed=5)
    assert len(kept["free"]) == 10  # what was saved does not change with the dataset
    while dataset.pending:
        for a, b in zip(dataset.take(1), other.take(1), strict=True):
            assert torch.equal(a, b)
    assert (dataset.collected, dataset.used, len(dataset)) == (other.collected, other.used, len(other)) == (9, 9, 0)
