"""Stage 2: train the student, from the cache alone or with live teachers.

From the cache it opens no shard, no video and no teacher: the cache's records say what
the columns are, and the config is compared with them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Int

from kdhiera.addresses import expand_braces
from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import Codec, make_codec
from kdhiera.cache.expected import expected_shards
from kdhiera.cache.fingerprint import (
    canonical_json,
    declared_base,
    declared_column,
    fingerprint,
)
from kdhiera.cache.layout import column_id
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.rows import KeptRows
from kdhiera.cache.snapshot import SNAPSHOT_FILE, Snapshot, load_snapshot, save_snapshot
from kdhiera.config import RunConfig, StudentConfig, dump
from kdhiera.data.patterns import expand
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import index_shards
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import UsageError
from kdhiera.objective.targets import NEEDS_STATISTICS, Statistics, TargetSpec
from kdhiera.progress import Progress, human_seconds
from kdhiera.stages.assemble import decode_limits, featurizer_of
from kdhiera.stages.export import provenance_of
from kdhiera.stages.statistics import statistics_of
from kdhiera.storage import write_atomic
from kdhiera.student.base import Student
from kdhiera.student.build import build_student, default_taps
from kdhiera.student.decoder import DecoderSpec, build_decoders
from kdhiera.student.export import export
from kdhiera.student.heads import HeadSpec, build_heads
from kdhiera.student.initial import load_init
from kdhiera.student.official import weights_sha256
from kdhiera.teachers.build import warn_of_scores
from kdhiera.training.batches import ClipSource
from kdhiera.training.live import LIVE_ENCODING, LiveSource
from kdhiera.training.loop import CHECKPOINTS, TrainSummary, check_resumable, num_steps, train
from kdhiera.training.step import Predictor

logger = logging.getLogger(__name__)

BLOCK_ROWS = 128  # neighbours kept together in the sample order: one Zarr shard
FREE_SETTINGS = (  # of `train`: they do not decide the weights that come out
    "device", "log_every", "save_every", "keep_last", "prefetch", "num_threads",
    "grad_checkpointing",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillSummary:
    """What training did.

    Args:
        run_dir: Folder of the run.
        mode: `cached` or `live`.
        coverage: What it trained on, in words.
        training: Steps, losses, speed.
        export: Folder of the exported student.
    """

    run_dir: str
    mode: str
    coverage: str
    training: TrainSummary
    export: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        t = self.training
        lines = [
            f"trained   {self.coverage}",
            f"steps     {t.steps} of {t.clips // t.steps} clips, "
            f"{human_seconds(t.seconds)}, {t.clips / t.seconds:.0f} clips/s, "
            f"{100 * t.data_wait:.1f} % waiting for data",
            f"loss      {t.first['loss']:.4f} -> {t.last['loss']:.4f}",
        ]
        for key, last in t.last.items():
            if key.startswith("explained_variance/"):
                name = key.partition("/")[2]
                lines.append(
                    f"          {name:<12} explained variance {t.first[key]:+.3f} -> {last:+.3f}"
                )
        lines += [f"export    {self.export}", f"run       {self.run_dir}"]
        return "\n".join(lines)


def distill(
    config: RunConfig, *, progress: Progress, resume: bool = False, overwrite: bool = False
) -> DistillSummary:
    """Train the student and export it.

    Args:
        config: The run.
        progress: Where progress is shown.
        resume: Refuse to start anew.
        overwrite: Throw an earlier run in the same folder away.

    Raises:
        UsageError: If there is no cache, or a tap or layer does not exist.
        MismatchError: If cache or run folder were made for another config.
        StoppedError: After SIGTERM or SIGINT, with a checkpoint.
    """
    folder = Path(config.run_dir)
    if resume and not (folder / "checkpoints").is_dir():
        raise UsageError(f"--resume: there is no checkpoint in {folder}")
    with open_source(config, None if overwrite else begun_with(folder)) as opened:
        student, heads, specs = student_of(config, opened)
        _check_phases(config, num_steps(config.train, opened.source.num_samples))
        resolve_precision(config.train.precision, resolve_device(config.train.device))
        identity = identity_of(config, opened)
        with _locked(folder):
            if overwrite:
                _clear(folder)
            check_resumable(folder, identity)
            if opened.commits is not None:
                save_snapshot(folder, opened.commits)
            write_atomic(folder / "config.yaml", dump(config).encode())
            summary = _train(config, opened, student, heads, specs, identity, progress)
            export(
                student,
                config.student,
                folder / "export",
                name=config.name,
                provenance=provenance_of(
                    config, coverage=opened.coverage, steps=summary.steps, settings=identity
                ),
            )
    return DistillSummary(
        run_dir=config.run_dir,
        mode=config.cache.mode,
        coverage=opened.coverage,
        training=summary,
        export=str(folder / "export"),
    )


def preflight(config: RunConfig) -> int:
    """Steps of a run, after all that can be refused before training was asked for.

    With live teachers the clips are counted, not decoded.

    Raises:
        UsageError, MismatchError: As `distill` does.
    """
    if config.cache.mode == "live":
        _check_live(config)
        shards = index_shards(expand(config.data.shards))
        steps = num_steps(config.train, sum(len(shard.samples) for shard in shards))
    else:
        opened = open_cache(config)
        student_of(config, opened)
        steps = num_steps(config.train, opened.source.num_samples)
    _check_phases(config, steps)
    return steps


def _check_phases(config: RunConfig, steps: int) -> None:
    ratios = len(config.mask_schedule.phases)
    if ratios > steps:
        raise UsageError(
            f"objective.ratio names {ratios} ratios for equal shares of the steps, but the run has "
            f"{steps}: name fewer, or train for longer"
        )


def _train(
    config: RunConfig,
    opened: Opened,
    student: Student,
    heads: Predictor,
    specs: Sequence[TargetSpec],
    identity: Mapping[str, Any],
    progress: Progress,
) -> TrainSummary:
    return train(
        student=student,
        heads=heads,
        targets=specs,
        source=opened.source,
        masks=config.mask_schedule,
        num_views=config.views.num,
        objective=config.objective,
        config=config.train,
        run_dir=Path(config.run_dir),
        identity=identity,
        progress=progress,
        block=BLOCK_ROWS,
    )


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source of clips and what the targets need to know of it.

    Args:
        source: Where kept units are read.
        coverage: What it holds, in words.
        snapshot: Hash of `commits`, or of what a live run reads.
        commits: What it reads of a cache; None for live teachers.
        encoding: Of its columns.
        widths: Channels by (teacher, layer).
        codecs: How features are stored, by (teacher, layer), on the training device.
        statistics: By (teacher, layer), where `objective.normalise` needs them.
    """

    source: ClipSource
    coverage: str
    snapshot: str
    commits: Snapshot | None
    encoding: str
    widths: Mapping[tuple[str, str], int]
    codecs: Mapping[tuple[str, str], Codec]
    statistics: Mapping[tuple[str, str], Statistics]


