"""A distiller of another package runs like this project's own, and ``distill`` takes every form of a configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.methods import METHODS, read_config
from ddil_core.support.errors import WrongCommand

TOY = '''
from collections.abc import Iterator
from functools import partial
from typing import Literal

from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.distillation.collectors import Labeler
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.methods import Method
from ddil_core.distillation.sources import MixedSource
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.models.sampling import Sampling


class Config(MethodConfig):
    method: Literal["toy"] = "toy"
    updates: int = 2


class ToyStage(Stage):
    """The student learns the teacher's output at two timesteps."""

    def __init__(self, run, teacher):
        super().__init__(teacher, run.pool, run.config.updates, run.config, run.accelerator, "toy")
        times = self.context.pool.mean.new_tensor([999, 499]).long()
        self.source = MixedSource(self.context, times, run.config.updates, Labeler(), self.schedule.add_noise)
        self.times = times

    def _update(self, step):
        states, _ = self.source.draw(step)

        def losses():
            for rows, share in self.parts(len(states)):
                z, t, condition = states.z[rows], self.times[states.transition[rows]], self.condition(states.row[rows])
                target = self.teacher.network.output(z, t, condition)
                yield share * (self.student.output(z, t, condition) - target.detach()).square().mean()

        return self.descend(losses(), step)


def train(run):
    net = run.model.denoiser.net
    teacher = GuidedDenoiser(run.frozen(net))
    net = train_stage(run, partial(ToyStage, run, teacher), net, "toy", "toy")
    return Student(net, run.model.denoiser.prediction, Sampling("ddim", 2, distilled=True))


METHOD = Method("toy", "Toy", "nowhere", Config, lambda model, config: None, train)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another package with the method "toy" and a protocol for it."""
    info = tmp_path / "site" / "toy_distiller-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-distiller\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddil.methods]\ntoy = toy_distiller:METHOD\n")
    (tmp_path / "site" / "toy_distiller.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "toy_distiller", raising=False)
    monkeypatch.setattr(METHODS, "_added", None)
    protocol = tmp_path / "toy.yaml"
    protocol.write_text("method: toy\nbatch_size: 4\npool: 8\nupdates: 3\n")
    return protocol


def test_a_method_of_another_package_distils_from_the_command(
    cli: Callable[..., Result], toy: Path, folder: Path, tmp_path: Path
) -> None:
    base = ("distill", "--teacher", folder, "--method", "toy", "--device", "cpu", "--out", tmp_path / "run")
    refused = cli(*base)
    sentence = "error: the method 'toy' has no shipped protocol; name one with --protocol\n"
    assert (refused.exit_code, refused.stderr) == (2, sentence)
    done = cli(*base, "--protocol", toy, "--no-ddil", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [("toy", 3)]


def test_a_configuration_has_four_forms(folder: Path, tmp_path: Path) -> None:
    content = {"method": "dmd2", "updates": 3}
    config = read_config(content)
    assert config == MatchingConfig(updates=3) == read_config(config)
    (tmp_path / "a.yaml").write_text("method: dmd2\nupdates: 3\n")
    assert read_config(tmp_path / "a.yaml") == read_config(str(tmp_path / "a.yaml")) == config
    assert isinstance(read_config("pd"), ProgressiveConfig)
    small = {"stages": [{"steps": 2, "updates": 1}], "batch_size": 2, "pool": 4}
    student = distill(str(folder), "shapes", small, str(tmp_path / "run"), device="cpu")
    assert student == tmp_path / "run" / "student" and student.is_dir()


def test_a_configuration_that_is_none_is_refused(toy: Path) -> None:
    for config, sentence in {
        "toy": "the method 'toy' brings no protocol; give the path of a protocol or a configuration",
        "nothing": "there is no protocol file nothing",
    }.items():
        with pytest.raises(WrongCommand) as error:
            read_config(config)
        assert str(error.value) == sentence
    with pytest.raises(WrongCommand, match=r"^the configuration has the method 'pdd', which is not known"):
        read_config({"method": "pdd"})
