"""The main job: extract, distill, evaluate, report. `python -m kdhiera.pipelines.pretrain`.

Every stage finds out what is done already, so running it again costs little.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from kdhiera.config import RunConfig, load
from kdhiera.errors import ExitCode, KdhieraError
from kdhiera.masking import MaskSchedule
from kdhiera.progress import Progress, make_progress
from kdhiera.report.claim import claim_lines, claim_table, claims
from kdhiera.report.pages import (
    CacheFacts,
    Picture,
    ReportData,
    TargetFacts,
    TrainingFacts,
    write_report,
)
from kdhiera.report.tables import to_text
from kdhiera.results import Control
from kdhiera.stages.distill import DistillSummary
from kdhiera.stages.distillation.launch import launch
from kdhiera.stages.evaluate import EvaluateSummary, evaluate
from kdhiera.stages.extract_teachers import ExtractSummary, extract
from kdhiera.stages.show import Kind, draw
from kdhiera.training.metrics import read_metrics

NUM_PICTURES = 2
STUDENTS = {"hiera": "Hiera", "vit": "plain ViT"}
PICTURED = (Kind.CLIPS, Kind.MASKS, Kind.AGREEMENT)

Say = Callable[[str], None]
Controls = Callable[[EvaluateSummary], tuple[Control, ...]]


def pretrain(
    config: RunConfig, *, progress: Progress, say: Say, controls: Controls | None = None
) -> Path:
    """Run all stages of a config and write its report.

    Args:
        config: The run.
        progress: Where progress is shown.
        say: Takes what each stage has to tell.
        controls: Checks of the labelled task, given the evaluation.

    Returns:
        Path of `report.md`.
    """
    say("== extract ==")
    extracted = extract(config, progress=progress)
    say(extracted.describe())
    say("\n== distill ==")
    distilled = launch(config, progress=progress)
    say(distilled.describe())
    evaluated = None
    checks: tuple[Control, ...] = ()
    if config.evaluate is not None:
        say("\n== evaluate ==")
        evaluated = evaluate(config, progress=progress)
        say(evaluated.describe())
        if controls is not None:
            checks = controls(evaluated)
    drawing = draw(config, kinds=PICTURED, num_clips=NUM_PICTURES, progress=progress)
    data = ReportData(
        name=config.name,
        facts=_facts(config),
        cache=_cache_facts(config, extracted),
        training=_training_facts(config, distilled),
        records=read_metrics(Path(config.run_dir)),
        results=evaluated.results if evaluated else (),
        comparisons=evaluated.comparisons if evaluated else (),
        per_class=evaluated.per_class if evaluated else (),
        num_groups=evaluated.num_groups if evaluated else {},
        controls=checks,
        pictures=tuple(
            Picture(caption=drawn.caption, figure=drawn.figure) for drawn in drawing.pictures
        ),
    )
    path = write_report(Path(config.run_dir), data)
    if evaluated is not None:
        found = claims(evaluated.results, evaluated.comparisons)
        say("\n== does distillation beat a random student? ==")
        say(to_text(claim_table(found)))
        for line in claim_lines(found):
            say(line)
    say("\n== report ==")
    say(str(path))
    for picture in sorted((path.parent / "report").glob("*.png")):
        say(str(picture))
    return path


def run(job: Callable[[Progress], None]) -> int:
    """Run a pipeline's job under progress bars; errors become one sentence and a status."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        with make_progress() as progress:
            job(progress)
    except KdhieraError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped: run the same command again to go on\n")
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def say_on_stdout(line: str) -> None:
    """Results go to stdout at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _ratios(masks: MaskSchedule) -> str:
    return ", then ".join(f"{spec.ratio:g}" for spec in masks.phases)


def _facts(config: RunConfig) -> dict[str, str]:
    clip, masks, o = config.clip, config.mask_schedule, config.objective
    facts = {
        "clip": f"{clip.num_frames} frames of {clip.height} x {clip.width} px",
        "student": f"{STUDENTS[config.student.kind]} {config.student.size}",
        "masks": f"{masks.widest.strategy}, ratio {_ratios(masks)}, {config.views.num} views x "
        f"{masks.draws} draws",
        "objective": f"{o.kind} units, {o.loss} on {o.normalise} targets",
    }
    for name, layers in config.objective_layers.items():
        teacher = config.teachers[name]
        facts[f"{name} teacher"] = f"{teacher.model or teacher.factory}, layers {', '.join(layers)}"
    return facts


def _cache_facts(config: RunConfig, extracted: ExtractSummary) -> CacheFacts:
    rows = extracted.rows
    return CacheFacts(
        num_samples=sum(rows.values()),
        num_usable=rows.get("ok", 0),
        bad={status: count for status, count in rows.items() if status != "ok"},
        num_bytes=extracted.num_bytes,
        dense_bytes=extracted.dense_bytes,
        columns=extracted.columns,
        seconds=extracted.seconds if extracted.plan.parts else None,
    )


def _training_facts(config: RunConfig, distilled: DistillSummary) -> TrainingFacts:
    t = distilled.training
    names = [f"{name}/{x}" for name, layers in config.objective_layers.items() for x in layers]
    return TrainingFacts(
        steps=t.steps,
        epochs=t.last["epoch"],
        seconds=t.seconds,
        clips_per_second=t.clips / t.seconds,
        data_wait=t.data_wait,
        targets=tuple(
            TargetFacts(
                target=name,
                loss=(t.first[f"loss/{name}"], t.last[f"loss/{name}"]),
                explained=(
                    t.first[f"explained_variance/{name}"],
                    t.last[f"explained_variance/{name}"],
                ),
            )
            for name in names
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: a config and overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhiera.pipelines.pretrain",
        description="examples:\n"
        "  python -m kdhiera.pipelines.pretrain configs/demo.yaml\n"
        "  python -m kdhiera.pipelines.pretrain configs/demo.yaml train.epochs=20\n\n"
        "Extract, distill, evaluate and report; what is done is not done again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    options = parser.parse_args(arguments)

    def job(progress: Progress) -> None:
        pretrain(load(options.config, options.overrides), progress=progress, say=say_on_stdout)

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
