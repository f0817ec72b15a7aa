"""One optimiser step: masked student, heads, losses, AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kdhiera.config import ObjectiveConfig, TrainConfig
from kdhiera.errors import KdhieraError
from kdhiera.objective.losses import (
    RunningMean,
    cosine,
    draw_drops,
    loss,
    sample_losses,
    total,
)
from kdhiera.objective.targets import TargetSpec, normalise, statistics_from_state
from kdhiera.schedule import Schedule
from kdhiera.seeding import seeded
from kdhiera.student.base import Student, set_fused_attention
from kdhiera.student.decoder import Decoders
from kdhiera.student.drop_path import give_drop_paths, given
from kdhiera.student.heads import Heads
from kdhiera.training.batches import Batch
from kdhiera.training.jitter import jitter
from kdhiera.training.optim import build_optimizer
from kdhiera.training.ranks import ALONE, GradientMean, Ranks

Predictor = Heads | Decoders


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite; no weight was changed.

    Args:
        message: Which, of which rank where there are several.
        here: Whether this rank's clips may be the cause.
    """

    def __init__(self, message: str, *, here: bool) -> None:
        super().__init__(message)
        self.here = here


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured.

    Args:
        loss: Total.
        losses: By target name.
        grad_norm: Of all gradients together, before clipping.
        lr: Learning rate of the step.
        explained_variance: By target name; None unless asked for.
        cosine: By target name; None unless asked for.
    """

    loss: Tensor
    losses: Mapping[str, Tensor]
    grad_norm: Tensor
    lr: float
    explained_variance: Mapping[str, Tensor] | None
    cosine: Mapping[str, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What forward and losses of a step give.

    Args:
        value: Total.
        losses: By target name.
        predicted: What the heads gave, float32, by target name.
    """

    value: Tensor
    losses: dict[str, Tensor]
    predicted: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a part of a batch shows.

    Args:
        means: Over its tokens, by name.
        tokens: Their number by target name.
    """

    means: dict[str, Tensor]
    tokens: dict[str, int]


class Learner:
    """A student with what predicts from it, optimiser and running means.

    Args:
        student: Moved to the device.
        heads: What predicts the targets from its taps; moved to the device.
        targets: What trains the student.
        objective: Loss, normalisation, teacher dropping.
        config: Optimiser, seed, clipping, compilation.
        schedule: Learning rate of every step.
        device: Where it computes.
        dtype: `torch.float32`, or what autocast multiplies in.
        ranks: Who trains with it; every rank has a learner of the same weights.
    """

    def __init__(
        self,
        *,
        student: Student,
        heads: Predictor,
        targets: Sequence[TargetSpec],
        objective: ObjectiveConfig,
        config: TrainConfig,
        schedule: Schedule,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ) -> None:
        self.student = student.to(device).train()
        self.heads = heads.to(device).train()
        self.targets = targets
        self.objective = objective
        self.config = config
        self.schedule = schedule
        self.device = device
        self.dtype = dtype
        self.ranks = ranks
        self._paths = give_drop_paths(self.student)
        self.optimizer = build_optimizer((self.student, self.heads), config)
        self.means = {spec.name: RunningMean(spec.width, device) for spec in targets}
        fused = device.type != "cpu" or dtype is torch.float32
        set_fused_attention(student.backbone, fused)
        set_fused_attention(heads, fused)
        trained = (p for module in (self.student, self.heads) for p in module.parameters())
        self.gradients = GradientMean([p for p in trained if p.requires_grad], ranks)
        # a graph for every mask ratio: with sizes left open inductor fails on these shapes
        self._forward = torch.compile(self._run, dynamic=False) if config.compile else self._run

    def step(self, batch: Batch, *, measure: bool) -> StepResult:
        """Learn from one batch on the device, or from this rank's slice of it.

        All randomness is a function of the seed, the step's number, and the sample's (teacher
        dropping, jitter) or its place in the whole batch (drop-path). Losses, gradients and
        what is measured are those of the whole batch, at every rank.

        Args:
            batch: On the device.
            measure: Whether explained variance and cosine are wanted.

        Raises:
            NonFiniteError: Before any weight changes, naming teacher and layer; at all ranks.
            KdhieraError: If `train.compile` is set and this machine cannot compile.
        """
        number = batch.position.step
        parts = batch.parts(self.config.accumulate)
        factors = self._draw_paths(number)
        self.optimizer.zero_grad(set_to_none=True)
        seen = []
        for part in parts:
            if part is parts[-1]:
                self.gradients.expect()
            seen.append(self._learn(part, factors, share=1 / len(parts), measure=measure))
        self.gradients.finish()
        mean = self._mean(seen)
        if not bool(torch.isfinite(mean["loss"])):
            self._explain(parts, seen)

        names = [spec.name for spec in self.targets]
        for name in names:
            tokens = seen[0].tokens[name] * len(parts) * self.ranks.size
            self.means[name].update_by(mean[f"target/{name}"], tokens)
        lr = self.schedule.lr(number)
        norm = self._descend(lr)
        return StepResult(
            loss=mean["loss"],
            losses={n: mean[f"loss/{n}"] for n in names},
            grad_norm=norm,
            lr=lr,
            explained_variance={
                n: 1 - mean[f"predicted/{n}"] / mean[f"constant/{n}"] for n in names
            }
            if measure
            else None,
            cosine={n: mean[f"cosine/{n}"] for n in names} if measure else None,
        )

    def _draw_paths(self, number: int) -> list[Tensor]:
        """What drop-path multiplies the branches of every clip of the step's batch by."""
        with seeded("step", self.config.seed, number, device=self.device):
            return [path.draw(self.config.batch_size, self.device) for path in self._paths]

    def _learn(
        self, part: Batch, factors: Sequence[Tensor], *, share: float, measure: bool
    ) -> _Seen:
        """Add a part's gradients, and measure it."""
        wanted = self._wanted(part)
        clips = slice(part.place, part.place + len(part.samples))
        with (
            given(self._paths, [each[clips] for each in factors]),
            explain_compiler(self.config.compile),  # the backward pass is compiled when used
        ):
            outcome = self._forward(
                self._jittered(part), part.units, part.target_units, wanted, self._drops(part)
            )
            (outcome.value * share).backward()  # type: ignore[no-untyped-call]
        seen = {"loss": outcome.value.detach()}
        kind, beta, predicted = self.objective.loss, self.objective.beta, outcome.predicted
        with torch.no_grad():
            for name, target in wanted.items():
                seen[f"loss/{name}"] = outcome.losses[name].detach()
                seen[f"target/{name}"] = target.flatten(0, -2).mean(0)
                if measure:
                    mean = self.means[name]
                    seen[f"predicted/{name}"] = loss(predicted[name], target, kind, beta=beta)
                    seen[f"constant/{name}"] = mean.constant_loss(target, kind, beta=beta)
                    seen[f"cosine/{name}"] = cosine(predicted[name], target)
        tokens = {name: target[..., 0].numel() for name, target in wanted.items()}
        return _Seen(means=seen, tokens=tokens)

    def _mean(self, seen: Sequence[_Seen]) -> dict[str, Tensor]:
        """Over parts and ranks, which all hold as many tokens."""
        flat = torch.stack([torch.cat([v.flatten() for v in s.means.values()]) for s in seen])
        whole, first = self.ranks.mean(flat.mean(0)), seen[0].means
        pieces = torch.split(whole, [value.numel() for value in first.values()])
        named = zip(first.items(), pieces, strict=True)
        return {name: piece.view_as(value) for (name, value), piece in named}

    def _explain(self, parts: Sequence[Batch], seen: Sequence[_Seen]) -> NoReturn:
        """Say whose loss is not finite, to all ranks alike."""
        flaw = None
        for part, each in zip(parts, seen, strict=True):
            if not bool(torch.isfinite(each.means["loss"])):
                losses = {spec.name: each.means[f"loss/{spec.name}"] for spec in self.targets}
                flaw = flaw or _explain_loss(losses, self._wanted(part))
        found = self.ranks.gather(flaw)
        alone = self.ranks.size == 1
        told = [t if alone else f"rank {r}: {t}" for r, t in enumerate(found) if t is not None]
        raise NonFiniteError("; ".join(told), here=flaw is not None)

    def state_dict(self) -> dict[str, Any]:
        """All that a later step depends on."""
        return {
            "student": self.student.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "means": {name: mean.state_dict() for name, mean in self.means.items()},
            "statistics": {
                spec.name: {"column": spec.column, **spec.statistics.state_dict()}
                for spec in self.targets
                if spec.statistics is not None
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the statistics that it was taken with."""
        self.student.load_state_dict(state["student"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, mean in self.means.items():
            mean.load_state_dict(state["means"][name])
        self.targets = with_statistics(self.targets, state["statistics"], self.device)

    def _run(
        self,
        pixels: Tensor,
        units: Tensor,
        target_units: Tensor,
        wanted: Mapping[str, Tensor],
        dropped: Mapping[str, Tensor] | None,
    ) -> _Outcome:
        """Student, heads and losses: what `train.compile` makes one graph of."""
        low = self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            raw = self.heads(self.student(pixels, units), units, target_units)
        predicted = {name: prediction.float() for name, prediction in raw.items()}
        kind, beta = self.objective.loss, self.objective.beta
        if dropped is None:
            losses = {n: loss(predicted[n], wanted[n], kind, beta=beta) for n in wanted}
            return _Outcome(value=total(losses, self.targets), losses=losses, predicted=predicted)
        each = {n: sample_losses(predicted[n], wanted[n], kind, beta=beta) for n in wanted}
        return _Outcome(
            value=total(each, self.targets, dropped),
            losses={n: values.mean() for n, values in each.items()},
            predicted=predicted,
        )

    def _jittered(self, batch: Batch) -> Tensor:
        if not self.config.jitter:
            return batch.pixels
        return jitter(
            batch.pixels,
            batch.samples.tolist(),
            self.config.jitter,
            seed=self.config.seed,
            step=batch.position.step,
        )

    def _drops(self, batch: Batch) -> dict[str, Tensor] | None:
        """Which teachers each sample may do without; None where none ever does."""
        if not self.objective.teacher_drop:
            return None
        drawn = draw_drops(
            {spec.teacher for spec in self.targets},
            batch.samples.tolist(),
            self.objective.teacher_drop,
            seed=self.config.seed,
            step=batch.position.step,
        )
        return {teacher: flags.to(self.device) for teacher, flags in drawn.items()}

    @torch.no_grad()
    def _wanted(self, batch: Batch) -> dict[str, Tensor]:
        return {
            spec.name: normalise(
                spec.decode(batch.columns[spec.column], batch.target_units),
                self.objective.normalise,
                spec.statistics,
            )
            for spec in self.targets
        }

    def _descend(self, lr: float) -> Tensor:
        """Clip the gradients and change the weights; the same at all ranks."""
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if not bool(torch.isfinite(norm)):
            bad = [
                name
                for module in (self.student, self.heads)
                for name, parameter in module.named_parameters()
                if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
            ]
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the gradient of {', '.join(bad[:3])} is not finite", here=True)
        if self.config.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return norm


def _explained(mean: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {n: 1 - mean[f"predicted/{n}"] / mean[f"constant/{n}"] for n in names}


def with_statistics(
    targets: Sequence[TargetSpec], frozen: Mapping[str, Any], device: torch.device
) -> list[TargetSpec]:
    """Targets as they were when a checkpoint was taken.

    Args:
        targets: As the cache of now has them.
        frozen: What the checkpoint keeps of their statistics, by target name.
        device: Where the statistics go.
    """
    return [
        replace(spec, statistics=statistics_from_state(frozen[spec.name], device))
        if spec.name in frozen
        else spec
        for spec in targets
    ]


@contextmanager
def explain_compiler(compiled: bool) -> Iterator[None]:
    """One sentence where torch has a page: there is no working compiler on this machine.

    Args:
        compiled: Whether anything is compiled within; else nothing is done.

    Raises:
        KdhieraError: If something within cannot be compiled.
    """
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and seldom needed

    try:
        yield
    except TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise KdhieraError(
            f"train.compile: torch cannot compile the step here ({reason[:200]}): set "
            "train.compile=false, or install what is missing (a C++ compiler for a CPU, Triton "
            "for CUDA)"
        ) from error


def _explain_loss(losses: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Which teacher and layer, and whose fault."""
    flaws = []
    for name, value in losses.items():
        if not bool(torch.isfinite(value)):
            teacher, _, layer = name.partition("/")
            stored = bool(torch.isfinite(wanted[name]).all())
            cause = "the student's prediction" if stored else "the cached target"
            flaws.append(f"teacher {teacher}, layer {layer} ({cause} is not finite)")
    return "the loss is not finite: " + ("; ".join(flaws) or "their sum overflows")
