"""Every setting of a run: one YAML file, dotted overrides after it, typed once here.

`load(path, overrides)` is the only way in. Models are frozen and refuse unknown keys,
with the nearest valid key in the message. Paths stay as written, relative to the folder
the command runs in.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kdhiera.addresses import redact, refuse_secrets
from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.masking import (
    MaskPlan,
    MaskSchedule,
    MaskSpec,
    PlannedMasks,
    Scope,
    Strategy,
    num_visible,
)
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy

Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["auto", "fp32", "bf16"]
Colour = tuple[float, float, float]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,40}$")]


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Where the videos are.

    Attributes:
        shards: WebDataset tar shards: paths or `s3://` addresses, with globs and braces.
        video_extensions: Members with these extensions are videos.
        max_bad_fraction: Extraction stops when more than this share of the rows (a sample in
            a view) is bad, 20 rows seen at least.
    """

    shards: tuple[str, ...]
    video_extensions: tuple[str, ...] = ("mp4", "avi", "mkv", "webm", "mov", "mpg", "mpeg", "m4v")
    max_bad_fraction: Fraction = 0.1

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class ClipConfig(Section):
    """Size of a clip in frames and pixels; see `kdhiera.grid`."""

    num_frames: int = 16
    height: int = 224
    width: int = 224

    @property
    def grid(self) -> Grid:
        """The clip's grid; raises `UsageError` if the geometry is impossible."""
        return Grid(num_frames=self.num_frames, height=self.height, width=self.width)


class ViewsConfig(Section):
    """How views are drawn; `num` views of every video are cached.

    Attributes:
        num: Views of every video; view v is shown in epochs v, v + num, ...
        frames: `dense` (K400-like) or `uniform` (SSv2-like).
        frame_stride: Frames between sampled frames, for `dense`.
        crop: `random_resized` or `center`.
        crop_scale: Range of the crop's share of the frame's area.
        crop_ratio: Range of its aspect ratio, relative to the clip's.
        flip: Mirror every second view (leave off where left and right mean something).
        allow_short: Repeat frames in videos shorter than a clip.
        seed: View seed.
    """

    num: int = Field(2, ge=1, le=1000)
    frames: FramePolicy = FramePolicy.DENSE
    frame_stride: int = Field(4, ge=1)
    crop: CropPolicy = CropPolicy.RANDOM_RESIZED
    crop_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: bool = False
    allow_short: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> ViewsConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale must be 0 < low <= high, got {list(self.crop_scale)}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < low <= high, got {list(self.crop_ratio)}")
        return self


class DecodeConfig(Section):
    """Limits and backend of the decoding children; see `docs/decoding.md`.

    Attributes:
        backend: `auto` is the decoder measured best, PyAV; `decord` where it is installed.
        num_children: Decoding processes an actor keeps; 0 means one a CPU of the actor.
        deadline_seconds: A clip that takes longer becomes `decode_timeout`.
        max_frame_pixels: Larger frames become `decode_limit`.
        max_duration_seconds: Longer videos become `decode_limit`.
        max_video_bytes: Larger members become `decode_limit`.
        max_memory_bytes: Address space of a child.
        clips_per_child: A child is replaced after this many clips.
    """

    backend: Literal["auto", "decord", "pyav"] = "auto"
    num_children: int = Field(0, ge=0, le=256)
    deadline_seconds: float = Field(20.0, gt=0)
    max_frame_pixels: int = Field(8192 * 4320, gt=0)
    max_duration_seconds: float = Field(4 * 3600.0, gt=0)
    max_video_bytes: int = Field(1 << 30, gt=0)
    max_memory_bytes: int = Field(4 << 30, gt=0)
    clips_per_child: int = Field(1000, ge=1)