@dataclass(frozen=True, kw_only=True)
class _Cached:
    """A `ClipSource` over a cache."""

    reader: CacheReader

    @property
    def num_samples(self) -> int:
        """Trainable samples."""
        return self.reader.num_samples

    def read(self, samples: Int[np.ndarray, " b"], *, view: int) -> KeptRows:
        """Rows of the cache."""
        return self.reader.read(samples, view=view)


@contextlib.contextmanager
def open_source(config: RunConfig, snapshot: Snapshot | None) -> Iterator[Opened]:
    """What the config trains from: its cache, or live teachers until the block ends.

    Args:
        config: The run.
        snapshot: What a run that goes on began with; see `open_cache`.

    Raises:
        UsageError: If there is no cache, or the objective needs one and the mode is live.
        MismatchError: As `open_cache` does.
    """
    if config.cache.mode == "cached":
        yield open_cache(config, snapshot=snapshot)
        return
    _check_live(config)
    layers = config.objective_layers
    device = resolve_device(config.train.device)
    with Sandbox(
        decode_limits(config.decode),
        num_children=config.decode.num_children or config.extract.cpus_per_actor,
    ) as sandbox:
        shards = index_shards(expand(config.data.shards))
        featurizer = featurizer_of(config, device=device)
        warn_of_scores(config, featurizer.teachers)
        source = LiveSource(
            shards,
            video_extensions=config.data.video_extensions,
            max_video_bytes=config.decode.max_video_bytes,
            policy=config.view_policy,
            num_views=config.views.num,
            sandbox=sandbox,
            featurizer=featurizer,
            layers=layers,
        )
        yield Opened(
            source=source,
            coverage=f"{source.num_samples} clips, live teachers",
            snapshot=fingerprint(
                {
                    "base": declared_base(config),
                    "columns": [
                        declared_column(config, teacher, layer)
                        for teacher, chosen in layers.items()
                        for layer in chosen
                    ],
                    "weights": {
                        name: teacher.weights_sha256
                        for name, teacher in featurizer.teachers.items()
                    },
                    "shards": sorted(shard.shard_id for shard in shards),
                }
            ),
            commits=None,
            encoding=LIVE_ENCODING,
            widths=source.widths,
            codecs={k: make_codec(LIVE_ENCODING, width=w) for k, w in source.widths.items()},
            statistics={},
        )


