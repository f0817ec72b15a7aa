"""All that can be known of a run before it works: nothing is computed and nothing written.

Each check stands by itself, so that one problem does not hide another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from kdhiera.config import ConfigError, EvaluateConfig, RunConfig, load
from kdhiera.data.patterns import expand
from kdhiera.data.shards import ShardIndex, try_index_shards
from kdhiera.data.tars import ShardError
from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import ExitCode, KdhieraError, MismatchError, UsageError
from kdhiera.evaluation.attentive import check_heads
from kdhiera.progress import counted
from kdhiera.stages.cache_diff import diff_cache
from kdhiera.stages.checks import Check, Checks, attempt, fail, ok, warn
from kdhiera.stages.clips import labels_at, spread
from kdhiera.stages.distill import identity_of
from kdhiera.stages.distillation.source import begun_with, open_cache
from kdhiera.stages.evaluating.labelled import SPLITS
from kdhiera.stages.extraction.plan import existing_cache, identities_of, resolve_precisions
from kdhiera.student.base import Student
from kdhiera.student.build import build_student, taps_of
from kdhiera.student.initial import load_init
from kdhiera.teachers.base import Teacher
from kdhiera.teachers.build import build_named_teacher, check_teachers
from kdhiera.training.loop import CHECKPOINTS, check_resumable, num_steps
from kdhiera.training.ranks import Ranks

_SHOWN_PROBLEMS = 5
_LABELLED = 500  # samples of a split whose labels are read


def check_config(path: str, overrides: Sequence[str] = ()) -> Checks:
    """Hold a config against everything it names.

    Teachers are loaded, as extraction does first of all: only then is it known whether their
    weights and layers are there.

    Args:
        path: The YAML file.
        overrides: Dotted assignments.

    Returns:
        The checks; their exit code is 2 for what is wrong, and 3 where nothing is wrong but the
        cache or the run folder, which were made for another configuration.
    """
    try:
        config = load(path, overrides)
    except ConfigError as error:
        return Checks(checks=tuple(fail("config", p, ExitCode.USAGE) for p in error.problems))
    except UsageError as error:
        return Checks(checks=(fail("config", str(error), error.exit_code),))
    return Checks(checks=(ok("config", f"{path} can be read"), *check_run(config)))


def check_run(config: RunConfig) -> tuple[Check, ...]:
    """The same for a config that has been read."""
    shards, shard_checks = _shards("shards", config.data.shards, config)
    teachers, teacher_checks = _teachers(config)
    student, student_checks = _student(config)
    return (
        _clips(config),
        _masks(config),
        *shard_checks,
        *_devices(config),
        *teacher_checks,
        *student_checks,
        *_cache(config, teachers),
        *_steps(config, sum(len(shard.samples) for shard in shards)),
        *_run_folder(config),
        *_evaluation(config, student),
    )


def _clips(config: RunConfig) -> Check:
    grid = config.clip.grid
    slots, rows, columns = grid.units
    return ok(
        "clips",
        f"{grid.num_frames} x {grid.height} x {grid.width}, {slots} x {rows} x {columns} mask "
        f"units; {counted(config.views.num, 'view')} of every video",
    )


def _masks(config: RunConfig) -> Check:
    gaps = config.plan_gaps()
    if gaps:
        words = f"objective asks for what `masks` does not plan: {'; '.join(gaps)}; plan it there"
        return fail("masks", words, ExitCode.USAGE)
    return ok("masks", f"the cache keeps {config.mask_plan.describe()}; training asks for no more")


def _shards(
    name: str, patterns: Sequence[str], config: RunConfig
) -> tuple[list[ShardIndex], list[Check]]:
    """The shards that patterns name, and what is to be said of them."""
    checks: list[Check] = []
    paths: list[str] = []
    for pattern in patterns:
        try:
            paths += expand([pattern])
        except KdhieraError as error:
            said = str(error).removeprefix("data.shards: ")  # the name says which they are
            checks.append(fail(name, said, ExitCode.USAGE))
    shards: list[ShardIndex] = []
    problems: list[str] = []
    for found in try_index_shards(list(dict.fromkeys(paths))):
        if isinstance(found, ShardError):
            checks.append(fail(name, f"{found}: mend or remove it", ExitCode.USAGE))
            continue
        problems += [f"{found.path}: {problem}" for problem in found.problems]
        shards.append(found)
    same = {shard.shard_id: shard.path for shard in shards}
    checks += [
        fail(
            name,
            f"{shard.path} and {same[shard.shard_id]} are the same: list it once",
            ExitCode.USAGE,
        )
        for shard in shards
        if same[shard.shard_id] != shard.path
    ]
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        words = [
            *problems[:_SHOWN_PROBLEMS],
            *([f"and {more} more like these"] if more > 0 else []),
        ]
        checks.append(warn(name, "\n".join(words)))
    if shards:
        samples = sum(len(shard.samples) for shard in shards)
        checks.append(ok(name, f"{counted(len(shards), 'shard')}, {counted(samples, 'sample')}"))
        without = _without_videos(shards, config.data.video_extensions)
        said = f"{without:,} of {samples:,} samples have no video (data.video_extensions)"
        if without == samples:
            checks.append(fail(name, said, ExitCode.USAGE))
        elif without:
            checks.append(warn(name, said))
    return shards, checks


def _without_videos(shards: Sequence[ShardIndex], extensions: Sequence[str]) -> int:
    wanted = {extension.lower().removeprefix(".") for extension in extensions}
    return sum(
        not any(member.extension.rpartition(".")[2] in wanted for member in sample.members)
        for shard in shards
        for sample in shard.samples
    )


def _devices(config: RunConfig) -> Iterator[Check]:
    def resolved(name: str, precision: str) -> str:
        device = resolve_device(name)
        dtype = str(resolve_precision(precision, device)).removeprefix("torch.")
        return f"on {device}, matrix products in {dtype}"

    yield attempt("extraction", lambda: resolved(config.extract.device, "auto"))
    yield attempt("training", lambda: resolved(config.train.device, config.train.precision))


def _teachers(config: RunConfig) -> tuple[dict[str, Teacher], list[Check]]:
    """The teachers that can be loaded, on the CPU, and what is to be said of them all."""
    checks: list[Check] = []
    teachers: dict[str, Teacher] = {}
    device = torch.device("cpu")
    for name, settings in config.teachers.items():
        try:
            teachers[name] = build_named_teacher(config, name, device=device)
            alone = config.model_copy(update={"teachers": {name: settings}})
            check_teachers(alone, teachers, device=device, must_run=False)
        except KdhieraError as error:
            checks.append(fail(f"teacher {name}", str(error), error.exit_code))
        else:
            of = settings.weights or settings.model or settings.kind
            checks.append(ok(f"teacher {name}", f"layers {', '.join(settings.layers)} of {of}"))
    return teachers, checks


def _student(config: RunConfig) -> tuple[Student | None, list[Check]]:
    """The student with all taps that heads read, if it can be built."""
    checks: list[Check] = []
    taps: list[str] = []
    settings = config.student
    for teacher, layers in config.objective_layers.items():
        try:
            taps += taps_of(settings, teacher, len(layers))
        except UsageError as error:
            checks.append(fail("student", str(error), error.exit_code))
    student = None
    try:
        student = build_student(settings, config.clip.grid, sorted(set(taps)), seed=0)
        if settings.init is not None:
            load_init(student, settings.init)
    except KdhieraError as error:
        checks.append(fail("student", str(error), error.exit_code))
    if student is not None and not checks:
        count = sum(weight.numel() for weight in student.backbone.parameters()) / 1e6
        read_at = ", ".join(sorted(set(taps)))
        words = f"{settings.kind} {settings.size}, {count:.1f} M weights, read at {read_at}"
        checks.append(ok("student", words))
    return student, checks


def _cache(config: RunConfig, teachers: Mapping[str, Teacher]) -> Iterator[Check]:
    """Whether the cache, if there is one, is for this run."""
    where = config.cache.dir
    try:
        diff = diff_cache(config)
        if not diff.exists:
            yield ok("cache", f"{where}: not there yet, extraction makes it")
            return
        if set(teachers) == set(config.teachers):
            _compare_weights(config, teachers)
    except KdhieraError as error:
        yield fail("cache", str(error), error.exit_code)
        return
    if diff.changes:
        words = "\n".join(diff.describe().splitlines()[1:])
        yield fail("cache", f"{where} was made for another run:\n{words}", ExitCode.REFUSED)
        return
    yield ok("cache", f"{where}: extraction {'; '.join(diff.extract)}; training {diff.distill}")


def _compare_weights(config: RunConfig, teachers: Mapping[str, Teacher]) -> None:
    """Hold the loaded teachers against those that the cache was made with.

    Raises:
        MismatchError: With the fields that differ.
    """
    cache = existing_cache(config)
    assert cache is not None
    identities = identities_of(resolve_precisions(config), teachers)
    asked: list[Callable[[], None]] = [partial(cache.check, identities.base)]
    asked += [
        partial(cache.columns.check, column, identity)
        for column, identity in identities.columns.items()
        if cache.columns.identity(column) is not None
    ]
    differ: list[str] = []
    for ask in asked:
        try:
            ask()
        except MismatchError as error:
            differ.append(str(error))
    if differ:
        raise MismatchError("\n".join(differ))


def _steps(config: RunConfig, num_samples: int) -> Iterator[Check]:
    if not num_samples:
        return  # said of the shards

    def steps() -> str:
        Ranks(size=config.train.num_workers).num_clips(config.train)
        count = num_steps(config.train, num_samples)
        ratios = len(config.mask_schedule.phases)
        if ratios > count:
            raise UsageError(
                f"objective.ratio names {ratios} ratios for equal shares of {count} steps: name "
                "fewer, or train for longer"
            )
        return f"{count:,} of {config.train.batch_size} clips, if all videos are good"

    yield attempt("steps", steps)
    if config.train.max_steps is None and config.train.warmup_epochs >= config.train.epochs:
        yield warn(
            "steps",
            f"train.warmup_epochs={config.train.warmup_epochs:g} is all of "
            f"train.epochs={config.train.epochs}: the learning rate never comes down",
        )


def _run_folder(config: RunConfig) -> Iterator[Check]:
    """Whether a run that is there already would be gone on with."""
    folder = Path(config.run_dir)
    if not any((folder / CHECKPOINTS).glob("step-*.pt")):
        yield ok("run", f"{folder}: nothing trained there yet")
        return
    if config.cache.mode == "live":
        yield ok("run", f"{folder}: holds a run; with live teachers only training can compare it")
        return
    try:
        opened = open_cache(config, snapshot=begun_with(folder))
        check_resumable(folder, identity_of(config, opened))
    except (MismatchError, UsageError) as error:
        yield fail("run", str(error), ExitCode.REFUSED)
    except KdhieraError as error:
        yield fail("run", str(error), error.exit_code)
    else:
        yield ok("run", f"{folder}: training goes on with the run that is there")


def _evaluation(config: RunConfig, student: Student | None) -> Iterator[Check]:
    settings = config.evaluate
    if settings is None:
        yield ok("evaluation", "none: the config has no `evaluate` section")
        return
    found: dict[str, list[ShardIndex]] = {}
    for split in SPLITS:
        found[split], checks = _shards(f"evaluate.{split}", getattr(settings, split), config)
        yield from checks
    yield from _shared(found)
    yield from _labels(settings, found)
    if student is not None and "attentive" in settings.methods:
        yield attempt("evaluation", lambda: _heads(settings, student))


def _shared(found: Mapping[str, Sequence[ShardIndex]]) -> Iterator[Check]:
    """Shards that are learnt from and reported on."""
    seen: dict[str, str] = {}
    for split, shards in found.items():
        for shard in shards:
            other = seen.setdefault(shard.shard_id, split)
            if other != split:
                words = f"{shard.path} is in {other} as well: results on clips that were learnt"
                yield warn(f"evaluate.{split}", words)


def _labels(settings: EvaluateConfig, found: Mapping[str, Sequence[ShardIndex]]) -> Iterator[Check]:
    """Whether labels are there, and what is learnt is what is asked; some samples are read."""
    values: dict[str, dict[str, set[str]]] = {}
    for split, shards in found.items():
        places = [(shard, i) for shard in shards for i in range(len(shard.samples))]
        values[split] = {}
        for labels in labels_at(spread(places, _LABELLED)):
            for label, value in labels.items():
                values[split].setdefault(label, set()).add(str(value))
    learnt = values["train"]
    if not found["train"]:
        return  # said of the shards
    wanted = settings.labels or tuple(sorted(learnt.keys() - set(settings.groups)))
    missing = [label for label in (*wanted, *settings.groups) if label not in learnt]
    if missing or not wanted:
        words = (
            f"the clips of evaluate.train have no label {', '.join(missing) or 'at all'}; they "
            f"have: {', '.join(sorted(learnt)) or 'none'}"
        )
        yield fail("labels", words, ExitCode.USAGE)
        return
    for label in wanted:
        classes = counted(len(learnt[label]), "value")
        lacking = [
            s for s in SPLITS if found[s] and not learnt[label] & values[s].get(label, set())
        ]
        if len(learnt[label]) < 2:
            yield warn("labels", f"{label}: {classes} in training: there is nothing to tell apart")
        elif lacking:
            yield warn("labels", f"{label}: none of its values in training is in {lacking[0]}")
        else:
            yield ok("labels", f"{label}: {classes} in training")


def _heads(settings: EvaluateConfig, student: Student) -> str:
    check_heads(student.num_features, settings.attentive.heads)
    return f"attentive probe with {settings.attentive.heads} heads"
