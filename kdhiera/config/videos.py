"""Which videos, and how clips are drawn and decoded from them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from kdhiera.config.section import Fraction, Section
from kdhiera.grid import Grid
from kdhiera.views import CropPolicy, FramePolicy


class DataConfig(Section):
    """Where the videos are.

    Attributes:
        shards: WebDataset tar shards: paths or `s3://` addresses, with globs and braces.
        video_extensions: Members with these extensions are videos.
        max_bad_fraction: Extraction stops when more than this share of the rows (a sample in
            a view) is bad, 20 rows seen at least.
        licence: Of the videos, for the model card of an export; decides nothing.
    """

    shards: tuple[str, ...]
    video_extensions: tuple[str, ...] = ("mp4", "avi", "mkv", "webm", "mov", "mpg", "mpeg", "m4v")
    max_bad_fraction: Fraction = 0.1
    licence: str | None = None

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class ClipConfig(Section):
    """Size of a clip; see `kdhiera.grid`.

    Attributes:
        num_frames: Frames, even: two make a slot.
        height: Pixels, a multiple of 32.
        width: Pixels, a multiple of 32.
    """

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
        backend: `auto` is the decoder measured best, PyAV; `decord` and `torchcodec` where they
            are installed.
        num_children: Decoding processes an actor keeps; 0 means one a CPU of the actor.
        deadline_seconds: A clip that takes longer becomes `decode_timeout`.
        max_frame_pixels: Larger frames become `decode_limit`.
        max_duration_seconds: Longer videos become `decode_limit`.
        max_video_bytes: Larger members become `decode_limit`.
        max_memory_bytes: Address space of a child.
        clips_per_child: A child is replaced after this many clips.
    """

    backend: Literal["auto", "decord", "pyav", "torchcodec"] = "auto"
    num_children: int = Field(0, ge=0, le=256)
    deadline_seconds: float = Field(20.0, gt=0)
    max_frame_pixels: int = Field(8192 * 4320, gt=0)
    max_duration_seconds: float = Field(4 * 3600.0, gt=0)
    max_video_bytes: int = Field(1 << 30, gt=0)
    max_memory_bytes: int = Field(4 << 30, gt=0)
    clips_per_child: int = Field(1000, ge=1)
