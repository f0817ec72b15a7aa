"""Identity: what decides the bytes of a cache, as JSON values with one hash.

An identity holds values only, no paths, devices or versions. Extraction knows all of it
and compares all of it. Training cannot load the teachers, so it compares what the config
declares and lets the rest (weights, preprocessing, resolved precision) stand as recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kdhiera.cache.layout import FORMAT
from kdhiera.config import RunConfig
from kdhiera.grid import Grid
from kdhiera.masking import MaskPlan, PlannedMasks, Scope, Strategy
from kdhiera.views import CropPolicy, FramePolicy

Identity = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field that two identities disagree in; a field that is absent reads `-`."""

    field: str
    want: str
    has: str


def canonical_json(value: object) -> bytes:
    """The one way to write a JSON value: sorted keys, no spaces, 1.0 as 1, UTF-8.

    Args:
        value: Mappings with text keys, sequences, text, numbers, booleans, None.

    Raises:
        TypeError: If it holds anything else.
        ValueError: If it holds NaN or an infinity.
    """
    plain = _plain(value)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def fingerprint(identity: Mapping[str, object]) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def differences(
    want: Mapping[str, object], has: Mapping[str, object], *, declared_only: bool = False
) -> list[Difference]:
    """Fields that differ, with dotted names, sorted.

    Args:
        want: Identity that the run asks for.
        has: Identity that the cache has.
        declared_only: Ignore fields that only the cache has.
    """
    wanted, present = _flatten(want), _flatten(has)
    names = sorted(wanted if declared_only else {*wanted, *present})
    return [
        Difference(field=name, want=wanted.get(name, "-"), has=present.get(name, "-"))
        for name in names
        if wanted.get(name) != present.get(name)
    ]


def base_differences(
    want: Mapping[str, object], has: Mapping[str, object], *, declared_only: bool = False
) -> list[Difference]:
    """Differences of two bases but for their masks, of which one may contain the other."""
    first, second = ({k: v for k, v in base.items() if k != "masks"} for base in (want, has))
    return differences(first, second, declared_only=declared_only)


def table(rows: Sequence[Difference]) -> str:
    """Plain text: `field  want  cache has`, one difference a line."""
    cells = [("field", "want", "cache has"), *((r.field, r.want, r.has) for r in rows)]
    first, second = (max(len(row[i]) for row in cells) for i in (0, 1))
    return "\n".join(f"  {a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in cells)


def declared_base(config: RunConfig) -> Identity:
    """What a config alone says of the base.

    Settings that have no effect (the stride of a policy without one, how a centre crop
    is drawn, the strategies where every unit is kept) are left out.
    """
    v, m = config.views, config.masks
    views: Identity = {
        "frames": v.frames,
        "crop": v.crop,
        "flip": v.flip,
        "allow_short": v.allow_short,
        "seed": v.seed,
    }
    if v.frames is not FramePolicy.UNIFORM:
        views["frame_stride"] = v.frame_stride
    if v.crop is CropPolicy.RANDOM_RESIZED:
        views |= {"crop_scale": v.crop_scale, "crop_ratio": v.crop_ratio}
    masks: Identity = {"keep": m.keep}
    if m.keep == "plan":
        planned = [
            {"strategy": e.strategy, "ratio": e.ratio, "draws": e.num_masks} for e in m.plan.entries
        ]
        masks |= {"planned": planned, "scope": m.scope, "seed": m.seed}
    scores: Identity = {"source": config.scores.source}
    if config.scores.source != "uniform":
        scores["teacher"] = _declared_teacher(config, config.scores.teacher)
        if config.scores.layer is not None:
            scores["layer"] = config.scores.layer
        if config.scores.heads is not None:
            scores["heads"] = config.scores.heads
    identity: Identity = {
        "format": FORMAT,
        "clip": config.clip.model_dump(),
        "views": views,
        "scores": scores,
        "masks": masks,
    }
    return identity


def base_identity(config: RunConfig, *, score_teacher: Mapping[str, object] | None) -> Identity:
    """Identity of the base: how clips are seen and which units are kept.

    Not in it: how many views there are, which shards, batch size, workers, paths.

    Args:
        config: The run.
        score_teacher: Identity of the teacher that scores come from, its weights'
            sha256 included; None where the source needs no teacher.
    """
    identity = declared_base(config)
    if "teacher" in identity["scores"]:
        identity["scores"]["teacher"] = {
            **(score_teacher or {}),
            **identity["scores"]["teacher"],
        }
    return identity


def declared_column(config: RunConfig, teacher: str, layer: str) -> Identity:
    """What a config alone says of a column.

    Args:
        config: The run.
        teacher: Name of the teacher in the config.
        layer: One of its layers.
    """
    identity: Identity = {
        "format": FORMAT,
        "teacher": _declared_teacher(config, teacher),
        "layer": layer,
        "encoding": config.cache.encoding,
    }
    if config.cache.encoding == "compact":
        identity["compact_error"] = config.cache.compact_error
    if config.teachers[teacher].precision != "auto":
        identity["precision"] = config.teachers[teacher].precision
    return identity


def column_identity(
    config: RunConfig,
    teacher: str,
    layer: str,
    *,
    identity: Mapping[str, object],
    weights_sha256: str,
    precision: str,
) -> Identity:
    """Identity of a column: everything that decides its codes, given the base's rows.

    Args:
        config: The run.
        teacher: Name of the teacher in the config.
        layer: One of its layers.
        identity: What the loaded teacher says of itself.
        weights_sha256: Hash of its weights.
        precision: What `precision: auto` resolved to when the column was made.
    """
    declared = declared_column(config, teacher, layer)
    return {
        **declared,
        "teacher": {**identity, **declared["teacher"]},
        "weights_sha256": weights_sha256,
        "precision": precision,
    }


def grid_of(identity: Mapping[str, Any]) -> Grid:
    """Geometry of the clips of a base."""
    return Grid(**identity["clip"])


def mask_plan_of(identity: Mapping[str, Any]) -> MaskPlan:
    """What a base keeps; every strategy, ratio and draw is covered where all is kept."""
    masks = identity["masks"]
    if masks["keep"] == "all":
        return MaskPlan(entries=(), scope=Scope.SLOT, seed=0, keep_all=True)
    entries = tuple(
        PlannedMasks(strategy=Strategy(e["strategy"]), ratio=e["ratio"], draws=e["draws"])
        for e in masks["planned"]
    )
    return MaskPlan(
        entries=entries, scope=Scope(masks["scope"]), seed=masks["seed"], keep_all=False
    )


def _declared_teacher(config: RunConfig, name: str) -> Identity:
    """What decides features; what is not set is left out.

    So are a factory's options, which may be paths of this machine, and `compile`, which
    changes the order of sums and no more.
    """
    teacher = config.teachers[name]
    if teacher.kind == "module":
        return {"kind": teacher.kind, "factory": teacher.factory}
    settings = {
        "model": teacher.model,
        "options": teacher.options or None,
        "mean": teacher.mean,
        "std": teacher.std,
    }
    return {"kind": teacher.kind, **{k: v for k, v in settings.items() if v is not None}}


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise TypeError(f"keys of JSON objects are text, got {list(value)}")
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} is no JSON value: {value!r}")


def _flatten(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, child in value.items():
            flat |= _flatten(child, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: canonical_json(value).decode()}
