"""A table that is measured on a GPU is the CPU's, within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddil_eval import compare, covariate_shift
from ddil_eval.experiments.systems import SystemsConfig
from ddil_eval.report.records import Record
from tests.pipelines import TEACHER, save_pipeline
from tests.pretend_gpu import PretendedGpu

pytestmark = pytest.mark.usefixtures("a_gpu")
METRICS = ["fd_efflite0", "drawn_right", "clip_score_shapes"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("teacher"), TEACHER, seed=1))


def values(records: list[Record]) -> dict[str, Any]:
    return {
        f"{record.cell} {name}": metric.estimate.value for record in records for name, metric in record.metrics.items()
    }


def test_a_table_of_a_gpu_is_the_cpus(teacher: str, tmp_path: Path) -> None:
    """A second thread takes the features beside the sampling."""
    both = {}
    for device in ("cuda", "cpu"):
        settings: dict[str, Any] = {"num_prompts": 20, "num_reference_images": 24, "steps": 3, "metrics": METRICS}
        both[device] = values(compare([teacher], "shapes", out=tmp_path / device, device=device, **settings))
    assert both["cuda"] == pytest.approx(both["cpu"], rel=1e-4)
    assert len(both["cpu"]) == len(METRICS)


def test_covariate_shift_on_a_gpu_is_the_cpus(teacher: str, tmp_path: Path) -> None:
    both = {}
    for device in ("cuda", "cpu"):
        settings: dict[str, Any] = {
            "num_prompts": 8,
            "num_reference_images": 24,
            "teacher_steps": 8,
            "metrics": METRICS,
        }
        settings |= {"p_teacher": ["0.5"], "switch": [], "factorial": False}
        records = covariate_shift(teacher, teacher, "shapes", out=tmp_path / device, device=device, **settings)
        both[device] = values(records)
    assert both["cuda"] == pytest.approx(both["cpu"], rel=1e-4)


def test_the_features_of_a_batch_wait_for_its_images_alone(teacher: str, tmp_path: Path) -> None:
    """Two batches: the host waits for the images of each, and for nothing else once the model is there."""
    if PretendedGpu.current is None:
        pytest.skip("counted on the pretended GPU alone")
    waits = []
    for prompts in (4, 8):
        PretendedGpu.current.waits.clear()
        settings: dict[str, Any] = {"num_prompts": prompts, "reference_images": 24, "batch_size": 4}
        row = {"name": "teacher", "model": teacher, "steps": 1}
        config = SystemsConfig.model_validate({"systems": [row], "metrics": METRICS[:1]} | settings)
        compare(config=config, out=tmp_path / str(prompts), device="cuda")
        waits.append(len(PretendedGpu.current.waits))
    assert waits[1] == waits[0] + 1