def _check_live(config: RunConfig) -> None:
    """What live teachers cannot give."""
    gaps = config.plan_gaps()
    if gaps:
        raise UsageError(f"objective asks for what `masks` does not plan: {'; '.join(gaps)}")
    if config.objective.normalise in NEEDS_STATISTICS:
        raise UsageError(
            f"objective.normalise={config.objective.normalise} needs the statistics of a cache: "
            "with cache.mode=live use layer_norm, l2 or none"
        )


def begun_with(folder: Path) -> Snapshot | None:
    """What the run in a folder reads of its cache, if it has come to a checkpoint."""
    return load_snapshot(folder) if any((folder / CHECKPOINTS).glob("step-*.pt")) else None


def open_cache(config: RunConfig, *, snapshot: Snapshot | None = None) -> Opened:
    """The cache as a source of clips, checked against the config as far as that goes.

    Args:
        config: The run.
        snapshot: What a run that goes on began with; None takes what is committed now.

    Raises:
        UsageError: If there is no cache.
        MismatchError: If it was made for another config (its mask plan included), or lacks
            something that the run asks for or began with.
    """
    device = resolve_device(config.train.device)
    cache = Cache.open(config.cache.dir)
    cache.check(declared_base(config), declared_only=True)
    cache.check_masks(config.mask_schedule)
    columns = {
        (teacher, layer): column_id(teacher, layer, config.cache.encoding)
        for teacher, layers in config.objective_layers.items()
        for layer in layers
    }
    for (teacher, layer), column in columns.items():
        cache.columns.check(column, declared_column(config, teacher, layer), declared_only=True)
    reader = CacheReader(
        cache,
        num_views=config.views.num,
        columns=tuple(columns.values()),
        shards=expected_shards(cache, [p for s in config.data.shards for p in expand_braces(s)]),
        allow_partial=config.cache.allow_partial,
        snapshot=snapshot,
    )
    logger.info("%s", reader.coverage.describe())
    return Opened(
        source=_Cached(reader=reader),
        coverage=reader.coverage.describe(),
        snapshot=reader.snapshot_sha256,
        commits=reader.snapshot,
        encoding=config.cache.encoding,
        widths={key: reader.width(column) for key, column in columns.items()},
        codecs={key: reader.codec(column).to(device) for key, column in columns.items()},
        statistics=statistics_of(reader, columns, config.objective, device),
    )


def student_of(config: RunConfig, opened: Opened) -> tuple[Student, Predictor, list[TargetSpec]]:
    """A fresh student, what predicts from it, and what must be predicted.

    Raises:
        UsageError: If a tap does not exist, or not every layer has one; if `student.init` cannot
            be loaded.
    """
    specs = _targets(config, opened)
    student = build_student(
        config.student,
        config.clip.grid,
        sorted({s.tap for s in specs}),
        seed=config.train.seed,
        grad_checkpointing=config.train.grad_checkpointing,
    )
    if config.student.init is not None:
        load_init(student, config.student.init)
    return student, _predictor(config, student, specs), specs


