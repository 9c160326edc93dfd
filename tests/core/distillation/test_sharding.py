"""Settings of divided networks, and what the helpers do where nothing is divided. Two processes: test_processes.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.memory_plan import Plan, moment_bytes
from ddil_core.distillation.sharding import joined, load_whole, local, own_part, whole, whole_copy, without_weights


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (
            {"shard": True, "optimizer": "8bit"},
            "shard divides each network over the processes, and optimizer=8bit needs",
        ),
        ({"shard": True, "compile": True}, "shard divides each network over the processes, and compile needs it whole"),
        ({"offload": True, "optimizer": "8bit"}, "offload puts the optimiser on the host, and 8bit is for a GPU"),
        ({"stream": 1, "pool": "all"}, "a stream holds a number of images at once, and not all; set pool, as in pool="),
    ],
)
def test_settings_that_exclude_each_other_are_refused(told: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MatchingConfig.model_validate({"updates": 1} | told)


def test_an_undivided_network_is_left_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weight = net[0].weight
    with whole([net]):
        assert net[0].weight is weight
    assert local(weight) is joined(weight) is own_part(weight, weight) is weight
    plan = without_weights(net)
    assert {parameter.device.type for parameter in plan.parameters()} == {"meta"}
    copied = whole_copy(plan, net)
    assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), net.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="the weights are those of another network"):
        load_whole(net, {"other": weight})


def test_moments_of_8_bits_have_a_scale_for_256_numbers_and_small_tensors_have_none() -> None:
    assert moment_bytes(torch.empty(1000, 1000), "fused") == 8_000_000
    assert moment_bytes(torch.empty(1000, 1000), "8bit") == 2_000_000 + 2 * 4 * 3907
    assert moment_bytes(torch.empty(4095), "8bit") == 8 * 4095


def test_a_gpu_suffices_where_a_twentieth_of_it_stays_free() -> None:
    gib = 2**30
    assert Plan({"teacher": int(22.8 * gib)}, {}, 1).fits(24)
    assert not Plan({"teacher": int(22.8 * gib), "student": gib // 10}, {"average": 0}, 1).fits(24)
