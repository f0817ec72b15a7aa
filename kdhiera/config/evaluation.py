"""What is measured on labelled clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from kdhiera.config.section import Fraction, Precision, Section

Method = Literal["knn", "linear", "attentive", "finetune"]


class AttentiveConfig(Section):
    """The attentive probe: one cross-attention block over frozen tokens, then a classifier.

    Attributes:
        heads: Attention heads; must divide the student's width.
        epochs: Passes over the training clips.
        batch_size: Clips of an optimiser step.
        lrs: Peak learning rates to try, for every batch size; the validation split chooses.
        weight_decay: Of matrices.
    """

    heads: int = Field(8, ge=1)
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    lrs: tuple[float, ...] = Field((1e-3, 3e-3), min_length=1)
    weight_decay: float = Field(0.05, ge=0)

    @field_validator("lrs")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError(f"learning rates must be above 0, got {list(value)}")
        return value


class FinetuneConfig(Section):
    """Fine-tuning of the whole student on the training split.

    Attributes:
        q_pool: Times that queries are pooled: 3 as Hiera fine-tunes, or 2 as in pre-training.
        epochs: Passes over the training clips; the last one is measured, none is chosen.
        repeats: Views of a clip in an epoch, each counted as a clip of a step (repeated
            augmentation).
        batch_size: Clips of an optimiser step, at most.
        lr: Learning rate for 256 clips a step; scaled linearly with the batch size.
        min_lr: Where the cosine ends (not scaled).
        warmup_epochs: Linear warm-up.
        weight_decay: Not on norms, biases and position embeddings.
        layer_decay: Factor of the learning rate from a block to the one before it; 1 gives all
            the same.
        scratch_layer_decay: The same for the student trained from scratch, whose early blocks
            have everything to learn.
        drop_path: Rate of the last block, rising linearly from 0.
        mixup: Alpha of the Beta distribution that clips are mixed by; 0 mixes none.
        label_smoothing: Share of a target spread over all classes.
        crop_scale: Range of a training crop's share of the frame's area.
        flip: Mirror every second view (leave off where left and right mean something).
        clip_grad: Largest gradient norm; None means no clipping.
        precision: Autocast; `auto` is bf16 where the hardware multiplies it.
    """

    q_pool: Literal[2, 3] = 3
    epochs: int = Field(30, ge=1)
    repeats: int = Field(1, ge=1, le=16)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(4e-3, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(3.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1)
    scratch_layer_decay: float = Field(1.0, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    crop_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    flip: bool = False
    clip_grad: float | None = Field(5.0, gt=0)
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _ordered(self) -> FinetuneConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale must be 0 < low <= high, got {list(self.crop_scale)}")
        if self.repeats > self.batch_size:
            raise ValueError(
                f"{self.repeats} repeats of a clip do not fit in a step of {self.batch_size} clips"
            )
        return self


class EvaluateConfig(Section):
    """Evaluation on labelled shards, frozen and fine-tuned.

    Attributes:
        train: Labelled shards that neighbours, probes and fine-tuning learn from.
        validation: Labelled shards the probes' settings are chosen on.
        test: Labelled shards that are reported.
        labels: Label names in the samples' JSON; empty takes all that are found.
        groups: Labels that name what clips share (an object, a background): intervals are
            resampled over these; empty treats every clip as independent.
        methods: Any of `knn`, `linear`, `attentive` (frozen) and `finetune`.
        labels_per_class: Everything is also measured with only so many training clips a class;
            fewer are a part of more.
        frames: `dense` or `uniform`, from the middle; None takes `views.frames`.
        frame_stride: Frames between sampled frames, for `dense`.
        test_clips: Clips of a test video, spread evenly over it; their scores are averaged.
        test_crops: Crops of a test clip: 1 in the middle, or 3 along the longer side.
        q_pool: Of the frozen student: 2 as it was pre-trained, or 3.
        neighbours: k of k-NN.
        temperature: Of the weighted k-NN vote.
        batch_size: Clips in one forward.
        resamples: Of the bootstrap.
        seeds: Each measures anew what is drawn: random students, probes, fine-tuning, choice of
            labels. The first one also decides the bootstrap.
        attentive: The attentive probe.
        finetune: Fine-tuning.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    methods: tuple[Method, ...] = Field(("knn", "linear", "attentive"), min_length=1)
    labels_per_class: tuple[int, ...] = ()
    frames: Literal["dense", "uniform"] | None = None
    frame_stride: int = Field(4, ge=1)
    test_clips: int = Field(1, ge=1, le=100)
    test_crops: Literal[1, 3] = 1
    q_pool: Literal[2, 3] = 2
    neighbours: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    batch_size: int = Field(32, ge=1)
    resamples: int = Field(2000, ge=100)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    attentive: AttentiveConfig = AttentiveConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("methods", "labels_per_class", "seeds", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str | int) else value

    @field_validator("methods", "labels_per_class", "seeds", "labels", "groups")
    @classmethod
    def _distinct(cls, value: Sequence[object]) -> Sequence[object]:
        if len(set(value)) < len(value):
            raise ValueError(f"name each once, got {list(value)}")
        return value

    @field_validator("labels_per_class")
    @classmethod
    def _at_least_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError(f"numbers of labels start at 1, got {list(value)}")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 0:
            raise ValueError(f"seeds must be 0 or more, got {list(value)}")
        return value
