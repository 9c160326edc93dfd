"""Distribution matching distillation (DMD2: Yin et al., 2405.14867), and DDIL on it.

A generator of one or a few steps follows the difference of two scores, of its teacher (guided) and of a critic that learns what the
generator draws. Without DDIL its input comes from backward simulation: its own rollout to a random step. With it, from the three
sources: forward-diffused data, the teacher's rollouts, its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, Denoiser, GuidedDenoiser
from ddil_core.diffusion.parameterization import Reflection, to_v
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor
from ddil_core.diffusion.schedule import CLEAN, Time, transitions
from ddil_core.distillation.aggregate import States
from ddil_core.distillation.clipping import Clipped
from ddil_core.distillation.config import MatchingConfig
from ddil_core.distillation.consistency import require_unet
from ddil_core.distillation.critic import Critic, mid_side
from ddil_core.distillation.loop import Logs, Stateful
from ddil_core.distillation.losses import gan_critic_loss, gan_generator_loss, matching_gradient, matching_loss
from ddil_core.distillation.processes import gather_rows, own_rows
from ddil_core.distillation.regression import RegressionStage, encode_pairs
from ddil_core.distillation.run import Run
from ddil_core.distillation.sampler import ConsistencySampler, with_noise
from ddil_core.distillation.sources import RolloutStage
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.dropout import evaluating, slices
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.finite import Finite


def require_matching(model: Model, config: MatchingConfig) -> None:
    """Raises DdilError or WrongCommand: the teacher cannot be distilled so, or has not the timesteps."""
    require_unet(model, "distribution matching")
    if config.gan is not None and getattr(model.denoiser.net, "mid_block", None) is None:
        raise DdilError(
            f"the teacher {model.reference!r} has a U-Net without a mid-block, which the discriminator reads: say --set gan=null"
        )
    last = len(model.denoiser.schedule) - 1
    if config.timesteps[0] > last or config.matching_range[1] > last:
        raise WrongCommand(
            f"the teacher {model.reference!r} has timesteps up to {last}; choose lower timesteps and matching_range"
        )


def train_matching(run: Run[MatchingConfig]) -> Student:
    """Regression first, where it is asked for; then the matching, which leaves ``checkpoints/matching.safetensors``."""
    model, config = run.model, run.config
    guided = model.guided(config.guidance_scale)
    network = run.frozen(model.denoiser.net)
    teacher = GuidedDenoiser(network, guided.unconditional, guided.guidance_scale, run.reflection)
    own = start = model.denoiser.net  # in float32, where the frozen teacher may be rounded
    if config.regression is not None:
        pairs = encode_pairs(teacher, run.pool, config, run.out / "checkpoints" / "pairs.safetensors", run.accelerator)
        begin = partial(RegressionStage, teacher, run.pool, config, run.accelerator, pairs, own)
        start = train_stage(run, begin, start, "regression", "regression")
    make = partial(MatchingStage, teacher, run.pool, config, run.accelerator, start, own)
    net = train_stage(
        run, make, start, "matching", f"DMD2, {config.student_steps} step{'s' * (config.student_steps > 1)}"
    )
    return Student(net, model.denoiser.prediction, matching_sampling(config))


def matching_sampling(config: MatchingConfig) -> Sampling:
    return Sampling("lcm", config.student_steps, guidance_scale=1.0, timesteps=config.timesteps, distilled=True)


class MatchingStage(RolloutStage):
    """The generator (the student), its critic, and the teacher's score. An update draws 1 + ``critic_updates`` batches.

    Generator and critic start as copies of ``start`` and ``critic_start``, each the teacher's network where None.
    """

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        config: MatchingConfig,
        accelerator: Accelerator,
        start: nn.Module | None = None,
        critic_start: nn.Module | None = None,
    ) -> None:
        super().__init__(teacher, pool, config.updates, config, accelerator, "dmd2", start)
        self.settings = config
        self.real = GuidedDenoiser(teacher.network, teacher.unconditional, teacher.guidance_scale)  # reflected later
        self.sampling = matching_sampling(config)
        self.turns = 1 + config.critic_updates
        self.draws = config.updates * self.turns
        self.times = torch.tensor(config.timesteps, device=self.device)
        side = None if config.gan is None else mid_side(teacher.network.net, pool.mean.shape[-1])
        copied = copy.deepcopy(teacher.network.net if critic_start is None else critic_start).float()
        network = type(teacher.network)(copied, self.schedule, teacher.network.prediction)
        critic = Critic(network, side, config.seed).train().requires_grad_(True)
        self.critic_rate = config.critic_learning_rate or config.learning_rate
        self.critic, self.critic_optimizer = self.prepare(critic, self.critic_rate)
        steps = [[step] for step in transitions(config.timesteps)]
        self.walkers = {STUDENT: ConsistencySampler(self.student, [*steps[:-1], []])}
        self.places = dict.fromkeys((TEACHER, STUDENT), range(len(steps)))
        if config.ddil is not None:
            finer = [[*part] for part in teacher_segments(config.timesteps, config.teacher_steps)]
            self.walkers |= {TEACHER: Actor(teacher, [*finer[:-1], []])}
            self.make_dataset(targets=False)

    def stateful(self) -> dict[str, Stateful]:
        critic = self.weights[self.critic]
        return super().stateful() | {"critic": critic, "critic_optimizer": self.critic_optimizer}

    def _update(self, step: int) -> Logs:
        """The generator's turn, then its critic's; returns tensors that need no synchronisation until they are read."""
        seen = ClippedFractions(
            *(Clipped(self.teacher.reflection, len(self.schedule), f"clipped_{name}") for name in SEEN)
        )
        first = step * self.turns
        states, aggregated = self._draw(first)
        self.critic.requires_grad_(False)
        with evaluating(self.critic):
            logs = self.descend(self._generator_losses(states, first, seen), step) | seen.logs()
        self.critic.requires_grad_(True)
        critic_losses, norms = [], []
        for turn in range(first + 1, first + self.turns):
            states, _ = self._draw(turn)
            loss, norm = self.step(
                self.critic, self.critic_optimizer, self._critic_losses(states, turn), self.rate(self.critic_rate, step)
            )
            critic_losses.append(loss)
            norms.append(norm)
        logs["critic_loss"], logs["critic_gradient_norm"] = torch.stack(critic_losses).mean(), torch.stack(norms).mean()
        return logs | self.shares(aggregated)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Data diffused to t, and pure noise at the first of the generator's timesteps, where it starts from pure noise when it
        samples (as in the authors' code: α of the last timestep is not 0, and would show it the data)."""
        first = (t == self.times[0]).view(-1, 1, 1, 1)
        return torch.where(first, eps, super().noised(x0, eps, t))

    def generate(self, states: States) -> Tensor:
        """x̂ of the generator from its input states, float32, with its gradient: no reflection stands in its way."""
        t = self.times[states.transition.to(self.device)]
        with self.accelerator.autocast():
            return self.student(states.z, t, self.condition(states.row)).float()

    def _generator_losses(self, states: States, draw: int, seen: ClippedFractions) -> Iterator[Tensor]:
        generator = self.generator(draw, 2)
        times, noise = self._noise(len(states), generator, self.settings.matching_range)
        judged = self._noise(len(states), generator)
        for rows, share in self.parts(len(states)):
            part = states.part(rows)
            x = self.generate(part)
            gradient = self._gradient(x.detach(), noise[rows], times[rows], part.row, seen)
            loss = matching_loss(x, torch.nan_to_num(gradient))
            seen.generator.see(x, self.times[part.transition.to(self.device)])
            if self.settings.gan is not None and self.settings.gan.generator_weight:
                critic = self.own(self.critic)  # no gradient of its own, so none to be joined
                _, logits, _ = self._judge(critic, x, part.row, *(drawn[rows] for drawn in judged))
                loss = loss + self.settings.gan.generator_weight * gan_generator_loss(logits)
            yield share * loss

    @torch.no_grad()
    def _gradient(self, x: Tensor, eps: Tensor, t: Tensor, row: Tensor, seen: ClippedFractions) -> Tensor:
        """The matching gradient at x [B, …], for at most ``teacher_batch_size`` states at once."""
        found, scores = list[Tensor](), (self.real, self.fake)
        with self.accelerator.autocast():
            for some in slices(len(x), self.config.teacher_batch_size):
                told = self.condition(row[some])
                noised = x[some], eps[some], t[some]
                found.append(score_difference(*scores, *noised, told, self.teacher.reflection, seen, self.finite))
        return torch.cat(found)

    def fake(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x̂ of the critic, not reflected."""
        return self.teacher.network.x0(self.own(self.critic)(z, t, condition)[0], z, t)

    def _noise(
        self, count: int, generator: torch.Generator, bounds: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """t [B], uniform in ``bounds`` (all timesteps where None), and ε; of a whole batch, so that its parts change nothing."""
        low, high = (0, len(self.schedule) - 1) if bounds is None else bounds
        t = torch.randint(low, high + 1, (count,), generator=generator)
        eps = torch.randn((count, *self.pool.mean.shape[1:]), generator=generator)
        return t.to(self.device), eps.to(self.device)

    def _judge(
        self, critic: nn.Module, x: Tensor, row: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The critic on x noised to t with ε: its output, its logits, and z."""
        z = self.schedule.add_noise(x, eps, t)
        with self.accelerator.autocast():
            output, logits = critic(z, t, self.condition(row))
        return output, x.new_empty(0) if logits is None else logits, z

    def _critic_losses(self, states: States, draw: int) -> Iterator[Tensor]:
        """The critic's denoising of what the generator draws, in its own prediction, and its discriminator's loss on the same."""
        generator, size = self.generator(draw, 2), len(states)
        times, noise = self._noise(size, generator)
        if self.settings.gan is not None:
            x0, row = self.pool.draw(size, generator)
            judged = self._noise(size, generator)
        for rows, share in self.parts(size):
            part, t, eps = states.part(rows), times[rows], noise[rows]
            with torch.no_grad(), evaluating(self.net):
                some = slices(len(part), self.config.teacher_batch_size)
                x = torch.cat([self.generate(part.part(rows)) for rows in some])
            output, fake, z = self._judge(self.critic, x, part.row, t, eps)
            loss = (output - self._native(x, z, eps, t)).square().mean()
            if self.settings.gan is not None:
                data = x0[rows].to(self.device)
                real = self._judge(self.critic, data, row[rows], *(drawn[rows] for drawn in judged))[1]
                loss = loss + self.settings.gan.critic_weight * gan_critic_loss(real, fake)
            yield share * loss

    def _native(self, x: Tensor, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict: ε, v or x₀."""
        return {"epsilon": eps, "sample": x}.get(self.teacher.network.prediction, to_v(x, z, *self.schedule.at(t, z)))

    def _draw(self, step: int) -> tuple[States, int]:
        """The generator's input: from the three sources with DDIL, by backward simulation without."""
        return (self.simulate(step), 0) if self.dataset is None else super()._draw(step)

    @torch.no_grad()
    def simulate(self, draw: int) -> States:
        """Backward simulation: every row is rolled out from noise, as the generator samples, to an exit step of its own."""
        generator, size = self.generator(draw, 0), self.config.batch_size
        row = torch.randint(len(self.pool), (size,), generator=generator)
        leave = torch.randint(len(self.times), (size,), generator=generator)
        z = torch.randn((size, *self.pool.mean.shape[1:]), generator=generator).to(self.device)
        steps = torch.arange(len(self.times) - 1)
        told = with_noise(self.condition(row), z, leave > steps[:, None], generator)
        rows = own_rows(self.accelerator, size)
        own = torch.arange(size)[rows]
        with self.accelerator.autocast(), evaluating(self.net):
            for step in steps.tolist():
                for going in own[leave[own] > step].to(self.device).split(self.config.teacher_batch_size):
                    if len(going):
                        z[going] = self.walkers[STUDENT].act(step, z[going], told.rows(going))
        z = gather_rows(self.accelerator, z[rows], rows, size)
        return States(z, z.new_empty(size, 0), leave, row)


def score_difference(
    real: Denoiser,
    fake: Callable[[Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    told: Condition,
    reflection: Reflection | None = None,
    seen: ClippedFractions | None = None,
    finite: Finite[str] | None = None,
) -> Tensor:
    """The matching gradient at x [B, …], noised by ε to t [B]: of the real x̂ (guided) and the fake one, both reflected.

    ``finite`` watches the real x̂ of an x that is finite: where it is not, neither is the gradient, which is then taken for 0.
    """
    z = real.schedule.add_noise(x, eps, t)
    x_real, x_fake = real(z, t, told).float(), fake(z, t, told).float()
    if finite is not None:
        finite.see("as the real score of what is generated", x_real.where(torch.isfinite(x).all(), 0.0))
    if seen is not None:
        seen.real.see(x_real, t)
        seen.fake.see(x_fake, t)
    if reflection is not None:
        x_real, x_fake = reflection(x_real), reflection(x_fake)
    return matching_gradient(x, x_real, x_fake)


SEEN = ("generator", "real", "fake")


class ClippedFractions:
    """Whose x̂ is how much clipped: the generator's, the real score's and the fake one's."""

    def __init__(self, generator: Clipped, real: Clipped, fake: Clipped) -> None:
        self.generator, self.real, self.fake = generator, real, fake

    def logs(self) -> Logs:
        return self.generator.logs() | self.real.logs() | self.fake.logs()


def teacher_segments(times: tuple[int, ...], steps: int) -> list[list[tuple[Time, Time]]]:
    """The teacher's DDIM steps between a student's ``times``: each interval, the last one to its clean end, in equal parts."""
    parts, found = steps // len(times), list[list[tuple[Time, Time]]]()
    for t, s in zip(times, [*times[1:], CLEAN], strict=True):
        end = 0 if s == CLEAN else s
        grid = [round(t + (end - t) * i / parts) for i in range(parts)]
        found.append(list(zip(grid, [*grid[1:], s], strict=True)))
    return found
