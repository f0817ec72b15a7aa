"""One run of an ablation, from its config to its record: distill, then evaluate."""

from __future__ import annotations

import os
from pathlib import Path

from kdhiera.ablation.records import RunRecord, curve_of
from kdhiera.cache.fingerprint import fingerprint
from kdhiera.config import RunConfig
from kdhiera.config.ablation import PlannedRun
from kdhiera.errors import MismatchError
from kdhiera.progress import make_progress
from kdhiera.results import load_outcomes
from kdhiera.stages.distill import FREE_SETTINGS, distill, identity_of
from kdhiera.stages.distillation.source import begun_with, open_cache
from kdhiera.stages.evaluate import evaluate
from kdhiera.student.macs import visible_macs
from kdhiera.training.loop import check_resumable
from kdhiera.training.metrics import read_metrics


def trial_identity(run: PlannedRun) -> str:
    """Hash of the settings that decide what a run comes to.

    Where it runs and where it keeps its files is not part of it. Teachers and shards are part
    by their names only: a record is of the settings, and outlives cache and weights.
    """
    plain = run.config.model_dump(mode="json")
    for name in ("name", "run_dir", "extract", "ray", "decode"):
        del plain[name]
    del plain["data"]["licence"]
    for teacher in plain["teachers"].values():
        del teacher["licence"]
    plain["cache"] = {k: plain["cache"][k] for k in ("encoding", "compact_error", "mode")}
    for name in FREE_SETTINGS:
        del plain["train"][name]
    return fingerprint(plain)


def run_trial(run: PlannedRun, *, baselines: Path, overwrite: bool) -> RunRecord:
    """Distill and evaluate; what of it is done is not done again.

    Args:
        run: What to run.
        baselines: Folder that keeps the features of models that no run trains.
        overwrite: Throw a run of other settings in the same folder away; one of the same
            settings goes on all the same, so a worker that is tried again loses no step.
    """
    with open(os.devnull, "w") as nowhere, make_progress(nowhere) as progress:
        try:
            distilled = distill(run.config, progress=progress)
        except MismatchError:
            if not overwrite:
                raise
            distilled = distill(run.config, progress=progress, overwrite=True)
        evaluated = evaluate(run.config, progress=progress, baselines=baselines)
    return RunRecord(
        variant=run.variant,
        seed=run.seed,
        identity=trial_identity(run),
        outcomes=load_outcomes(Path(evaluated.outcomes)),
        curve=curve_of(read_metrics(Path(run.config.run_dir))),
        steps=distilled.training.steps,
        seconds=distilled.training.seconds,
        clip_macs=_clip_macs(run),
    )


def check_folder(config: RunConfig) -> None:
    """Refuse a run folder that holds checkpoints of other settings.

    With live teachers nothing is checked, as these would have to be loaded; training does.

    Raises:
        MismatchError: With the settings that differ.
    """
    folder = Path(config.run_dir)
    snapshot = begun_with(folder)
    if snapshot is not None and config.cache.mode == "cached":
        check_resumable(folder, identity_of(config, open_cache(config, snapshot=snapshot)))


def _clip_macs(run: PlannedRun) -> int:
    """Mean over the ratios that take turns."""
    config = run.config
    ratios = [spec.ratio for spec in config.mask_schedule.phases]
    macs = [visible_macs(config.student, config.clip.grid, ratio) for ratio in ratios]
    return sum(macs) // len(macs)
