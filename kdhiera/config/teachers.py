"""Teachers, and the scores that masks are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kdhiera.config.section import Colour, Precision, Section


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
        licence: Of its weights, for the model card of an export; decides nothing.
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
    licence: str | None = None

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
