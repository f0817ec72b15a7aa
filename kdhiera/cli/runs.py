"""Commands that run a stage; each imports its stage when it is called."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdhiera.cli.common import (
    AsJson,
    Config,
    Overrides,
    command,
    emit,
    json_of_errors,
    load,
)

run_app = typer.Typer()


class Form(StrEnum):
    """What loads an export."""

    TIMM = "timm"
    HIERA = "hiera"


@command(
    "extract-teachers",
    "kdhiera extract-teachers configs/demo.yaml",
    "kdhiera extract-teachers configs/demo.yaml --dry-run",
    "kdhiera extract-teachers configs/demo.yaml --retry decode_timeout decode.deadline_seconds=60",
    "kdhiera extract-teachers configs/demo.yaml 'data.shards=/data/k400-{000..099}.tar'",
    "kdhiera extract-teachers configs/demo.yaml 'data.shards=s3://videos/k400-*.tar'",
    to=run_app,
)
def extract_teachers(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option(
            "--retry",
            metavar="STATUS",
            help="Try bad rows of this status again (or all), and make parts anew that it mends.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the teachers over the shards and store features and scores in the cache.

    Computes what the config needs and the cache lacks; stopped or killed, the same command
    goes on. Bad videos become rows with a status; `kdhiera cache bad` lists them.
    """
    run = load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.extract_teachers import extract
    from kdhiera.stages.extraction.retry import parse_statuses

    statuses = parse_statuses(retry or ())

    with json_of_errors(as_json), make_progress() as progress:
        summary = extract(
            run,
            progress=progress,
            dry_run=dry_run,
            retry=statuses,
            on_plan=lambda plan: typer.echo(plan.describe(), err=as_json),
        )
    emit(summary, summary.describe, as_json)


@command(
    "plan",
    "kdhiera plan configs/demo.yaml",
    "kdhiera plan configs/demo.yaml cache.encoding=compact views.num=3",
    "kdhiera plan configs/demo.yaml --clips 64 --json",
    to=run_app,
)
def plan(
    config: Config,
    overrides: Overrides = None,
    clips: Annotated[
        int, typer.Option("--clips", min=4, max=100_000, help="Clips that are tried.")
    ] = 32,
    as_json: AsJson = False,
) -> None:
    """Try a few clips and say what the run will take: bytes, hours, free space, break-even.

    Decodes them, runs every teacher, stores them in every encoding and takes a few optimiser
    steps, all in a temporary folder: cache and run are left alone. docs/plan.md says how to
    read it.
    """
    run = load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.plan import plan_run

    with make_progress() as progress:
        summary = plan_run(run, num_clips=clips, progress=progress)
    emit(summary, summary.describe, as_json)


@command(
    "distill",
    "kdhiera distill configs/demo.yaml",
    "kdhiera distill configs/demo.yaml train.epochs=50 objective.loss=cosine",
    "kdhiera distill configs/demo.yaml cache.mode=live --overwrite",
    to=run_app,
)
def distill(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Demand a checkpoint to go on from.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew over an earlier run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the student from the cache; goes on from a checkpoint of the same run.

    Reads neither videos nor teachers, except with cache.mode=live.
    """
    run = load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.distillation.launch import launch

    with make_progress() as progress:
        summary = launch(run, progress=progress, resume=resume, overwrite=overwrite)
    emit(summary, summary.describe, as_json)


@command(
    "evaluate",
    "kdhiera evaluate configs/demo.yaml",
    "kdhiera evaluate configs/demo.yaml 'evaluate.methods=[knn, linear]' --json",
    "kdhiera evaluate configs/demo.yaml 'evaluate.methods=[finetune]'",
    "kdhiera evaluate configs/demo.yaml 'evaluate.labels_per_class=[5, 20]'",
    "kdhiera evaluate configs/demo.yaml evaluate.test_clips=3 evaluate.test_crops=3",
    "kdhiera evaluate configs/demo.yaml 'evaluate.seeds=[0, 1, 2]'",
    to=run_app,
)
def evaluate(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure the student on held-out labelled clips, frozen and fine-tuned.

    Frozen: k-NN, linear probe, attentive probe, beside a student of random weights and the
    pooled teachers. Fine-tuned (evaluate.methods=[finetune]): beside the same student trained
    from scratch. What was measured before is not measured again.
    """
    run = load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.evaluate import evaluate as run_evaluate

    with make_progress() as progress:
        summary = run_evaluate(run, progress=progress)
    emit(summary, summary.describe, as_json)


@command(
    "show",
    "kdhiera show configs/demo.yaml",
    "kdhiera show configs/demo.yaml --what masks,agreement --out slides",
    "kdhiera show configs/demo.yaml --what clips --clips 5",
    "kdhiera show configs/demo.yaml --what statuses --json",
    to=run_app,
)
def show(
    config: Config,
    overrides: Overrides = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--what",
            help="clips, masks, agreement, statuses: some of these, commas between; by default "
            "all that there is material for.",
        ),
    ] = None,
    clips: Annotated[int, typer.Option("--clips", min=1, max=50, help="Clips to draw.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; by default the run's pictures/.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the run as PNGs for a slide, and print their paths.

    clips: frames, scores, mask, features of teachers and student. masks: what every strategy
    and ratio shows. agreement: student against teachers, layer by layer. statuses: rows of the
    cache, and samples that are not good. docs/show.md says how to read them.
    """
    run = load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.show import parse_kinds
    from kdhiera.stages.show import show as run_show

    kinds = parse_kinds(what or ())
    with make_progress() as progress:
        summary = run_show(run, kinds=kinds, num_clips=clips, folder=out, progress=progress)
    emit(summary, summary.describe, as_json)


@command(
    "export",
    "kdhiera export configs/demo.yaml",
    "kdhiera export configs/demo.yaml --out /models/hiera-nano",
    "kdhiera export configs/demo.yaml --to hiera --out hiera_nano.pth",
    to=run_app,
)
def export(
    config: Config,
    overrides: Overrides = None,
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="timm: a folder that timm.create_model loads; hiera: a checkpoint that the "
            "original Hiera loads.",
        ),
    ] = Form.TIMM,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder (timm) or file (hiera); by default the run's export/ and "
            "export/hiera.pth.",
        ),
    ] = None,
) -> None:
    """Write the trained student for others, its model card with what was measured meanwhile."""
    run = load(config, overrides)
    from kdhiera.stages.export import export_original, export_timm

    write = export_timm if to is Form.TIMM else export_original
    typer.echo(str(write(run, out)))


@command(
    "ablate",
    "kdhiera ablate configs/ablations/demo.yaml --dry-run",
    "kdhiera ablate configs/ablations/demo.yaml",
    "kdhiera ablate configs/ablations/demo.yaml seeds=[0,1,2] overrides.train.epochs=20",
    to=run_app,
)
def ablate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The ablation's YAML file.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all variants, print the plan and stop.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew over runs of other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate many variants over one cache; one table, plots and a report.

    All variants are checked against the cache before the first starts. Stopped or killed, the
    same command goes on; finished runs are not run again, and a failed one stops no other.
    """
    from kdhiera.config.ablation import load_ablation

    load_ablation(config, overrides or ())  # a typo is found before the libraries are loaded
    from kdhiera.pipelines.ablate import ablate as run_ablation
    from kdhiera.progress import make_progress

    with json_of_errors(as_json), make_progress() as progress:
        summary = run_ablation(
            config,
            overrides or (),
            progress=progress,
            dry_run=dry_run,
            overwrite=overwrite,
            on_plan=lambda plan: typer.echo(plan.describe(), err=as_json),
        )
    emit(summary, summary.describe, as_json)
