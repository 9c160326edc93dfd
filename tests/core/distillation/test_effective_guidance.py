"""The guidance of a distillation: what a run used is written down, and older runs are the runs that they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.run_folder import open_run, require_same_run
from ddil_core.distillation.shipped import announce, shipped_protocol
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import validate
from tests.pipelines import edited, save_pipeline

PD = {"stages": [{"steps": 2, "updates": 1}], "batch_size": 2, "pool": 4}
LORA = {"updates": 2, "w_embedding": None, "lora": {}}


@pytest.mark.parametrize(
    ("guidance_range", "scale"), [((6, 16), 8.5), ((8.5, 9), 8.5), ((2, 4), 3), ((1, 1), 1), ((10, 20), 15)]
)
def test_lcm_samples_inside_its_range(guidance_range: tuple[float, float], scale: float) -> None:
    assert ConsistencyConfig(updates=2, guidance_range=guidance_range).guidance_scale == scale
    with pytest.raises(WrongCommand) as error:
        outside = {"updates": 2, "guidance_range": list(guidance_range), "guidance_scale": guidance_range[1] + 1}
        validate(ConsistencyConfig, outside, "the protocol")
    low, high = guidance_range
    assert str(error.value) == (
        f"the protocol has a value that does not fit: guidance_scale is {high + 1:g}, outside guidance_range, {low:g} to "
        f"{high:g}, in which the student is trained; choose one inside, or another range"
    )


def identity(config: Any, **change: Any) -> dict[str, Any]:
    return {"teacher": "t", "teacher_sha256": "0", "data": "d", "config": config.model_dump(mode="json") | change}


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (ProgressiveConfig.model_validate(PD).with_guidance(7.5), None),
        (MatchingConfig(updates=2).with_guidance(7.5), None),
        (ConsistencyConfig.model_validate(LORA | {"guidance_range": (1.5, 2.25)}), 8.5),
        (ConsistencyConfig.model_validate({"updates": 2, "guidance_range": (2, 4)}), 8.5),
    ],
    ids=["pd", "dmd2", "lora", "lcm"],
)
def test_an_older_run_is_the_same_run_and_says_its_guidance_from_then_on(
    config: Any, written: float | None, tmp_path: Path
) -> None:
    """Earlier versions wrote null for the teacher's own guidance, and LCM's 8.5 whatever the range."""
    old = identity(config, guidance_scale=written)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old))
    open_run(tmp_path, identity(config), {}, type(config), 7.5)
    held = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert held["config"] == identity(config)["config"] and "changes" not in held
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old))
    if written is None:  # a null was the teacher's own, and no other
        with pytest.raises(WrongCommand, match=r"another run \(guidance_scale is 7.5 there\); choose another --out"):
            require_same_run(tmp_path, identity(config, guidance_scale=3.0), type(config), 7.5)


@pytest.mark.parametrize("more", [LORA, {"updates": 2}], ids=["lora", "lcm"])
def test_a_run_with_a_guidance_scale_of_its_own_goes_on(more: dict[str, Any], tmp_path: Path) -> None:
    """A LoRA does not use the scale, and still is the run that its own command began."""
    config = ConsistencyConfig.model_validate(more | {"guidance_range": (1.5, 3), "guidance_scale": 2})
    open_run(tmp_path, identity(config), {}, type(config), 7.5)
    assert require_same_run(tmp_path, identity(config), type(config), 7.5) == config.model_dump(mode="json")


def test_a_run_of_a_folder_without_guidance_says_what_was_assumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = edited(folder, tmp_path / "teacher", "unet/config.json")
    (teacher / "ddil.json").unlink()
    config = ProgressiveConfig.model_validate(PD)
    student = distill(str(teacher), "shapes", config, tmp_path / "run", device="cpu")
    said = capsys.readouterr().err.splitlines()
    assert (
        said.count(
            f"warning: {str(teacher)!r} names no guidance scale, so that diffusers' default 7.5 is assumed; say another with "
            "--guidance or with guidance_scale in a protocol"
        )
        == 1
    )
    assert f"{teacher}, the teacher: 4 steps of ddim, guidance 7.5" in said
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["config"]["guidance_scale"] == 7.5
    made = json.loads((student / "ddil.json").read_text())
    assert made["teacher"] == {"steps": 4, "solver": "ddim", "guidance_scale": 7.5}
    assert made["guidance_scale"] == 1.0  # how the student is sampled
    with pytest.raises(WrongCommand, match="guidance_scale is 7.5 there"):
        distill(str(teacher), "shapes", config.with_guidance(3.0), tmp_path / "run", device="cpu")


def full_size(folder: Path) -> Path:
    """The files that say how large a teacher's latents are."""
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (folder / "unet" / "config.json").write_text(json.dumps({"sample_size": 64}))
    return folder


def test_a_protocol_is_chosen_by_the_teacher_and_said(
    folder: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text(yaml.safe_dump({"teacher": "shapes", "data": "shapes", "config": {}}))
    large = full_size(tmp_path / "large")
    for teacher, method, variant, file, strange in (
        ("shapes", "pd", "", "shapes/pd.yaml", False),
        (run, "lcm", "-lora", "shapes/lcm-lora.yaml", False),
        ("shapes-flow", "lcm", "", "shapes/lcm-transformer.yaml", False),
        ("shapes-flow", "pd", "", "shapes/pd.yaml", True),
        (folder, "dmd2", "", "shapes/dmd2.yaml", True),
        (large, "lcm", "", "paper/lcm.yaml", True),
        (f"sd15:{large}", "pd", "", "paper/pd.yaml", False),
        (f"sd15:{large}", "tcd", "-lora", "paper/tcd-lora.yaml", False),
        (f"ssd1b:{large}", "dmd2", "", "paper/dmd2-ssd1b.yaml", False),
        (f"sdxl:{large}", "dmd2", "", "paper/dmd2.yaml", True),
    ):
        shipped = shipped_protocol(str(teacher), method, variant)
        assert shipped is not None and shipped.path == root / "protocols" / file
        announce(shipped, str(teacher))
        first, *more = capsys.readouterr().err.splitlines()
        assert first == f"protocol: {shipped.path}"
        assert bool(more) == strange
    assert more == [
        f"warning: this protocol was made for the teacher 'sd15', and its settings may not fit 'sdxl:{large}'; name one "
        "of your own with --protocol, or change its keys with --set"
    ]
    assert shipped_protocol("gaussians", "pd", "-lora") is None


def test_a_teacher_in_another_layout_still_gets_a_protocol(tmp_path: Path) -> None:
    teacher = save_pipeline(tmp_path, None, seed=1, layout="StableDiffusion3Pipeline", prediction="flow")
    shipped = shipped_protocol(str(teacher), "pd")
    assert shipped is not None and shipped.made_for == "shapes"  # the method itself refuses what it cannot distil
