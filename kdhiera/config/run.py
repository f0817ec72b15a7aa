"""A whole run: all sections, and what they must agree on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import Field, model_validator

from kdhiera.config.cache import CacheConfig, ExtractConfig, MaskPlanConfig, RayConfig
from kdhiera.config.evaluation import EvaluateConfig
from kdhiera.config.section import LocalFolder, Name, Section
from kdhiera.config.teachers import ScoresConfig, TeacherConfig
from kdhiera.config.training import ObjectiveConfig, StudentConfig, TrainConfig
from kdhiera.config.videos import ClipConfig, DataConfig, DecodeConfig, ViewsConfig
from kdhiera.errors import UsageError
from kdhiera.masking import MaskPlan, MaskSchedule, MaskSpec, PlannedMasks, num_visible
from kdhiera.views import ViewPolicy


class RunConfig(Section):
    """A whole run.

    Attributes:
        name: Of the run, in reports and on its model card.
        run_dir: Folder of the run: checkpoints, metrics, export, results. The cache has one of its
            own, `cache.dir`.
    """

    name: Name
    run_dir: LocalFolder
    data: DataConfig
    clip: ClipConfig = ClipConfig()
    views: ViewsConfig = ViewsConfig()
    decode: DecodeConfig = DecodeConfig()
    teachers: Mapping[Name, TeacherConfig] = Field(min_length=1)
    scores: ScoresConfig
    masks: MaskPlanConfig = MaskPlanConfig()
    cache: CacheConfig
    extract: ExtractConfig = ExtractConfig()
    ray: RayConfig = RayConfig()
    student: StudentConfig = StudentConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        """All that does not go together, a line each; what needs right names only after these."""
        if problems := [*self._clip_problems(), *self._name_problems()]:
            raise ValueError("\n".join(problems))
        if problems := [*self._layer_problems(), *self._objective_problems()]:
            raise ValueError("\n".join(problems))
        return self

    def _clip_problems(self) -> Iterator[str]:
        try:
            _ = self.clip.grid
        except UsageError as error:
            yield str(error)

    def _name_problems(self) -> Iterator[str]:
        """Teachers that are named and not there, layers out of order."""
        named: list[tuple[str, Iterable[str]]] = [("scores.teacher", (self.scores.teacher,))]
        named.append(("objective.teachers", self.objective.teachers or ()))
        named.append(("objective.layers", self.objective.layers or ()))
        named.append(("objective.layer_weights", self.objective.layer_weights or ()))
        named.append(("student.taps", self.student.taps or ()))
        for key, names in named:
            for name in names:
                if name not in self.teachers:
                    yield (
                        f"{key} names `{name}`, but the teachers are: {', '.join(self.teachers)}"
                    )
        for name, teacher in self.teachers.items():
            yield from _order_problems(f"teachers.{name}.layers", teacher.layers)

    def _layer_problems(self) -> Iterator[str]:
        """Layers and weights that leave nothing to learn, or that no teacher has."""
        if not any(self.objective_layers.values()) or not all(self.objective_layers.values()):
            yield "objective.teachers and objective.layers leave a teacher no layer"
        for name, layers in self.objective_layers.items():
            known = self.teachers[name].layers
            if layers != tuple(layer for layer in known if layer in layers):
                yield (
                    f"objective.layers.{name} must name some of teachers.{name}.layers, "
                    f"{list(known)}, in that order, got {list(layers)}"
                )
        if not any(self.teachers[name].weight for name in self.objective_layers):
            yield (
                "all teachers of the objective have weight 0: nothing would be learnt; give one a "
                "teachers.NAME.weight above 0"
            )
        for name, weights in (self.objective.layer_weights or {}).items():
            trained = self.objective_layers.get(name, ())
            unknown = set(weights) - set(trained)
            if unknown:
                yield (
                    f"objective.layer_weights.{name} weighs {sorted(unknown)}, but the layers of "
                    f"{name} that train the student are {list(trained)}"
                )
            elif not sum(weights.get(layer, 1.0) for layer in trained):
                yield (
                    f"objective.layer_weights.{name} leaves no layer a weight: leave {name} out of "
                    "objective.teachers instead"
                )

    def _objective_problems(self) -> Iterator[str]:
        """What the masked objective cannot do without, and what it has no use for."""
        if self.objective.kind != "masked":
            return
        if self.student.mix:
            yield (
                "student.mix is for the heads of objective.kind: visible; the decoders of masked "
                "read all taps of their teacher anyway: leave it out"
            )
        per_slot = self.clip.grid.units_per_slot
        for spec in self.mask_schedule.phases:
            if num_visible(spec.ratio, per_slot) == per_slot:
                yield (
                    f"objective.kind: masked predicts hidden units, and a ratio of {spec.ratio:g} "
                    f"hides none of the {per_slot} in a slot: choose a higher objective.ratio"
                )

    @property
    def view_policy(self) -> ViewPolicy:
        """What the cached views are drawn from."""
        v, c = self.views, self.clip
        return ViewPolicy(
            num_frames=c.num_frames,
            height=c.height,
            width=c.width,
            frames=v.frames,
            frame_stride=v.frame_stride,
            crop=v.crop,
            crop_scale=v.crop_scale,
            crop_ratio=v.crop_ratio,
            flip=v.flip,
            allow_short=v.allow_short,
            seed=v.seed,
        )

    @property
    def mask_plan(self) -> MaskPlan:
        """What the cache keeps."""
        return self.masks.plan

    @property
    def mask_schedule(self) -> MaskSchedule:
        """What training draws."""
        o, m = self.objective, self.masks
        return MaskSchedule(
            phases=tuple(
                MaskSpec(strategy=o.strategy, scope=m.scope, ratio=r, seed=m.seed)
                for r in o.ratio or (self._planned.ratio,)
            ),
            draws=o.draws or self._planned.draws,
            predicts_hidden=o.kind == "masked",
        )

    def plan_gaps(self) -> tuple[str, ...]:
        """What the objective asks for that `masks` does not plan to keep."""
        per_slot = self.clip.grid.units_per_slot
        return self.mask_plan.lacks_schedule(self.mask_schedule, units_per_slot=per_slot)

    @property
    def _planned(self) -> PlannedMasks:
        """What `masks` plans for the objective's strategy; its own defaults if nothing."""
        m, strategy = self.masks, self.objective.strategy
        planned = [e for e in self.mask_plan.entries if e.strategy is strategy]
        default = PlannedMasks(strategy=strategy, ratio=m.ratio, draws=m.draws)
        return min(planned, key=lambda e: e.ratio) if planned else default

    @property
    def objective_layers(self) -> dict[str, tuple[str, ...]]:
        """Layers that train the student, by teacher, in config order."""
        chosen = self.objective.teachers or tuple(self.teachers)
        layers = self.objective.layers or {}
        return {name: tuple(layers.get(name, self.teachers[name].layers)) for name in chosen}


def _order_problems(key: str, layers: Sequence[str]) -> Iterator[str]:
    """Layers are read at taps in their order, so the order must be that of the depth."""
    for layer in layers:
        if layer.isdecimal() and layer != str(int(layer)):
            yield f"{key} names {layer!r}: write {int(layer)}"
    depths = [
        float("inf") if layer == "norm" else int(layer)
        for layer in layers
        if layer == "norm" or layer.isdecimal()
    ]
    if len(set(layers)) < len(layers) or depths != sorted(depths):
        yield (
            f"{key} must ascend without repeats, `norm` last (deeper layers are read at deeper "
            f"taps), got {list(layers)}"
        )
