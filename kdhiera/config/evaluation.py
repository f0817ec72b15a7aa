"""What is measured on labelled clips."""

from __future__ import annotations

from pydantic import Field, field_validator

from kdhiera.config.section import Section


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
