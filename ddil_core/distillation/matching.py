"""Distribution matching distillation (DMD2: Yin et al., 2405.14867), and DDIL on it.

A generator of one or a few steps follows the difference of two scores: the guided teacher's, and that of a critic. The
critic learns what the generator draws. Without DDIL the generator's input comes from backward simulation, its own
rollout to a random step. With DDIL the input comes from forward-diffused data, from rollouts of the teacher and from
rollouts of the generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import ClosedForm, Condition, Denoiser, GuidedDenoiser, NetworkDenoiser
from ddil_core.diffusion.few_step import between, time_of, times_of
from ddil_core.diffusion.parameterization import Reflection, to_v
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor
from ddil_core.diffusion.schedule import CLEAN, Schedule, Transition, transitions
from ddil_core.distillation.adapters import fresh_adapters, has_lora, require_lora, train_all_or_adapters, with_lora
from ddil_core.distillation.aggregate import States
from ddil_core.distillation.checkpoints import Stateful
from ddil_core.distillation.checks import require_few_step, require_steps
from ddil_core.distillation.clipping import ClippedFraction
from ddil_core.distillation.collectors import Labeler, SeparateCollector, SoleActor
from ddil_core.distillation.context import LOSS
from ddil_core.distillation.critic import Critic, middle_block
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.losses import gan_critic_loss, gan_generator_loss, matching_gradient, matching_loss
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.processes import slices
from ddil_core.distillation.regression import Pairs, RegressionStage, encode_pairs, pair_loss
from ddil_core.distillation.run import Run
from ddil_core.distillation.sampler import ConsistencySampler
from ddil_core.distillation.sources import BackwardSimulation, MixedSource, StateSource
from ddil_core.distillation.stage import Stage, Stepped
from ddil_core.distillation.start import starting_network
from ddil_core.distillation.student import Student
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.training_log import SKIPPED, Logs
from ddil_core.distillation.transfer import Ahead
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.devices import pinned, sent
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.finite import Finite


def require_matching(model: Model, config: MatchingConfig) -> None:
    """Refuse a teacher that distribution matching cannot use.

    Raises:
        DdilError: the method does not know what the teacher predicts, or the discriminator has no block to read.
        WrongCommand: the teacher does not have the timesteps or the grid of the configuration, or no place for the
            LoRA.
    """
    require_few_step(model, "distribution matching")
    require_lora(model, config.lora)
    if config.regression is not None:
        require_steps(model, config.regression.teacher_steps, "regression.teacher_steps")
    net = model.denoiser.net
    if config.gan is not None and not isinstance(net, ClosedForm) and middle_block(net) is None:
        raise DdilError(
            f"the teacher {model.reference!r} has a U-Net without a mid-block, which the discriminator reads; say "
            "--set gan=null"
        )
    last = len(model.denoiser.schedule) - 1
    if config.timesteps[0] > last or config.matching_range[1] > last:
        raise WrongCommand(
            f"the teacher {model.reference!r} has timesteps up to {last}; choose lower timesteps and matching_range"
        )


def train_matching(run: Run[MatchingConfig]) -> Student:
    """Train the optional regression, then the matching, which leaves ``checkpoints/matching.safetensors``."""
    model, config, network = run.model, run.config, run.model.denoiser.net
    guided = model.guided(config.guidance_scale)

    def teacher_of(network: NetworkDenoiser) -> GuidedDenoiser:
        return GuidedDenoiser(network, guided.unconditional, guided.guidance_scale, run.reflection)

    unrounded = start = starting_network(run)  # the frozen teacher may be rounded
    pairs: Pairs = {}
    if config.regression is not None:
        path, exact = run.out / "checkpoints" / "pairs.safetensors", run.frozen(network, under_autocast=False)
        pairs = encode_pairs(teacher_of(exact), run.pool, config, path, run.accelerator)
        del exact
    teacher = teacher_of(run.frozen(network))
    if config.lora is not None:
        start = with_lora(unrounded, config.lora)
    if config.regression is not None:
        begin = partial(RegressionStage, teacher, run.pool, config, run.accelerator, pairs, start)
        start = train_stage(run, begin, start, "regression", "regression")
        start = start.to("cpu") if config.lora is None else start  # the matching trains a copy
    make = partial(MatchingStage, teacher, run.pool, config, run.accelerator, start, unrounded, pairs)
    steps = f"{config.student_steps} step{'s' * (config.student_steps > 1)}"
    net = train_stage(run, make, start, "matching", f"DMD2, {steps}")
    sampling = matching_sampling(config, model.denoiser.schedule)
    return Student(net, model.denoiser.prediction, sampling, config.lora is not None)


def matching_sampling(config: MatchingConfig, schedule: Schedule) -> Sampling:
    """Return how the generator is sampled: at the times of ``timesteps`` on the teacher's schedule."""
    times = tuple(time_of(schedule, timestep) for timestep in config.timesteps)
    return Sampling("lcm", config.student_steps, guidance_scale=1.0, timesteps=times, distilled=True)


