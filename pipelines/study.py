"""The study of docs/results.md: `make study`.

Draws the folds of the demo's task, checks their controls, fills a cache a fold, runs the
ablations of `configs/study/`, and writes the page. Everything finds out what is done
already: hours of work may be spread over many calls, and a record of a finished run is
kept in `docs/results/records`, also where its weights are gone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kdhiera.ablation.records import RunRecord
from kdhiera.ablation.study import StudyPart, write_study
from kdhiera.config.ablation import PlannedRun, load_ablation
from kdhiera.demo.controls import (
    Clips,
    pooled_features,
    read_clips,
    run_controls,
)
from kdhiera.demo.prepare import draw_fold, prepare
from kdhiera.demo.task import SPLITS, TaskSpec
from kdhiera.errors import IncompleteError, KdhieraError
from kdhiera.pipelines.ablate import ablate, kept_records
from kdhiera.pipelines.pretrain import run, say_on_stdout
from kdhiera.progress import Progress
from kdhiera.results import Control
from kdhiera.stages.extract_teachers import extract
from kdhiera.storage import write_atomic

PARTS = ("study", "labels", "fresh")
ROOT = Path("demo-data")
FOLDS = 4
PAGE = Path("docs/results.md")
RESULTS = Path("docs/results")
CONTROLS = RESULTS / "controls.json"
EVALUATED = Path("runs/study/both")
IMAGE_CONTROL = "image teacher, pooled"


def study(parts: Sequence[str], overrides: Sequence[str], progress: Progress) -> None:
    """Do what is missing of some parts, and write the page over all of them.

    Args:
        parts: Names of ablations in `configs/study/`; none only writes the page.
        overrides: Dotted overrides of each of them, such as `seeds=[0]`.
        progress: Where progress is shown.

    Raises:
        KdhieraError: If the cut-outs cannot be had, or a control does not hold.
        IncompleteError: If runs failed; all parts were tried, and the page is written.
    """
    failed = []
    if parts:
        _check_task()
    for part in parts:
        path = _path(part)
        config, runs = load_ablation(path, overrides)
        done = kept_records(config, runs)
        _fill_caches([run for run in runs if run.name not in done], progress)
        say_on_stdout(f"== {part} ==")
        try:
            say_on_stdout(ablate(path, overrides, progress=progress).describe())
        except IncompleteError as error:
            say_on_stdout(str(error))
            failed.append(part)
        _check_image_teacher()
        write_page()
    say_on_stdout(str(write_page()))
    if failed:
        raise IncompleteError(f"runs of {', '.join(failed)} failed: see their reports")


def write_page() -> Path:
    """Write `docs/results.md` and its pictures from the records and controls that there are."""
    found = []
    for part in PARTS:
        config, runs = load_ablation(_path(part))
        records: tuple[RunRecord, ...] = tuple(kept_records(config, runs).values())
        found.append(StudyPart(config=config, records=records, expected=len(runs)))
    return write_study(PAGE, RESULTS, found, _known_controls())


def _path(part: str) -> Path:
    return Path("configs/study") / f"{part}.yaml"


def _check_task() -> None:
    """Draw all folds and run the controls that need no teacher, unless that was done."""
    say_on_stdout("== task ==")
    if not prepare(ROOT, progress=say_on_stdout).train:
        raise KdhieraError("the study needs the demo's cut-outs, which cannot be had here")
    for fold in range(FOLDS):
        shards = draw_fold(ROOT, fold, progress=say_on_stdout)
        if fold not in _known_controls():
            _add_controls(fold, run_controls(_clips(shards)))
    failed = [
        f"fold {fold}: {one.name}"
        for fold, controls in _known_controls().items()
        for one in controls
        if not one.holds
    ]
    if failed:
        raise KdhieraError(
            f"the labelled task is not fit for a study, controls do not hold: {'; '.join(failed)}; "
            f"mend the task, and remove {CONTROLS} to check it again"
        )


def _check_image_teacher() -> None:
    """The control that needs the image teacher, once a fold was evaluated."""
    for fold in range(FOLDS):
        known = {one.name for one in _known_controls().get(fold, ())}
        features = EVALUATED / f"seed-{fold}" / "features.npz"
        if IMAGE_CONTROL in known or not features.is_file():
            continue
        splits = _clips(draw_fold(ROOT, fold, progress=say_on_stdout))
        found = run_controls(splits, image_features=pooled_features(features, "image teacher"))
        _add_controls(fold, [one for one in found if one.name not in known])


def _clips(shards: Path) -> dict[str, Clips]:
    size_px = TaskSpec().size_px
    return {
        name: read_clips(sorted(shards.glob(f"{name}-*.tar")), size_px=size_px) for name in SPLITS
    }


def _known_controls() -> dict[int, list[Control]]:
    if not CONTROLS.is_file():
        return {}
    document = json.loads(CONTROLS.read_text())
    return {int(fold): [Control.from_json(row) for row in rows] for fold, rows in document.items()}


def _add_controls(fold: int, found: Sequence[Control]) -> None:
    known = _known_controls()
    known[fold] = [*known.get(fold, []), *found]
    for one in found:
        say_on_stdout(f"fold {fold}: {one.name}: {'holds' if one.holds else 'DOES NOT HOLD'}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {str(fold): [asdict(one) for one in known[fold]] for fold in sorted(known)}
    write_atomic(CONTROLS, f"{json.dumps(document, indent=1)}\n".encode())


def _fill_caches(runs: Sequence[PlannedRun], progress: Progress) -> None:
    """Extract what the runs need; what is there already costs a look."""
    filled = set()
    for planned in runs:
        config = planned.config
        key = (config.cache.dir, config.cache.encoding, config.views.num)
        if config.cache.mode == "live" or key in filled:
            continue
        filled.add(key)
        say_on_stdout(f"== {config.cache.dir}, {config.cache.encoding}, {key[2]} views ==")
        extract(config, progress=progress)


def main(arguments: list[str] | None = None) -> int:
    """Command line: parts and overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhiera.pipelines.study",
        description="examples:\n"
        "  python -m kdhiera.pipelines.study\n"
        "  python -m kdhiera.pipelines.study --part study seeds=[0]\n"
        "  python -m kdhiera.pipelines.study --page\n\n"
        "Run what is missing of the study and write docs/results.md; stopped, it goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the ablations")
    options = parser.parse_args(arguments)
    parts = () if options.page else tuple(options.part or PARTS)
    return run(lambda progress: study(parts, options.overrides, progress))


if __name__ == "__main__":
    sys.exit(main())