class TeacherConfig(Section):
    """One frozen teacher; see `docs/teachers.md`.

    Attributes:
        kind: `timm` (an image ViT), `transformers` (VideoMAE, V-JEPA 2, Dinov2, ViT),
            `pixels` or `hog` (targets without weights), `module` (a factory of the user's own).
        model: timm model name, for `timm`; a hub repository or an architecture
            (`videomae`), for `transformers`.
        factory: `package.module:function`, for `module`.
        options: Passed to the factory, for `module`; settings of the architecture that the
            weights' own do not give, for `timm` and `transformers`.
        weights: A safetensors or `.pth` file, or a folder; None takes the hub's.
        layers: Blocks whose output is a target (1-based count of blocks done), or `norm`;
            `patch` for `pixels` and `hog`.
        weight: Share of this teacher's loss in the total.
        precision: Compute precision; `auto` is bf16 where the hardware multiplies it
            (`pixels` and `hog` are always fp32).
        compile: Compile the blocks with torch: `false`, `true`, or a mode of
            `torch.compile` (those with CUDA graphs reuse the memory of results).
        mean: Colour means to normalise with; None takes the model's own.
        std: Their standard deviations.
    """

    kind: Literal["timm", "transformers", "pixels", "hog", "module"]
    model: str | None = None
    factory: str | None = None
    options: Mapping[str, Any] = {}
    weights: str | None = None
    layers: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(1.0, ge=0)
    precision: Precision = "auto"
    compile: bool | Literal["default", "max-autotune-no-cudagraphs"] = False
    mean: Colour | None = None
    std: Colour | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_weights(cls, value: object) -> object:
        """`pixels` and `hog` have one layer and one precision."""
        if not isinstance(value, Mapping) or value.get("kind") not in ("pixels", "hog"):
            return value
        given = {k: v for k, v in value.items() if (k, v) != ("precision", "auto")}
        return {"layers": ("patch",), "precision": "fp32", **given}

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_names(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return tuple(str(v) for v in value)
        return value

    @model_validator(mode="after")
    def _complete(self) -> TeacherConfig:
        needed = {"timm": ("model",), "transformers": ("model", "weights"), "module": ("factory",)}
        wanted = needed.get(self.kind, ())
        if wanted and all(getattr(self, name) is None for name in wanted):
            names = " or ".join(f"`{name}`" for name in wanted)
            raise ValueError(f"a teacher of kind {self.kind} needs {names}")
        fields = type(self).model_fields
        for name in sorted({n for names in _TEACHER_SETTINGS.values() for n in names}):
            unused = name not in _TEACHER_SETTINGS[self.kind]
            if unused and getattr(self, name) != fields[name].default:
                raise ValueError(f"a teacher of kind {self.kind} has no use for `{name}`")
        if self.kind in ("pixels", "hog") and self.precision != "fp32":
            raise ValueError(f"a teacher of kind {self.kind} always computes in fp32")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        return self


_OF_MODELS = frozenset({"model", "options", "weights", "compile", "mean", "std"})
_TEACHER_SETTINGS: Mapping[str, frozenset[str]] = {
    "timm": _OF_MODELS,
    "transformers": _OF_MODELS,
    "module": frozenset({"factory", "options", "weights"}),
    "pixels": frozenset(),
    "hog": frozenset(),
}


class ScoresConfig(Section):
    """Where the scores come from that masks are drawn from.

    Attributes:
        teacher: Name of the teacher.
        source: `cls_attention`: attention of the class token to the patches (UMT);
            `received_attention`: attention that a patch receives from all patches, for
            teachers without a trained class token; `feature_norm`: length of its feature;
            `uniform`: every unit alike.
        layer: Block whose attention or output is read, or `norm` for `feature_norm`; None
            means the last block.
        heads: Attention heads that are averaged, from 0; None means all.
    """

    teacher: str
    source: Literal["cls_attention", "received_attention", "feature_norm", "uniform"] = (
        "cls_attention"
    )
    layer: str | None = None
    heads: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)

    @field_validator("layer", mode="before")
    @classmethod
    def _layer_name(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("heads", mode="after")
    @classmethod
    def _sorted(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _used(self) -> ScoresConfig:
        if self.heads is not None and not self.source.endswith("attention"):
            raise ValueError(f"scores.heads has no effect on source {self.source}: leave it out")
        if self.layer is not None and self.source == "uniform":
            raise ValueError("scores.layer has no effect on source uniform: leave it out")
        return self


class PlannedMasksConfig(Section):
    """Masks of one strategy that training may use.

    Attributes:
        strategy: Which units are preferred.
        ratio: Lowest mask ratio; None takes `masks.ratio`.
        draws: Masks a view; None takes `masks.draws`.
    """

    strategy: Strategy
    ratio: Ratio | None = None
    draws: int | None = Field(None, ge=1, le=1000)


class MaskPlanConfig(Section):
    """What training may show: the cache keeps the union of it.

    Attributes:
        keep: `plan` keeps what the strategies can show; `all` keeps every unit.
        strategies: Strategies that training may use: names, or mappings such as
            `{strategy: tube, ratio: 0.9, draws: 1}`.
        ratio: Lowest mask ratio that training may use, where a strategy names none.
        draws: Masks a view, where a strategy names none.
        scope: `slot` shows the same number of units in every slot; `clip` does not.
        seed: Mask seed.
    """

    keep: Literal["plan", "all"] = "plan"
    strategies: tuple[PlannedMasksConfig, ...] = Field(
        (PlannedMasksConfig(strategy=Strategy.ATTENTION),), min_length=1
    )
    ratio: Ratio = 0.8
    draws: int = Field(2, ge=1, le=1000)
    scope: Scope = Scope.SLOT
    seed: int = 0

    @field_validator("strategies", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        entries = [value] if isinstance(value, str | dict) else value
        if not isinstance(entries, list | tuple):
            return value
        return tuple({"strategy": e} if isinstance(e, str) else e for e in entries)

    @property
    def plan(self) -> MaskPlan:
        """What is kept, entries that another one contains left out."""
        entries = tuple(
            PlannedMasks(
                strategy=e.strategy,
                ratio=self.ratio if e.ratio is None else e.ratio,
                draws=self.draws if e.draws is None else e.draws,
            )
            for e in self.strategies
        )
        return MaskPlan(
            entries=entries, scope=self.scope, seed=self.seed, keep_all=self.keep == "all"
        ).canonical()


class CacheConfig(Section):
    """The teacher cache.

    Attributes:
        dir: Folder of the cache, or `s3://bucket/prefix`.
        encoding: How features are stored; see `docs/encodings.md`.
        compact_error: Share of a row's energy about the channel means that `compact` may lose.
        mode: `cached` trains from the cache, `live` runs decoder and teachers in the loop.
        allow_partial: Train although some shards, views or columns are not there yet.
    """

    dir: str
    encoding: Literal["fp32", "fp16", "bf16", "int8", "compact"] = "int8"
    compact_error: float = Field(0.017, ge=0.002, le=0.5)
    mode: Literal["cached", "live"] = "cached"
    allow_partial: bool = False


class ExtractConfig(Section):
    """How extraction runs; none of this changes what is stored.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        batch_size: Clips in one teacher pass; halved when memory runs out.
        num_actors: Ray actors; 0 means one a GPU, or one for every `cpus_per_actor`.
        cpus_per_actor: CPUs of an actor.
        max_attempts: Tries at a shard before it is given up.
        stall_seconds: An actor silent for longer is killed and replaced.
        lease_seconds: An attempt older than this may not publish any more.
        calibration_rows: Clips that the basis of a `compact` column is made from.
        probe_rows: Stored rows that are made again and compared before going on under other
            library versions; 0 goes on without.
    """

    device: str = "auto"
    batch_size: int = Field(16, ge=1)
    num_actors: int = Field(0, ge=0)
    cpus_per_actor: int = Field(1, ge=1)
    max_attempts: int = Field(3, ge=1)
    stall_seconds: float = Field(600.0, gt=0)
    lease_seconds: float = Field(24 * 3600.0, gt=0)
    calibration_rows: int = Field(64, ge=1)
    probe_rows: int = Field(4, ge=0)


class RayConfig(Section):
    """The Ray cluster.

    Attributes:
        enabled: Off runs the same code in this process.
        address: None starts Ray on this machine; `auto` or an address joins a cluster.
    """

    enabled: bool = True
    address: str | None = None


class DecoderConfig(Section):
    """Decoders of `objective.kind: masked`, one a teacher; the defaults are MVD's.

    Attributes:
        depth: Transformer blocks.
        width: Channels, a multiple of 64 (the width of an attention head); None takes the
            student's.
    """

    depth: int = Field(2, ge=1)
    width: int | None = Field(None, ge=64, multiple_of=64)


class StudentConfig(Section):
    """The masked 3-D Hiera.

    Attributes:
        size: Named size; see `kdhiera.student.hiera`.
        drop_path: Rate of the last block, rising linearly from 0.
        taps: Where heads read, by teacher, one for every layer in order: `stageN.mid`, `stageN.end`
            or `block:N`; None spreads a teacher's layers over backbone stages 3 and 4.
        head: `linear`, or `mlp` with one hidden layer.
        mix: Every head reads a learned mix of all taps that are named (MaskAlign).
        decoder: What `objective.kind: masked` predicts hidden units with.
        init: Weights to start from: an official Hiera video checkpoint, or an export; None
            starts from the seed.
    """

    size: Literal["nano", "tiny", "small", "base", "base_plus", "large", "huge"] = "base"
    drop_path: Fraction = 0.1
    taps: Mapping[str, tuple[str, ...]] | None = None
    head: Literal["linear", "mlp"] = "linear"
    mix: bool = False
    decoder: DecoderConfig = DecoderConfig()
    init: str | None = None

    @field_validator("taps")
    @classmethod
    def _named(cls, value: Mapping[str, tuple[str, ...]] | None) -> object:
        empty = [name for name, taps in (value or {}).items() if not taps]
        if empty:
            raise ValueError(f"taps of {empty[0]}: name one for every layer, or leave it out")
        return value


class ObjectiveConfig(Section):
    """What the student is asked for, and under which masks.

    Attributes:
        kind: `visible` predicts the units that a mask shows; `masked` those that it hides, with
            a small decoder for every teacher (needs `masks.keep: all`).
        teachers: Teachers that train the student; None means all.
        layers: Layers by teacher; None means all that are cached.
        normalise: `layer_norm`, `standardize` and `phi_s` (statistics of the cache), `l2`, `none`.
        calibration_rows: Clips whose kept units `phi_s` takes its covariance from.
        loss: `smooth_l1`, `mse`, `cosine` or `cosine_smooth_l1` (half of each).
        beta: Where smooth L1 turns linear.
        layer_weights: A layer's share of its teacher's loss, by teacher and layer; 1 where none is
            named. Only proportions count: the teacher's own share is `teachers.NAME.weight`.
        teacher_drop: Chance that a sample does without a teacher other than the one it is worst
            at (UNIC); 0 keeps all.
        strategy: Mask strategy; must be planned in the cache.
        ratio: Mask ratio, or several for equal shares of the steps, one after the other; None
            takes what `masks` plans for the strategy.
        draws: Masks a view; None takes what `masks` plans for the strategy.
    """

    kind: Literal["visible", "masked"] = "visible"
    teachers: tuple[str, ...] | None = None
    layers: Mapping[str, tuple[str, ...]] | None = None
    normalise: Literal["layer_norm", "standardize", "phi_s", "l2", "none"] = "layer_norm"
    calibration_rows: int = Field(256, ge=2)
    loss: Literal["smooth_l1", "mse", "cosine", "cosine_smooth_l1"] = "smooth_l1"
    beta: float = Field(1.0, gt=0)
    layer_weights: Mapping[str, Mapping[str, Annotated[float, Field(ge=0)]]] | None = None
    teacher_drop: Fraction = 0.0
    strategy: Strategy = Strategy.ATTENTION
    ratio: tuple[Ratio, ...] | None = None
    draws: int | None = Field(None, ge=1, le=1000)

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_names(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {
            k: tuple(str(x) for x in v) if isinstance(v, list | tuple) else v
            for k, v in value.items()
        }

    @field_validator("ratio", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if value in ([], ()):
            raise ValueError("name at least one ratio")
        return (value,) if isinstance(value, int | float) else value

    @field_validator("layer_weights", mode="before")
    @classmethod
    def _weight_names(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {
            k: {str(layer): weight for layer, weight in v.items()} if isinstance(v, Mapping) else v
            for k, v in value.items()
        }


class TrainConfig(Section):
    """Optimisation.

    Attributes:
        epochs: Passes over the samples.
        max_steps: Stop after this many steps; None means the epochs decide.
        batch_size: Clips of an optimiser step.
        lr: Learning rate for 256 clips a step; scaled linearly with the batch size.
        min_lr: Where the cosine ends (not scaled).
        warmup_epochs: Linear warm-up.
        betas: AdamW's.
        weight_decay: Not on norms, biases and position embeddings.
        clip_grad: Largest gradient norm; None means no clipping.
        jitter: Brightness, contrast and saturation of the student's clips change by factors of
            up to 1 - jitter and 1 + jitter; the teachers' do not. 0 changes nothing.
        precision: Autocast; `auto` is bf16 where the hardware multiplies it.
        device: `auto`, `cpu` or `cuda`.
        seed: Decides initial weights, sample order, drop-path and jitter.
        log_every: Steps between metric lines.
        save_every: Epochs between checkpoints.
        keep_last: Checkpoints kept.
        prefetch: Batches read ahead.
        num_threads: CPU threads of the loop; 0 leaves torch's own choice.
        compile: Compile forward and losses with `torch.compile`, once for every ratio (torch
            compiles eight, and runs those after them as they are).
        grad_checkpointing: Compute the student's blocks again in the backward pass instead of
            keeping what they computed: less memory, more time, the same losses.
    """

    epochs: int = Field(400, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=1)
    lr: float = Field(1.5e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(40.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float | None = Field(None, gt=0)
    jitter: Fraction = 0.0
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    log_every: int = Field(10, ge=1)
    save_every: int = Field(1, ge=1)
    keep_last: int = Field(2, ge=1)
    prefetch: int = Field(3, ge=1)
    num_threads: int = Field(0, ge=0)
    compile: bool = False
    grad_checkpointing: bool = False


class EvaluateConfig(Section):
    """Frozen evaluation on labelled shards.

    Attributes:
        train: Labelled shards that neighbours and probes learn from.
        validation: Labelled shards the probes' regularisation is chosen on.
        test: Labelled shards that are reported.
        labels: Label names in the samples' JSON; empty takes all that are found.
        groups: Labels that name what clips share (an object, a background): intervals are
            resampled over these; empty treats every clip as independent.
        frame_stride: Frames between sampled frames.
        neighbours: k of k-NN.
        temperature: Of the weighted k-NN vote.
        batch_size: Clips in one forward.
        resamples: Of the bootstrap.
        seed: Of the random-init student and the bootstrap.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    frame_stride: int = Field(4, ge=1)
    neighbours: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    batch_size: int = Field(32, ge=1)
    resamples: int = Field(2000, ge=100)
    seed: int = 0

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class RunConfig(Section):
    """A whole run; the sections are documented at their classes."""

    name: Name
    run_dir: str
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
        _ = self.clip.grid
        named: list[tuple[str, Iterable[str]]] = [("scores.teacher", (self.scores.teacher,))]
        named.append(("objective.teachers", self.objective.teachers or ()))
        named.append(("objective.layers", self.objective.layers or ()))
        named.append(("objective.layer_weights", self.objective.layer_weights or ()))
        named.append(("student.taps", self.student.taps or ()))
        for key, names in named:
            for name in names:
                if name not in self.teachers:
                    raise ValueError(
                        f"{key} names `{name}`, but the teachers are: {', '.join(self.teachers)}"
                    )
        for name, teacher in self.teachers.items():
            _check_order(f"teachers.{name}.layers", teacher.layers)
        if not any(self.objective_layers.values()) or not all(self.objective_layers.values()):
            raise ValueError("objective.teachers and objective.layers leave a teacher no layer")
        for name, layers in self.objective_layers.items():
            known = self.teachers[name].layers
            if layers != tuple(layer for layer in known if layer in layers):
                raise ValueError(
                    f"objective.layers.{name} must name some of teachers.{name}.layers, "
                    f"{list(known)}, in that order, got {list(layers)}"
                )
        if not any(self.teachers[name].weight for name in self.objective_layers):
            raise ValueError(
                "all teachers of the objective have weight 0: nothing would be learnt; give one a "
                "teachers.NAME.weight above 0"
            )
        for name, weights in (self.objective.layer_weights or {}).items():
            trained = self.objective_layers.get(name, ())
            unknown = set(weights) - set(trained)
            if unknown:
                raise ValueError(
                    f"objective.layer_weights.{name} weighs {sorted(unknown)}, but the layers of "
                    f"{name} that train the student are {list(trained)}"
                )
            if not sum(weights.get(layer, 1.0) for layer in trained):
                raise ValueError(
                    f"objective.layer_weights.{name} leaves no layer a weight: leave {name} out of "
                    "objective.teachers instead"
                )
        if self.objective.kind == "masked":
            self._masked()
        return self

    def _masked(self) -> None:
        """What the masked objective cannot do without, and what it has no use for."""
        if self.student.mix:
            raise ValueError(
                "student.mix is for the heads of objective.kind: visible; the decoders of masked "
                "read all taps of their teacher anyway: leave it out"
            )
        per_slot = self.clip.grid.units_per_slot
        for spec in self.mask_schedule.phases:
            if num_visible(spec.ratio, per_slot) == per_slot:
                raise ValueError(
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


def _check_order(key: str, layers: Sequence[str]) -> None:
    """Layers are read at taps in their order, so the order must be that of the depth."""
    for layer in layers:
        if layer.isdecimal() and layer != str(int(layer)):
            raise ValueError(f"{key} names {layer!r}: write {int(layer)}")
    depths = [
        float("inf") if layer == "norm" else int(layer)
        for layer in layers
        if layer == "norm" or layer.isdecimal()
    ]
    if len(set(layers)) < len(layers) or depths != sorted(depths):
        raise ValueError(
            f"{key} must ascend without repeats, `norm` last (deeper layers are read at deeper "
            f"taps), got {list(layers)}"
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply `key.sub=value` overrides.

    Args:
        path: The YAML file.
        overrides: Dotted assignments; values are parsed as YAML.

    Raises:
        UsageError: With one sentence: the file is not there or no YAML, a key is unknown
            (the nearest valid one is named), or a value is wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no config file at {file}: name an existing YAML file")
    try:
        raw = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{file} must hold a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{file}: {_explain(error)}") from None
    _refuse_secrets(config)
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _refuse_secrets(config: RunConfig) -> None:
    """A config is kept with its run and its addresses in the cache."""
    addresses = {"data.shards": config.data.shards, "cache.dir": (config.cache.dir,)}
    if config.evaluate is not None:
        for split in ("train", "validation", "test"):
            addresses[f"evaluate.{split}"] = getattr(config.evaluate, split)
    for what, values in addresses.items():
        for address in values:
            refuse_secrets(address, what)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, found, value = override.partition("=")
    if not found or not key:
        raise UsageError(f"override {override!r} must read key.sub=value, such as train.epochs=50")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"override {override!r}: the value is not valid YAML") from None
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = parsed


def _explain(error: ValidationError) -> str:
    """All problems in one line, unknown keys with their nearest valid neighbour."""
    lines = []
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(item["loc"][-1]), _valid_keys(item["loc"][:-1]), n=1, cutoff=0.5
            )
            prefix = "".join(f"{p}." for p in item["loc"][:-1])
            hint = f"; did you mean `{prefix}{near[0]}`?" if near else _list_keys(item["loc"][:-1])
            lines.append(f"unknown key `{where}`{hint}")
        elif item["type"] == "missing":
            lines.append(f"`{where}` is required")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
            got = item["input"]
            shown = "" if isinstance(got, dict | BaseModel) else f", got {redact(repr(got))}"
            lines.append(f"`{where}`: {message}{shown}" if item["loc"] else message)
    return "; ".join(lines)


def _list_keys(loc: tuple[int | str, ...]) -> str:
    keys = _valid_keys(loc)
    return f"; valid here: {', '.join(keys)}" if keys else ""


def _valid_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `loc` (mapping levels, such as a teacher's name, pass)."""
    section: type[BaseModel] | None = RunConfig
    for part in loc:
        if section is None:
            return []
        if part == "teachers":
            section = TeacherConfig
        elif part in section.model_fields:
            kinds = _sections(section.model_fields[str(part)].annotation)
            section = kinds[0] if kinds else None
    return list(section.model_fields) if section else []


def _sections(annotation: object) -> list[type[BaseModel]]:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