@dataclass(frozen=True)
class DiffuseFromNoise:
    """Diffuses data to t. At the generator's first timestep it gives pure noise, as in sampling.

    The authors' code does the same: α of the last timestep is not 0, and would show the data to the generator.
    """

    schedule: Schedule
    first: Tensor

    def __call__(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return torch.where((t == self.first).view(-1, 1, 1, 1), eps, self.schedule.add_noise(x0, eps, t))


class LossDraws(NamedTuple):
    """Random numbers of a loss, for a whole batch.

    Attributes:
        t: Times of the scores or of the critic, [B].
        eps: Their noise [B, C, H, W].
        judged_t: Times of what the discriminator judges; this and the following are empty without one.
        judged_eps: Their noise.
        x0: Data for the discriminator; empty in the generator's loss.
        row: The rows of the pool of these data.
        pair: Rows of the teacher's pairs for the regression beside the generator's loss; empty without one.
    """

    t: Tensor
    eps: Tensor
    judged_t: Tensor
    judged_eps: Tensor
    x0: Tensor
    row: Tensor
    pair: Tensor


class MatchingStage(Stage):
    """Trains the generator (the student) and its critic. An update draws 1 + ``critic_updates`` batches."""

    source: StateSource

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        config: MatchingConfig,
        accelerator: Accelerator,
        start: nn.Module | None = None,
        critic_start: nn.Module | None = None,
        pairs: Pairs | None = None,
    ) -> None:
        """``critic_start`` is the network that the critic starts as a copy of; None for the teacher's network. Where
        ``start`` holds adapters, the critic starts with new ones beside the same frozen base. ``pairs`` are those of
        ``regression``.

        For the other arguments see ``Stage``."""
        super().__init__(teacher, pool, config.updates, config, accelerator, "dmd2", start)
        self.settings, self.pairs = config, pairs or {}
        self.pair_weight = 0.0 if config.regression is None else config.regression.weight
        self.real = GuidedDenoiser(teacher.network, teacher.unconditional, teacher.guidance_scale)  # reflected later
        self.sampling = matching_sampling(config, self.schedule)
        self.grid = self.sampling.times(self.schedule)
        self.times = torch.tensor(self.grid, device=self.device)
        self.draws_per_update = 1 + config.critic_updates
        if start is not None and has_lora(start):
            copied = self.beside(fresh_adapters(start), self.unwrapped(self.net))
        else:
            copied = copy.deepcopy(teacher.network.net if critic_start is None else critic_start).float()
        network = type(teacher.network)(copied, self.schedule, teacher.network.prediction)
        latent_size = None if config.gan is None else (pool.mean.shape[-2], pool.mean.shape[-1])
        critic = Critic(network, latent_size, config.seed).train().requires_grad_(True)
        train_all_or_adapters(copied)
        self.critic_rate = config.critic_learning_rate or config.learning_rate
        self.critic, self.critic_optimizer = self.prepare(critic, self.critic_rate)
        self.source = self._source(config)
        self.ahead = Ahead(self._drawn, self.device)

    def _source(self, config: MatchingConfig) -> StateSource:
        """Return the source of the generator's input: backward simulation, or with DDIL the mixed source."""
        steps = [[step] for step in transitions(self.grid)]
        sampler = ConsistencySampler(self.context.steady(self.student), [*steps[:-1], []])
        draws = config.updates * self.draws_per_update
        if config.ddil is None:
            return BackwardSimulation(self.context, self.times, draws, sampler, self.net)
        finer = teacher_segments(self.schedule, config.timesteps, config.teacher_steps)
        actors = {
            TEACHER: SoleActor(Actor(self.context.steady(self.teacher), [*finer[:-1], []]), range(len(steps))),
            STUDENT: SoleActor(sampler, range(len(steps))),
        }
        collector = SeparateCollector(self.context, Labeler(), self.net, actors)
        diffuse = DiffuseFromNoise(self.schedule, self.times[0])
        return MixedSource(self.context, self.times, draws, Labeler(), diffuse, collector)

    def stateful(self) -> dict[str, Stateful]:
        critic = self.weights[self.critic]
        return super().stateful() | {
            "critic": critic,
            "critic_optimizer": self.moments(self.critic, self.critic_optimizer),
        }

    def _update(self, step: int) -> Logs:
        """Update the generator once, then its critic ``critic_updates`` times."""
        clipped = {
            name: ClippedFraction(self.teacher.reflection, len(self.schedule), f"clipped_{name}") for name in CLIPPED
        }
        first = step * self.draws_per_update
        states, aggregated = self.source.draw(first)
        self._let_critic_learn(False)
        with evaluating(self.critic):
            logs = self.descend(self._generator_losses(states, first, clipped), step)
        for fraction in clipped.values():
            logs |= fraction.logs()
        self._let_critic_learn(True)
        steps = list[Stepped]()
        for draw in range(first + 1, first + self.draws_per_update):
            states, _ = self.source.draw(draw)
            losses, rate = self._critic_losses(states, draw), self.rate(self.critic_rate, step)
            steps.append(self.step(self.critic, self.critic_optimizer, losses, rate))
        losses_of_critic, norms, skipped = (torch.stack(column) for column in zip(*steps, strict=True))
        logs["critic_loss"], logs["critic_gradient_norm"] = losses_of_critic.mean(), norms.mean()
        logs[SKIPPED] = torch.maximum(torch.as_tensor(logs[SKIPPED]), skipped.max())
        return logs | self.source.logs(aggregated)

    def _let_critic_learn(self, learns: bool) -> None:
        """Let the trained weights of the critic have gradients, or not. A frozen base never has any."""
        for weight in self.weights[self.critic].trained.values():
            weight.requires_grad_(learns)

    def generate(self, states: States, condition: Condition) -> Tensor:
        """Return the generator's x̂ from its input states, float32, with its gradient.

        Reflection would stop the gradient.
        """
        t = self.times[sent(states.transition, self.device)]
        with self.accelerator.autocast():
            return self.student(states.z, t, condition).float()

    def _drawn(self, draw: int) -> LossDraws:
        """Draw the random numbers of a batch's loss, the generator's or one of the critic's, on the host."""
        config, generator = self.settings, self.generator(draw, LOSS)
        of_generator = draw % self.draws_per_update == 0
        t, eps = self._times_and_noise(generator, config.matching_range if of_generator else None)
        x0 = row = judged_t = judged_eps = pair = torch.empty(0)
        if config.gan is not None:
            if not of_generator:
                x0, row = self.pool.draw(config.batch_size, generator, draw)
            judged_t, judged_eps = self._times_and_noise(generator)
        if of_generator and self.pair_weight:
            pair = torch.randint(len(self.pairs["row"]), (config.batch_size,), generator=generator)
        drawn = (t, eps, judged_t, judged_eps, x0)
        return LossDraws._make([*(pinned(part, self.device) for part in drawn), row, pair])

    def _times_and_noise(
        self, generator: torch.Generator, bounds: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw t [B] and ε [B, C, H, W] for a batch, on the host.

        The timestep of t is uniform in ``bounds`` (None: all timesteps); on a flow its time is shifted (``times_of``).
        """
        low, high = (0, len(self.schedule) - 1) if bounds is None else bounds
        t = torch.randint(low, high + 1, (self.config.batch_size,), generator=generator)
        return times_of(self.schedule, t), self.context.noise(len(t), generator)

    def _loss_draws(self, draw: int) -> LossDraws:
        """Return the random numbers of the loss of batch ``draw``, on the device but for rows of pool and pairs."""
        *parts, row, pair = self.ahead.take(draw, draw + 1 if draw + 1 < self.updates * self.draws_per_update else None)
        return LossDraws._make([*(sent(part, self.device) for part in parts), row, pair])

    def _generator_losses(self, states: States, draw: int, clipped: Mapping[str, ClippedFraction]) -> Iterator[Tensor]:
        """Yield the generator's loss for each part of a batch."""
        gan, drawn = self.settings.gan, self._loss_draws(draw)
        for rows, share in self.parts(len(states)):
            part = states.part(rows)
            condition = self.condition(part.row)
            x = self.generate(part, condition)
            gradient = self._gradient(x.detach(), drawn.eps[rows], drawn.t[rows], condition, clipped)
            loss = matching_loss(x, torch.nan_to_num(gradient))
            clipped["generator"].add(x, self.times[sent(part.transition, self.device)])
            if gan is not None and gan.generator_weight:
                critic = self.unwrapped(self.critic)  # it has no gradient here that processes would have to join
                _, logits, _ = self._judge(critic, x, condition, drawn.judged_t[rows], drawn.judged_eps[rows])
                loss = loss + gan.generator_weight * gan_generator_loss(logits)
            if self.pair_weight:
                loss = loss + self.pair_weight * pair_loss(self, self.pairs, drawn.pair[rows], self.grid[0])
            yield share * loss

    @torch.no_grad()
    def _gradient(
        self, x: Tensor, eps: Tensor, t: Tensor, condition: Condition, clipped: Mapping[str, ClippedFraction]
    ) -> Tensor:
        """Return the matching gradient at x [B, …]; for the other arguments see ``score_difference``."""
        gradients = list[Tensor]()
        with self.accelerator.autocast():
            for rows in slices(len(x), self.config.teacher_batch_size):
                states = x[rows], eps[rows], t[rows], condition.part(rows)
                reflection = self.teacher.reflection
                gradients.append(score_difference(self.real, self.fake, *states, reflection, clipped, self.finite))
        return torch.cat(gradients)

    def fake(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the critic's x̂, not reflected."""
        return self.teacher.network.x0(self.unwrapped(self.critic)(z, t, condition)[0], z, t)

    def _judge(
        self, critic: nn.Module, x: Tensor, condition: Condition, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call the critic on x noised by ε to t. Return its output, its logits, and the noised x."""
        z = self.schedule.add_noise(x, eps, t)
        with self.accelerator.autocast():
            output, logits = critic(z, t, condition)
        return output, x.new_empty(0) if logits is None else logits, z

    def _critic_losses(self, states: States, draw: int) -> Iterator[Tensor]:
        """Yield the critic's loss, of denoising and discrimination, for each part of a batch."""
        gan, drawn = self.settings.gan, self._loss_draws(draw)
        for rows, share in self.parts(len(states)):
            part, t, eps = states.part(rows), drawn.t[rows], drawn.eps[rows]
            condition = self.condition(part.row)
            with torch.no_grad(), evaluating(self.net):
                pieces = slices(len(part), self.config.teacher_batch_size)
                x = torch.cat([self.generate(part.part(p), condition.part(p)) for p in pieces])
            output, fake, z = self._judge(self.critic, x, condition, t, eps)
            loss = (output - self._expected(x, z, eps, t)).square().mean()
            if gan is not None:
                of_data = self.condition(drawn.row[rows])
                judged_at = drawn.judged_t[rows], drawn.judged_eps[rows]
                real = self._judge(self.critic, drawn.x0[rows], of_data, *judged_at)[1]
                loss = loss + gan.critic_weight * gan_critic_loss(real, fake)
            yield share * loss

    def _expected(self, x: Tensor, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the critic should predict: ε, v, x₀ or a flow's velocity ε − x₀."""
        known = {"epsilon": eps, "sample": x, "flow": eps - x}
        return known.get(self.teacher.network.prediction, to_v(x, z, *self.schedule.at(t, z)))


CLIPPED = ("generator", "real", "fake")
"""The networks whose clipped fraction is in the log."""


def score_difference(
    real: Denoiser,
    fake: Callable[[Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    condition: Condition,
    reflection: Reflection | None = None,
    clipped: Mapping[str, ClippedFraction] | None = None,
    finite: Finite[str] | None = None,
) -> Tensor:
    """Return the matching gradient at x noised by ε to t.

    Args:
        real: Returns the guided teacher's x̂.
        fake: Returns the critic's x̂.
        x: [B, C, H, W], what the generator draws.
        eps: [B, C, H, W], the noise.
        t: [B], the times.
        condition: B rows.
        reflection: Reflects both x̂.
        clipped: Measures the clipped fractions of both x̂, under "real" and "fake".
        finite: Remembers whether the real x̂ is finite. It ignores an x that is not finite itself.
    """
    z = real.schedule.add_noise(x, eps, t)
    x_real, x_fake = real(z, t, condition).float(), fake(z, t, condition).float()
    if finite is not None:
        finite.see("as the real score of what is generated", x_real.where(torch.isfinite(x).all(), 0.0))
    if clipped is not None:
        clipped["real"].add(x_real, t)
        clipped["fake"].add(x_fake, t)
    if reflection is not None:
        x_real, x_fake = reflection(x_real), reflection(x_fake)
    return matching_gradient(x, x_real, x_fake)


def teacher_segments(schedule: Schedule, timesteps: Sequence[int], steps: int) -> list[list[Transition]]:
    """Return the teacher's DDIM steps in each interval between a student's ``timesteps``, in equal parts.

    The last interval ends clean.
    """
    parts = steps // len(timesteps)
    return [
        transitions(between(schedule, timestep, end, parts), time_of(schedule, end))
        for timestep, end in zip(timesteps, [*timesteps[1:], CLEAN], strict=True)
    ]
