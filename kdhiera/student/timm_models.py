"""Students under names that timm knows: `hiera_video_base`, `vit_video_nano`, ...

    import kdhiera, timm
    model = timm.create_model("local-dir:runs/demo/export", pretrained=True)

Registers itself when it is imported, which `kdhiera` does as soon as timm is there
(`kdhiera.when_imported`). It may be imported while other modules of students still are, so it
reads them when a model is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.hiera import Hiera
from timm.models.vision_transformer import VisionTransformer

from kdhiera.config import StudentConfig
from kdhiera.grid import TUBELET_FRAMES, Grid
from kdhiera.student.base import IMAGENET_MEAN, IMAGENET_STD

SIZES: tuple[str, ...] = get_args(StudentConfig.model_fields["size"].annotation)
USUAL = Grid(num_frames=16, height=224, width=224)


class VideoHiera(Hiera):  # type: ignore[misc]
    """timm's Hiera, whose features at the stages come for clips too (timm's are for images)."""

    def __init__(self, *args: Any, q_pool: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, q_pool=q_pool, **kwargs)
        for stage, info in enumerate(self.feature_info):
            info["reduction"] = 4 * 2 ** min(stage, q_pool)

    def forward_intermediates(self, x: Any, *, output_fmt: str = "NCHW", **how: Any) -> Any:
        """As timm's; features are `[b, c, t, h, w]`, or `[b, t, h, w, c]` for `NHWC`."""
        found = super().forward_intermediates(x, output_fmt="NHWC", **how)
        if output_fmt == "NHWC":
            return found
        if how.get("intermediates_only"):
            return [features.movedim(-1, 1) for features in found]
        last, features = found
        return last, [one.movedim(-1, 1) for one in features]


def hiera_name(size: str) -> str:
    """The architecture of a Hiera student."""
    return f"hiera_video_{size}"


def vit_name(size: str) -> str:
    """The architecture of a plain ViT student."""
    return f"vit_video_{size}"


def pretrained_cfg(grid: Grid, *, in_chans: int, classifier: str) -> dict[str, Any]:
    """What timm is told of a model beside its arguments, JSON values only.

    Args:
        grid: Clip geometry.
        in_chans: Channels that the model takes.
        classifier: Its last layer, which another number of classes starts anew.
    """
    return {
        "input_size": [in_chans, grid.height, grid.width],
        "fixed_input_size": False,  # the arguments say it, frames included
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": 0,
        "classifier": classifier,
    }


def hiera_cfg(grid: Grid) -> dict[str, Any]:
    """`pretrained_cfg` of a Hiera student."""
    return pretrained_cfg(grid, in_chans=3, classifier="head.fc")


def vit_cfg(grid: Grid) -> dict[str, Any]:
    """`pretrained_cfg` of a plain ViT student."""
    return pretrained_cfg(grid, in_chans=3 * TUBELET_FRAMES, classifier="head")


def _hiera(size: str) -> Callable[..., Any]:
    def make(pretrained: bool = False, **given: Any) -> Any:
        from kdhiera.student.hiera import hiera_args

        arguments = {**hiera_args(_config("hiera", size), USUAL), **given}
        clip = arguments.pop("img_size")  # timm's builder knows no size of three axes
        return build_model_with_cfg(
            partial(VideoHiera, img_size=clip),
            hiera_name(size),
            pretrained,
            feature_cfg={"out_indices": 4, "feature_cls": "getter"},
            **arguments,
        )

    return _named(make, hiera_name(size))


def _vit(size: str) -> Callable[..., Any]:
    def make(pretrained: bool = False, **given: Any) -> Any:
        from kdhiera.student.vit import vit_args

        return build_model_with_cfg(
            VisionTransformer,
            vit_name(size),
            pretrained,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **{**vit_args(_config("vit", size), USUAL), **given},
        )

    return _named(make, vit_name(size))


def _config(kind: str, size: str) -> StudentConfig:
    return StudentConfig.model_validate({"kind": kind, "size": size, "drop_path": 0.0})


def _named(make: Callable[..., Any], name: str) -> Callable[..., Any]:
    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}: a student of kdhiera, for clips of 16 x 224 x 224 unless told."
    return make


default_cfgs = generate_default_cfgs(  # where `register_model` looks for them
    {hiera_name(size): hiera_cfg(USUAL) for size in SIZES}
    | {vit_name(size): vit_cfg(USUAL) for size in SIZES}
)
for _size in SIZES:
    register_model(_hiera(_size))
    register_model(_vit(_size))