def _predictor(config: RunConfig, student: Student, specs: Sequence[TargetSpec]) -> Predictor:
    """Heads for the units that are seen, or decoders for those that are not."""
    seed, settings = config.train.seed + 1, config.student
    if config.objective.kind == "visible":
        _warn_of_copies(config)
        return build_heads(
            {spec.name: _head(student, spec, settings) for spec in specs},
            seed=seed,
            mix_width=student.num_features if settings.mix else None,
        )
    decoders = {
        teacher: DecoderSpec(
            taps={s.tap: student.tap_shape(s.tap) for s in specs if s.teacher == teacher},
            targets={s.name: s.width for s in specs if s.teacher == teacher},
            width=settings.decoder.width or student.num_features,
            depth=settings.decoder.depth,
            head=settings.head,
        )
        for teacher in config.objective_layers
    }
    return build_decoders(decoders, config.clip.grid, seed=seed)


def _warn_of_copies(config: RunConfig) -> None:
    for name in config.objective_layers:
        if config.teachers[name].kind in ("pixels", "hog"):
            logger.warning(
                "teacher %s is nearly the student's own input where that is visible: a degenerate "
                "control; objective.kind=masked predicts it where it is hidden",
                name,
            )


def _targets(config: RunConfig, opened: Opened) -> list[TargetSpec]:
    specs = []
    layer_weights = config.objective.layer_weights or {}
    for teacher, layers in config.objective_layers.items():
        named = (config.student.taps or {}).get(teacher)
        taps = named or default_taps(config.student, len(layers))
        if len(taps) != len(layers):
            raise UsageError(
                f"student.taps.{teacher} names {len(taps)} taps for {len(layers)} layers: name "
                "one for every layer"
            )
        for layer, tap in zip(layers, taps, strict=True):
            specs.append(
                TargetSpec(
                    teacher=teacher,
                    layer=layer,
                    tap=tap,
                    column=column_id(teacher, layer, opened.encoding),
                    width=opened.widths[teacher, layer],
                    weight=config.teachers[teacher].weight,
                    layer_weight=layer_weights.get(teacher, {}).get(layer, 1.0),
                    decode=opened.codecs[teacher, layer].decode,
                    statistics=opened.statistics.get((teacher, layer)),
                )
            )
    return specs


def _head(student: Student, spec: TargetSpec, config: StudentConfig) -> HeadSpec:
    tokens, width = student.tap_shape(spec.tap)
    return HeadSpec(
        tap=spec.tap, tokens=tokens, width_in=width, width_out=spec.width, kind=config.head
    )


def identity_of(config: RunConfig, opened: Opened) -> dict[str, Any]:
    """What decides the weights that come out; paths, devices, memory and logging do not."""
    init = config.student.init
    identity = {
        "clip": config.clip.model_dump(mode="json"),
        "student": config.student.model_dump(mode="json", exclude={"init"}),
        "init": None if init is None else weights_sha256(init),
        "objective": config.objective.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude=set(FREE_SETTINGS)),
        "masks": asdict(config.mask_schedule),
        "views": config.views.num,
        "weights": {name: teacher.weight for name, teacher in config.teachers.items()},
        "source": {"mode": config.cache.mode, "encoding": opened.encoding},
        "snapshot": opened.snapshot,
    }
    plain: dict[str, Any] = json.loads(canonical_json(identity))  # checkpoints hold no enums
    return plain


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise UsageError(
            f"another process trains in {folder}: wait for it, or choose another run_dir"
        ) from None


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, and only that."""
    for name in ("checkpoints", "tensorboard", "export", "replay", "report", "pictures"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = ("metrics.jsonl", "config.yaml", "evaluation.json", "features.npz", "report.md")
    for name in (*files, SNAPSHOT_FILE):
        (folder / name).unlink(missing_ok=True)
