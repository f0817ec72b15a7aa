"""What every masking strategy shows of a clip, and how higher ratios show less of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from kdhiera.grid import TUBELET_FRAMES, Grid
from kdhiera.masking import MaskSpec, Strategy, draw_mask, to_keep_mask
from kdhiera.report.overlays import dim_hidden, heat, top_score
from kdhiera.report.strips import Strip, draw_strips, split

RATIOS = (0.6, 0.8, 0.9, 0.95)
WORDS = {
    Strategy.ATTENTION: "drawn, more likely where scores are high",
    Strategy.ATTENTION_TOPK: "the highest scores, no draw",
    Strategy.RANDOM: "drawn, all units alike",
    Strategy.TUBE: "drawn, all units alike, the same in every slot",
    Strategy.ATTENTION_TUBE: "drawn by the mean score, the same in every slot",
}
FOOT = (
    "One column is one slot (2 frames; the first is shown). Hidden units are grey. Orange frames: "
    "units that the next higher ratio shows too."
)


@dataclass(frozen=True, kw_only=True)
class DrawnMask:
    """One mask.

    Args:
        spec: How it was drawn.
        visible: True where the student sees the unit.
    """

    spec: MaskSpec
    visible: Bool[np.ndarray, "slots y x"]

    @property
    def count(self) -> str:
        """How much is shown, in words."""
        return f"{int(self.visible.sum())} of {self.visible.size} units"


@dataclass(frozen=True, kw_only=True)
class MaskPicture:
    """A clip under several masks.

    Args:
        title: Which clip, in plain words.
        frames: The clip; two frames a slot.
        scores: Larger is more likely to be shown.
        scores_note: Where they come from, in plain words.
        strategies: One mask of each strategy at the run's ratio.
        ratios: One mask of the run's strategy at every ratio, ascending.
    """

    title: str
    frames: UInt8[np.ndarray, "f h w 3"]
    scores: Float[np.ndarray, "slots y x"]
    scores_note: str
    strategies: tuple[DrawnMask, ...]
    ratios: tuple[DrawnMask, ...]


def draw_masks(
    spec: MaskSpec, scores: Float[np.ndarray, "slots units"], grid: Grid, *, uid: str
) -> tuple[tuple[DrawnMask, ...], tuple[DrawnMask, ...]]:
    """The first mask of view 0, of every strategy and of every ratio.

    Args:
        spec: The run's masks.
        scores: Of the clip.
        grid: Of the clip.
        uid: Identity of the sample, which the noise depends on.

    Returns:
        All strategies at the run's ratio, then the run's strategy at ascending ratios, its own
        among them.
    """

    def drawn(one: MaskSpec) -> DrawnMask:
        units = draw_mask(one, scores, uid=uid, view=0, draw=0)
        visible = to_keep_mask([units], grid.num_units)[0].reshape(grid.units)
        return DrawnMask(spec=one, visible=visible)

    return (
        tuple(drawn(replace(spec, strategy=strategy)) for strategy in Strategy),
        tuple(drawn(replace(spec, ratio=ratio)) for ratio in sorted({*RATIOS, spec.ratio})),
    )


def show_masks(picture: MaskPicture) -> Figure:
    """Draw the clip, its scores, and what every mask shows.

    Args:
        picture: What to draw.
    """
    frames = [*picture.frames[::TUBELET_FRAMES]]
    top = top_score(picture.scores)
    rows = [
        Strip(
            title="What the clip shows",
            images=tuple(frame / 255.0 for frame in frames),
            note=f"{len(frames)} slots of {picture.scores[0].size} units",
        ),
        Strip(
            title="Scores",
            images=tuple(heat(f, s, top) for f, s in zip(frames, picture.scores, strict=True)),
            note=picture.scores_note,
        ),
        *(
            _strip(frames, mask, str(mask.spec.strategy), WORDS[mask.spec.strategy])
            for mask in picture.strategies
        ),
    ]
    own = picture.strategies[0].spec.ratio
    ratios = [
        _strip(
            frames,
            mask,
            f"{100 * mask.spec.ratio:g} % hidden",
            f"{mask.spec.strategy}{', as this run' if mask.spec.ratio == own else ''}",
            higher,
        )
        for mask, higher in zip(picture.ratios, [*picture.ratios[1:], None], strict=True)
    ]
    height, width = picture.frames.shape[1:3]
    aspect = width / height
    blocks = [*split(rows, aspect=aspect, beside=ratios), ratios]
    return draw_strips(picture.title, blocks, aspect=aspect, foot=FOOT)


def _strip(
    frames: Sequence[UInt8[np.ndarray, "h w 3"]],
    mask: DrawnMask,
    title: str,
    words: str,
    higher: DrawnMask | None = None,
) -> Strip:
    return Strip(
        title=f"{title}: {mask.count}",
        images=tuple(dim_hidden(f, v) for f, v in zip(frames, mask.visible, strict=True)),
        note=words,
        outlined=None if higher is None else higher.visible,
    )
