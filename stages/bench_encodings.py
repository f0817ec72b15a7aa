"""What every encoding makes of the user's own features: bits, errors, speed, neighbours.

    clips spread over the shards -> teachers -> first half: calibrates, is the k-NN gallery
                                             -> second half: stored, decoded, compared

Nothing is read from a cache or written into one.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kdhiera.cache.calibration import Calibration
from kdhiera.config import RunConfig
from kdhiera.data.clip import Clip
from kdhiera.data.shards import Sample
from kdhiera.devices import resolve_device
from kdhiera.errors import UsageError
from kdhiera.featurize import Featurizer, TargetKey
from kdhiera.progress import Progress
from kdhiera.report.plots import save
from kdhiera.report.rates import RatePanel, rate_distortion
from kdhiera.report.tables import Table, to_text
from kdhiera.stages.assemble import featurizer_of
from kdhiera.stages.clips import spread_clips
from kdhiera.stages.encoding_figures import LayerFigures, Neighbours, measure_layer, pooled

logger = logging.getLogger(__name__)

LEAST_CLIPS = 4
_LEAST_LABELLED = 8
_NEIGHBOURS, _TEMPERATURE = 20, 0.07  # where the config has no `evaluate` section


@dataclass(frozen=True, kw_only=True)
class EncodingBench:
    """What the bench found.

    Args:
        calibrated: Clips that bases were made from.
        measured: Clips that everything else was measured on.
        kept_units: Of the measured clips, on average.
        compact_error: `cache.compact_error`.
        device: Where encoding and decoding ran.
        label: What k-NN predicts; None if the clips share no label.
        layers: One for every layer of every teacher.
        plot: Picture of rate against distortion.
    """

    calibrated: int
    measured: int
    kept_units: float
    compact_error: float
    device: str
    label: str | None
    layers: tuple[LayerFigures, ...]
    plot: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        if self.label is None:
            knn = "the clips share no label: only whether the nearest clip stays the same"
        else:
            knn = f"accuracy on `{self.label}` of decoded clips, neighbours among the originals"
        return "\n".join(
            [
                to_text(_table(self)),
                f"clips     {self.calibrated} calibrate, {self.measured} others are measured, "
                f"{self.kept_units:.1f} units kept of each",
                "error     share of the energy about the calibration mean, per cent",
                f"k-NN      {knn}",
                "same      share of clips whose nearest clip is that of the original, per cent",
                f"speed     million values a second, on {self.device}; store is compression",
                f"plot      {self.plot}",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class _Half:
    """Finite clips of one half.

    Args:
        features: By layer, on the device.
        units: Their units, -1 pads.
        labels: What their samples say.
    """

    features: Mapping[TargetKey, Tensor]
    units: Int64[Tensor, "n k"]
    labels: Sequence[Mapping[str, Any]]


def bench_encodings(
    config: RunConfig, *, num_clips: int, folder: Path | None, progress: Progress
) -> EncodingBench:
    """Measure all encodings on the config's own clips and teachers.

    Args:
        config: The run.
        num_clips: Clips, spread over `data.shards`; half of them calibrate.
        folder: Where the plot goes; None means `encodings/` in the run folder.
        progress: Where progress is shown.

    Raises:
        UsageError: If too few clips decode to finite features, or a pattern matches no shard.
    """
    device = resolve_device(config.extract.device)
    torch.set_num_threads(config.extract.cpus_per_actor)
    featurizer = featurizer_of(config, device=device)
    clips = _decode(config, num_clips, progress)
    target = folder or Path(config.run_dir) / "encodings"
    target.mkdir(parents=True, exist_ok=True)  # before minutes of work
    bar = progress.start("teach", len(clips), "clips")
    calibrations: dict[TargetKey, Calibration] = {}
    galleries: dict[TargetKey, list[Tensor]] = {}
    known: list[Mapping[str, Any]] = []
    everything = replace(featurizer, plan=replace(featurizer.plan, keep_all=True))
    for batch in _batches(config, clips[: len(clips) // 2]):
        half = _teach(config, everything, batch)
        for key, features in half.features.items():
            calibrations.setdefault(key, Calibration(features.shape[-1])).add(features)
            galleries.setdefault(key, []).append(pooled(features, half.units))
        known += half.labels
        progress.advance(bar, len(batch))
    measured = []
    for batch in _batches(config, clips[len(clips) // 2 :]):
        measured.append(_teach(config, featurizer, batch))
        progress.advance(bar, len(batch))
    progress.finish(bar)
    half = _joined(measured)
    if min(len(known), len(half.labels)) < LEAST_CLIPS // 2:
        raise _too_few(len(known) + len(half.labels))
    label = _label(config, known, half.labels)
    bar = progress.start("encode", len(calibrations), "layers")
    layers = []
    for (teacher, layer), calibration in calibrations.items():
        key = teacher, layer
        neighbours = Neighbours(
            gallery=torch.cat(galleries[key]),
            classes=None if label is None else _classes(label, known, half.labels),
            neighbours=config.evaluate.neighbours if config.evaluate else _NEIGHBOURS,
            temperature=config.evaluate.temperature if config.evaluate else _TEMPERATURE,
        )
        basis = calibration.basis(error=config.cache.compact_error)
        layers.append(
            measure_layer(
                half.features[key], half.units, basis, neighbours, teacher=teacher, layer=layer
            )
        )
        progress.advance(bar)
    progress.finish(bar)
    plot = target / "rate-distortion.png"
    save(rate_distortion([_panel(layer) for layer in layers]), plot)
    return EncodingBench(
        calibrated=len(known),
        measured=len(half.labels),
        kept_units=float((half.units >= 0).sum(1).double().mean()),
        compact_error=config.cache.compact_error,
        device=_device_name(device),
        label=label,
        layers=tuple(layers),
        plot=str(plot),
    )


def _decode(config: RunConfig, num_clips: int, progress: Progress) -> list[tuple[Sample, Clip]]:
    """All clips at once, for they are parted in the middle; pixels are small beside features."""
    bar = progress.start("decode", num_clips, "clips")
    clips = []
    for pair in spread_clips(config, num_clips):
        clips.append(pair)
        progress.advance(bar)
    progress.finish(bar)
    if len(clips) < LEAST_CLIPS:
        raise _too_few(len(clips))
    if len(clips) < num_clips:
        logger.warning("%d clips were asked for, and %d decode", num_clips, len(clips))
    return clips


def _too_few(found: int) -> UsageError:
    return UsageError(
        f"only {found} clips of data.shards decode to finite features, and the bench needs "
        f"{LEAST_CLIPS}: add shards, or raise --clips"
    )


def _batches(
    config: RunConfig, clips: Sequence[tuple[Sample, Clip]]
) -> list[Sequence[tuple[Sample, Clip]]]:
    size = config.extract.batch_size
    return [clips[start : start + size] for start in range(0, len(clips), size)]


def _teach(
    config: RunConfig, featurizer: Featurizer, batch: Sequence[tuple[Sample, Clip]]
) -> _Half:
    """Features of the clips that are finite in all layers."""
    out = featurizer(
        np.stack([clip.frames for _, clip in batch]),
        uids=[sample.uid for sample, _ in batch],
        view=0,
        layers={name: teacher.layers for name, teacher in config.teachers.items()},
    )
    good = np.logical_and.reduce(list(out.finite.values()))
    there = torch.from_numpy(good).to(featurizer.device)
    return _Half(
        features={key: features[there] for key, features in out.features.items()},
        units=torch.from_numpy(out.units[good].astype(np.int64)).to(featurizer.device),
        labels=[sample.labels for (sample, _), fine in zip(batch, good, strict=True) if fine],
    )


def _joined(halves: Sequence[_Half]) -> _Half:
    keys = halves[0].features if halves else ()
    return _Half(
        features={key: torch.cat([half.features[key] for half in halves]) for key in keys},
        units=torch.cat([half.units for half in halves]) if halves else torch.empty(0, 0).long(),
        labels=[row for half in halves for row in half.labels],
    )


def _label(
    config: RunConfig, known: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> str | None:
    """A label that clips of both halves carry: the config's first, or any with some values."""
    settings = config.evaluate
    found = sorted({name for row in (*known, *measured) for name in row})
    groups = settings.groups if settings else ()
    for name in (*(settings.labels if settings else ()), *(n for n in found if n not in groups)):
        values = [[str(row[name]) for row in half if name in row] for half in (known, measured)]
        if all(len(v) >= _LEAST_LABELLED and 1 < len(set(v)) <= len(v) // 2 for v in values):
            return name
    return None


def _classes(
    label: str, known: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> tuple[Int64[np.ndarray, " g"], Int64[np.ndarray, " n"]]:
    """Class numbers of both halves; -1 for a clip that has no label, or one of its own."""
    names = sorted({str(row[label]) for row in known if label in row})
    numbers = {name: number for number, name in enumerate(names)}
    gallery, queries = (
        np.array([numbers.get(str(row.get(label)), -1) for row in half], np.int64)
        for half in (known, measured)
    )
    return gallery, queries


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})"


