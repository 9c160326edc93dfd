"""Updates of the distillers: LCM beside diffusers' public script, and the share of the ceiling of PD, LCM and DMD2.

    python -m benchmarks.training [--network shapes] [--batch-size N] [--rounds 3] [--threads 1] [--csv FILE]

The peer is one update of diffusers' examples/consistency_distillation/train_lcm_distill_sd_wds.py, from its formulas: the
teacher is evaluated twice, with and without the caption, an AdamW step follows, and then the average of the weights.
Both get the same encoded data, noise, times and guidance, and start from the same weights. First the losses of two
updates are compared. The script also encodes its images and captions in every update; that is left out, to the script's
favour. It has no reflection, so that ours has none here.

A round is two updates, because our teacher labels the data of two batches together. Weights are random. On a CPU the
networks are those of the shapes world and a small Stable Diffusion, in float32, and times are CPU seconds. On a GPU the
network is Stable Diffusion 1.5 at full size in bfloat16: both train float32 weights under autocast, and our teacher is
in bfloat16. ``share`` is the floating-point operations a second that torch counts over those of a large product of
matrices. On a GPU ``working_GiB`` is what an update allocates at its peak, above weights, averages and moments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternation import CLOCKS, compare, figures, synchronise
from benchmarks.claims import Claim
from benchmarks.printing import show
from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, UNetDenoiser
from ddil_core.diffusion.parameterization import Prediction
from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.autocast import rounded_for_autocast
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.consistency import ConsistencyStage, student_network
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.matching import MatchingStage
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.stage import Stage
from ddil_core.shapes.training import architecture
from ddil_eval.cli.options import quiet_libraries

UPDATES = 2
"""Updates of a round: the batches that our teacher labels together."""
POOL = 256


@dataclass(frozen=True)
class Network:
    """A network whose updates are measured.

    Attributes:
        make: Returns the U-Net with random weights.
        prediction: What it predicts.
        latent: (C, H, W).
        text: The number of tokens of a caption and their width.
        batch_size: Rows of a batch.
        device: Where it is measured.
    """

    make: Callable[[], nn.Module]
    prediction: Prediction
    latent: tuple[int, int, int]
    text: tuple[int, int]
    batch_size: int
    device: str = "cpu"


def stable_diffusion(channels: tuple[int, ...], side: int, width: int) -> nn.Module:
    """Return a U-Net of Stable Diffusion 1.5's layout with other channels, side of the latents and width of the text."""
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        down_block_types=(*("CrossAttnDownBlock2D",) * (len(channels) - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(channels) - 1)),
        cross_attention_dim=width,
        attention_head_dim=8,
    )


NETWORKS = {
    "shapes": Network(architecture.unet, "v_prediction", (8, 8, 8), (architecture.MAX_TOKENS, 128), 8),
    "small SD": Network(partial(stable_diffusion, (64, 128), 16, 256), "epsilon", (4, 16, 16), (77, 256), 4),
    "SD 1.5": Network(
        partial(stable_diffusion, (320, 640, 1280, 1280), 64, 768), "epsilon", (4, 64, 64), (77, 768), 8, "cuda"
    ),
}


@dataclass
class Setup:
    """A network with what its updates need."""

    network: Network
    batch_size: int
    mixed: bool
    net: nn.Module = field(init=False)
    accelerator: Accelerator = field(init=False)
    pool: LatentPool = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=self.network.device == "cpu", mixed_precision="bf16" if self.mixed else "no")
        self.net = self.network.make().to(self.accelerator.device).eval().requires_grad_(False)
        mean, text = torch.randn(POOL, *self.network.latent), torch.randn(POOL, *self.network.text)
        self.pool = LatentPool(mean.half(), torch.full_like(mean, 0.1).half(), {"encoder_hidden_states": text.half()})

    def teacher(self) -> GuidedDenoiser:
        """Return our frozen teacher: in bfloat16 under mixed precision, with a guidance scale of 2."""
        net = rounded_for_autocast(copy.deepcopy(self.net)) if self.mixed else self.net
        schedule = Schedule.stable_diffusion().to(self.accelerator.device)
        nothing = Condition({"encoder_hidden_states": torch.zeros(1, *self.network.text)}).to(self.accelerator.device)
        return GuidedDenoiser(UNetDenoiser(net, schedule, self.network.prediction), nothing, 2.0)

    def settings(self, **own: Any) -> dict[str, Any]:
        """Return the settings of a configuration."""
        shared = {"batch_size": self.batch_size, "teacher_batch_size": UPDATES * self.batch_size, "warmup": 0}
        return shared | {"learning_rate_decay": False, "learning_rate": 1e-5, "gradient_clip": 1.0} | own

    def lcm(self) -> ConsistencyStage:
        config = ConsistencyConfig.model_validate(self.settings(updates=10**6))
        start = student_network(self.net, config)
        return ConsistencyStage(self.teacher(), self.pool, config, self.accelerator, start)

    def pd(self) -> ProgressiveStage:
        config = ProgressiveConfig.model_validate(self.settings(stages=[{"steps": 8, "updates": 10**6}]))
        return ProgressiveStage(self.teacher(), self.pool, config.stages[0], config, self.accelerator, 0, self.net)

    def dmd2(self) -> MatchingStage:
        config = MatchingConfig.model_validate(self.settings(updates=10**6, critic_updates=1, gan={}))
        return MatchingStage(self.teacher(), self.pool, config, self.accelerator, self.net, self.net)


