"""Stage 2: train the student, from the cache alone or with live teachers.

From the cache it opens no shard, no video and no teacher: the cache's records say what
the columns are, and the config is compared with them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdhiera.cache.fingerprint import canonical_json
from kdhiera.cache.layout import column_id
from kdhiera.cache.snapshot import SNAPSHOT_FILE, Snapshot, save_snapshot
from kdhiera.config import RunConfig, StudentConfig, dump
from kdhiera.data.patterns import expand
from kdhiera.data.shards import index_shards
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import UsageError
from kdhiera.objective.targets import TargetSpec
from kdhiera.progress import Progress, human_seconds
from kdhiera.stages.distillation.source import (
    Opened,
    begun_with,
    check_live,
    open_cache,
    open_source,
)
from kdhiera.stages.environment import record_environment
from kdhiera.stages.export import provenance_of
from kdhiera.storage import write_atomic
from kdhiera.student.base import Student
from kdhiera.student.build import build_student, taps_of
from kdhiera.student.decoder import DecoderSpec, build_decoders
from kdhiera.student.export import export
from kdhiera.student.heads import HeadSpec, build_heads
from kdhiera.student.initial import load_init
from kdhiera.student.official import weights_sha256
from kdhiera.training.loop import TrainSummary, check_resumable, num_steps, train
from kdhiera.training.ranks import ALONE, Ranks
from kdhiera.training.step import Predictor

logger = logging.getLogger(__name__)

BLOCK_ROWS = 128  # neighbours kept together in the sample order: one Zarr shard
LOCK_SECONDS = 30.0  # for ranks that were started anew while those before them still die
FREE_SETTINGS = (  # of `train`: they do not decide the weights that come out
    "device", "log_every", "save_every", "keep_last", "prefetch", "num_threads",
    "grad_checkpointing", "accumulate", "num_workers", "use_gpu", "max_failures",
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
    config: RunConfig,
    *,
    progress: Progress,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    stop: threading.Event | None = None,
) -> DistillSummary:
    """Train the student and export it; `launch` starts several ranks that do so together.

    Args:
        config: The run.
        progress: Where progress is shown.
        resume: Refuse to start anew.
        overwrite: Throw an earlier run in the same folder away.
        ranks: Who trains together; all call this alike.
        stop: See `train`.

    Raises:
        UsageError: If there is no cache, or a tap or layer does not exist.
        MismatchError: If cache or run folder were made for another config.
        StoppedError: After SIGTERM or SIGINT, with a checkpoint.
        RankLostError: If another rank dies.
    """
    folder = Path(config.run_dir)
    ranks.num_clips(config.train)
    if resume and not (folder / "checkpoints").is_dir():
        raise UsageError(f"--resume: there is no checkpoint in {folder}")
    snapshot = ranks.first(lambda: _snapshot(config, ranks, anew=overwrite))
    with open_source(config, snapshot, ranks) as opened:
        student, heads, specs = student_of(config, opened)
        _check_phases(config, num_steps(config.train, opened.source.num_samples))
        resolve_precision(config.train.precision, resolve_device(config.train.device))
        identity = identity_of(config, opened)

        def begin() -> None:
            if overwrite:
                clear(folder)
            check_resumable(folder, identity)
            if opened.commits is not None:
                save_snapshot(folder, opened.commits)
            write_atomic(folder / "config.yaml", dump(config).encode())
            record_environment(folder, "distill", device=resolve_device(config.train.device))

        def end() -> None:
            export(
                student,
                config.student,
                folder / "export",
                name=config.name,
                provenance=provenance_of(
                    config, coverage=opened.coverage, steps=summary.steps, settings=identity
                ),
            )

        with locked(folder, ranks):
            ranks.first(begin)
            summary = train(
                student=student,
                heads=heads,
                targets=specs,
                source=opened.source,
                masks=config.mask_schedule,
                num_views=config.views.num,
                objective=config.objective,
                config=config.train,
                run_dir=folder,
                identity=identity,
                progress=progress,
                block=BLOCK_ROWS,
                ranks=ranks,
                stop=stop,
            )
            ranks.first(end)
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
        check_live(config)
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


def _snapshot(config: RunConfig, ranks: Ranks, *, anew: bool) -> Snapshot | None:
    """What a run reads of its cache, which may grow between one rank's look and another's."""
    begun = None if anew else begun_with(Path(config.run_dir))
    if begun is None and ranks.size > 1 and config.cache.mode == "cached":
        return open_cache(config).commits
    return begun


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
        taps = taps_of(config.student, teacher, len(layers))
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
def locked(folder: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """One run at a time in a run folder; the first rank holds the lock for all.

    Raises:
        UsageError: If another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        try:
            lock.acquire(timeout=0 if ranks.size == 1 else LOCK_SECONDS)
        except Timeout:
            raise UsageError(
                f"another process trains in {folder}: wait for it, or choose another run_dir"
            ) from None

    ranks.first(acquire)
    try:
        yield
    finally:
        lock.release()


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and only that."""
    for name in ("checkpoints", "tensorboard", "export", "replay", "report", "pictures", "ray"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = ("metrics.jsonl", "config.yaml", "evaluation.json", "features.npz", "report.md")
    for name in (*files, SNAPSHOT_FILE):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    from kdhiera.stages.distillation.launch import main

    sys.exit(main())