def _panel(layer: LayerFigures) -> RatePanel:
    return RatePanel(
        title=f"{layer.teacher} {layer.layer}",
        curve=layer.sweep,
        bound=layer.bound,
        points={e.encoding: (e.bits, e.error) for e in layer.encodings},
    )


def _table(bench: EncodingBench) -> Table:
    rows = []
    for layer in bench.layers:
        name = f"{layer.teacher} {layer.layer}"
        if layer.accuracy is not None:
            rows.append((name, "(original)", "", "", "", "", _percent(layer.accuracy), *[""] * 4))
        for e in layer.encodings:
            lost = f" ({e.lost_rows} rows lost)" if e.lost_rows else ""
            rows.append(
                (
                    name,
                    e.encoding + lost,
                    f"{e.bits:.2f}",
                    _percent(e.error),
                    _percent(e.standardised_error),
                    f"{e.worst_cosine:.4f}",
                    "" if e.accuracy is None else _percent(e.accuracy),
                    f"{100 * e.same_neighbour:.0f}",
                    *(_millions(r) for r in (e.encode_rate, e.store_rate, e.decode_rate)),
                )
            )
    return Table(
        headers=(
            "layer", "encoding", "bits", "error", "standardised", "worst cosine", "k-NN", "same",
            "encode", "store", "decode",
        ),
        rows=tuple(rows),
        numeric=frozenset(range(2, 11)),
    )  # fmt: skip


def _percent(share: float) -> str:
    """Three significant digits."""
    return f"{100 * share:.3g}" if share else "0"


def _millions(rate: float) -> str:
    """Millions a second; what only renames bytes takes no time worth a figure."""
    return f"{rate / 1e6:.0f}" if rate < 2e9 else "> 2000"