class Ours:
    """Updates of one of our stages."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.step = stage, 0

    def update(self) -> Tensor:
        loss = torch.as_tensor(self.stage.update(self.step)["loss"])
        self.step += 1
        return loss

    def round(self) -> None:
        for _ in range(UPDATES):
            self.update()


class PublicScript:
    """Updates of LCM as diffusers' script makes them."""

    def __init__(self, setup: Setup, stage: ConsistencyStage) -> None:
        """``stage`` gives the start of the student and draws the batches. It is not trained."""
        self.setup, self.stage, self.step = setup, stage, 0
        self.device = stage.device
        self.student = copy.deepcopy(stage.net).train().requires_grad_(True)
        self.target = copy.deepcopy(stage.net).train().requires_grad_(False)
        config = stage.settings
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.alpha, self.sigma = (levels.float() for levels in (stage.schedule.alphas, stage.schedule.sigmas))
        self.nothing = torch.zeros(setup.batch_size, *setup.network.text, device=self.device)

    def at(self, levels: Tensor, t: Tensor) -> Tensor:
        return levels[t].view(-1, 1, 1, 1)

    def clean(self, output: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x̂ and the ε̂ of a network's output."""
        alpha, sigma = self.at(self.alpha, t), self.at(self.sigma, t)
        if self.setup.network.prediction == "epsilon":
            return (z - sigma * output) / alpha, output
        return alpha * z - sigma * output, sigma * z + alpha * output

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        scaled = 10.0 * t.view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5

    def batch(self) -> tuple[Tensor, ...]:
        """Return x₀, ε, the transition's index, w and the captions of this update, on the device."""
        place = self.step % UPDATES
        if place == 0:
            self.drawn = self.stage.source._drawn(self.step)
        rows = slice(place * self.setup.batch_size, (place + 1) * self.setup.batch_size)
        x0, row, index, eps, guidance = (column[rows] for column in self.drawn if column is not None)
        text = self.setup.pool.condition["encoder_hidden_states"][row].float()
        return tuple(column.to(self.device) for column in (x0, eps, index, guidance - 1, text))

    def embedded(self, w: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(128, device=self.device) * -(math.log(10000.0) / 127))
        angles = 1000.0 * w[:, None] * frequencies[None]
        return torch.cat([torch.sin(angles), torch.cos(angles)], 1)

    def update(self) -> Tensor:
        x0, eps, index, w, text = self.batch()
        self.step += 1
        t, s = self.stage.table[index].unbind(1)
        z = self.at(self.alpha, t) * x0 + self.at(self.sigma, t) * eps
        embedding, scale = self.embedded(w), w.view(-1, 1, 1, 1)
        with self.setup.accelerator.autocast():
            output = self.student(z, t, timestep_cond=embedding, encoder_hidden_states=text).sample
        c_skip, c_out = self.boundary(t)
        value = c_skip * z + c_out * self.clean(output, t, z)[0]
        with torch.no_grad(), self.setup.accelerator.autocast():
            with_text = self.clean(self.setup.net(z, t, encoder_hidden_states=text).sample, t, z)
            without = self.clean(self.setup.net(z, t, encoder_hidden_states=self.nothing).sample, t, z)
            clean, noise = (a + scale * (a - b) for a, b in zip(with_text, without, strict=True))
            z_s = (self.at(self.alpha, s) * clean + self.at(self.sigma, s) * noise).float()
            output = self.target(z_s, s, timestep_cond=embedding, encoder_hidden_states=text).sample
            c_skip, c_out = self.boundary(s)
            target = c_skip * z_s + c_out * self.clean(output, s, z_s)[0]
        c = self.stage.settings.huber_c
        loss = torch.mean(torch.sqrt((value.float() - target.float()) ** 2 + c**2) - c)
        self.setup.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.stage.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, weight in zip(self.target.parameters(), self.student.parameters(), strict=True):
                average.mul_(0.95).add_(weight, alpha=1 - 0.95)
        return loss.detach()

    def round(self) -> None:
        for _ in range(UPDATES):
            self.update()


def operations_per_second(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """Return the floating-point operations a second of a large product of matrices: the best of ``seconds``."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    now = CLOCKS["wall" if device.type == "cuda" else "cpu"]  # the clock of the updates
    best, started = math.inf, now()
    while best == math.inf or now() - started < seconds:
        synchronise()
        before = now()
        torch.mm(a, b)
        synchronise()
        best = min(best, now() - before)
    return 2 * size**3 / best


def operations(work: Callable[[], object]) -> float:
    """Return the floating-point operations that torch counts in ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def working_gib(work: Callable[[], object], device: torch.device) -> float:
    """Return what ``work`` allocates on a GPU at its peak, above what the networks hold; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def against_the_script(setup: Setup, rounds: int) -> tuple[pd.DataFrame, float]:
    """Return the times of LCM's updates, and the largest relative difference of the first losses."""
    stage = setup.lcm()
    script, ours = PublicScript(setup, stage), Ours(stage)
    losses = [(float(script.update()), float(ours.update())) for _ in range(UPDATES)]
    difference = max(abs(a - b) / a for a, b in losses)
    bound = 0.05 if setup.mixed else 1e-3
    if not all(abs(a - b) / a <= bound for a, b in losses):  # NaN is no agreement
        raise click.ClickException(f"the losses of the two LCM updates differ by {difference:.2g}: {losses}")
    times = compare({"LCM, public script": script.round, "LCM": ours.round}, rounds=rounds)
    frame = figures(times, peer="LCM, public script")
    frame["working_GiB"] = [working_gib(each.round, stage.device) for each in (script, ours)]
    frame["flop"] = [operations(each.round) for each in (script, ours)]
    return frame, difference


def alone(setup: Setup, name: str, rounds: int) -> pd.DataFrame:
    """Return the times of a method's updates."""
    ours = Ours({"PD": setup.pd, "DMD2": setup.dmd2}[name]())
    frame = figures(compare({name: ours.round}, rounds=rounds))
    frame["working_GiB"] = [working_gib(ours.round, ours.stage.device)]
    frame["flop"] = [operations(ours.round)]
    return frame


def measure(name: str, batch_size: int | None, rounds: int) -> pd.DataFrame:
    """Return the figures of all updates of a network."""
    network = NETWORKS[name]
    setup = Setup(network, batch_size or network.batch_size, mixed=network.device == "cuda")
    ceiling = operations_per_second(torch.bfloat16 if setup.mixed else torch.float32, setup.accelerator.device)
    lcm, difference = against_the_script(setup, rounds)
    setup.accelerator.free_memory()
    frames = [lcm.assign(loss_difference=difference)]
    for method in ("PD", "DMD2"):
        frames.append(alone(setup, method, max(1, rounds // 2)))
        setup.accelerator.free_memory()
    frame = pd.concat(frames, ignore_index=True).rename(columns={"contender": "update"})
    for column in ("median_s", "least_s", "most_s", "flop"):
        frame[column] /= UPDATES
    frame["samples_per_s"] = setup.batch_size / frame.median_s
    frame["TFLOP"] = frame.pop("flop") / 1e12
    frame["share"] = frame["TFLOP"] * 1e12 / frame.median_s / ceiling
    frame.insert(0, "network", name)
    frame.insert(2, "batch", setup.batch_size)
    return frame


@click.command(help=__doc__)
@click.option("--network", "names", type=click.Choice(list(NETWORKS)), multiple=True, help="By default all that fit.")
@click.option("--batch-size", type=int, default=None, help="Rows of a batch; by default each network's own.")
@click.option("--rounds", default=3, show_default=True, help="Rounds that are counted, of two updates each.")
@click.option("--threads", default=1, show_default=True, help="Threads of a CPU.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(names: tuple[str, ...], batch_size: int | None, rounds: int, threads: int, csv_path: Path | None) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = names or tuple(name for name, network in NETWORKS.items() if network.device == device)
    frame = pd.concat([measure(name, batch_size, rounds) for name in chosen], ignore_index=True)
    show(frame, csv_path, ".4g", packages=["accelerate"])


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return a claim for each network: samples a second of an LCM update, at least 1.3 times the script's on a GPU."""
    claims = []
    for network, rows in frame.groupby("network", sort=False):
        by_name = rows.set_index("update")
        script, ours = by_name.loc["LCM, public script"], by_name.loc["LCM"]
        bar = 1.3 if NETWORKS[str(network)].device == "cuda" else 1.0
        claims.append(
            Claim(
                f"LCM update of {network}, samples a second",
                float(ours.samples_per_s),
                float(script.samples_per_s),
                bar,
                at_least=True,
                ratio=1 / float(ours.ratio),
            )
        )
    return claims


if __name__ == "__main__":
    main()
