"""The student, what it is asked for, and its optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kdhiera.config.section import Fraction, Precision, Ratio, Section
from kdhiera.masking import Strategy


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
    """The student that is trained.

    Attributes:
        kind: `hiera`, the masked 3-D Hiera; or `vit`, a plain ViT to compare it with.
        size: Named size; those of a `vit` cost as many multiply-accumulates as the Hiera of
            the same name. See `kdhiera.student.hiera` and `kdhiera.student.vit`.
        drop_path: Rate of the last block, rising linearly from 0.
        taps: Where heads read, by teacher, one for every layer in order: `block:N`, or of a Hiera
            `stageN.mid` and `stageN.end` too; None spreads a teacher's layers over backbone
            stages 3 and 4, or over the depth of a `vit`.
        head: `linear`, or `mlp` with one hidden layer.
        mix: Every head reads a learned mix of all taps that are named (MaskAlign).
        decoder: What `objective.kind: masked` predicts hidden units with.
        init: Weights to start from: an official Hiera video checkpoint, or an export of the same
            kind; None starts from the seed.
    """

    kind: Literal["hiera", "vit"] = "hiera"
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
        batch_size: Clips of an optimiser step, all ranks together.
        accumulate: Parts that a rank goes through its clips of a step in, one after the other:
            less memory, the same losses.
        num_workers: Processes that train together, started on Ray; 1 trains in this process.
            `torchrun` starts its own whatever this says.
        use_gpu: Give every one of these workers a GPU.
        max_failures: Times that the workers are started anew from the newest checkpoint after
            one of them died.
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
        num_threads: CPU threads of the loop, and of an evaluation; 0 leaves torch's own
            choice, and lets an evaluation take all CPUs.
        compile: Compile forward and losses with `torch.compile`, once for every ratio (torch
            compiles eight, and runs those after them as they are).
        grad_checkpointing: Compute the student's blocks again in the backward pass instead of
            keeping what they computed: less memory, more time, the same losses.
    """

    epochs: int = Field(400, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=1)
    accumulate: int = Field(1, ge=1)
    num_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    max_failures: int = Field(3, ge=0)
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

    @model_validator(mode="after")
    def _workers(self) -> TrainConfig:
        wants = self.device.startswith("cuda")
        if self.use_gpu and not (wants or self.device == "auto"):
            raise ValueError(f"use_gpu gives workers GPUs, but device is {self.device}: write cuda")
        if wants and self.num_workers > 1 and not self.use_gpu:
            raise ValueError(f"device is {self.device}: give num_workers GPUs with use_gpu: true")
        return self
