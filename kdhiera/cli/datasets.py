"""Commands that come before a run: packing videos, writing a config, checking a machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from kdhiera.cli.common import AsJson, Overrides, command, emit
from kdhiera.errors import ExitCode, UsageError

data_app = typer.Typer()


class Labels(StrEnum):
    """Where labels come from when a folder is packed."""

    FOLDER = "folder"


@command(
    "pack",
    "kdhiera pack my-videos my-shards",
    "kdhiera pack my-videos my-shards --labels folder --split validation=0.1 --split test=0.1",
    "kdhiera pack my-videos.csv my-shards --split-column split --shuffle",
    "kdhiera pack my-videos my-shards --shard-mb 1000 --max-per-shard 5000",
    to=data_app,
)
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of videos with all below it, or a .csv (or .tsv) with a column `path` "
            "and labels in the others.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the shards; it is made.")],
    labels: Annotated[
        Labels | None,
        typer.Option("--labels", help="folder: the first folder below SOURCE is label `class`."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            metavar="NAME=SHARE",
            help="Share of the videos for shards of this name, such as validation=0.1, chosen by "
            "a hash of the path; the rest is `train`. May be repeated.",
        ),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option("--split-column", help="Column of the table that names the split.")
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Mix the videos; otherwise in order of path.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of --shuffle and --split.")] = 0,
    shard_mb: Annotated[
        float, typer.Option("--shard-mb", min=0.001, help="Size of a shard at most, in MB.")
    ] = 256,
    max_per_shard: Annotated[
        int, typer.Option("--max-per-shard", min=1, help="Videos of a shard at most.")
    ] = 1000,
    extension: Annotated[
        list[str] | None,
        typer.Option("--extension", help="Files that end in this are videos too. May be repeated."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Leave out videos that cannot be read."),
    ] = True,
    max_bad_fraction: Annotated[
        float,
        typer.Option(
            "--max-bad-fraction", min=0, max=1, help="More that cannot be packed end with code 4."
        ),
    ] = 0.1,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that look at videos; 0: one a CPU.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what was packed there, and start anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pack videos into WebDataset tar shards, byte by byte as they are.

    Videos that cannot be read are left out and listed in OUT/skipped.csv. Stopped or killed,
    the same command goes on, and the shards come out the same.
    """
    shares = dict(_share(text) for text in split or ())
    from kdhiera.progress import make_progress
    from kdhiera.stages.pack import pack as run_pack
    from kdhiera.stages.packing.order import EXTENSIONS, PackSettings

    settings = PackSettings(
        shard_bytes=round(shard_mb * 1e6),
        max_per_shard=max_per_shard,
        folder_labels=labels is Labels.FOLDER,
        splits=shares,
        split_column=split_column,
        shuffle=shuffle,
        seed=seed,
        check=check,
        extensions=(*EXTENSIONS, *(e.lower().removeprefix(".") for e in extension or ())),
        max_bad_fraction=max_bad_fraction,
        num_children=workers,
    )
    with make_progress() as progress:
        summary = run_pack(source, out, settings=settings, overwrite=overwrite, progress=progress)
    emit(summary, summary.describe, as_json)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)


def _share(text: str) -> tuple[str, float]:
    """A split and its share, from `validation=0.1`."""
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise UsageError(
            f"--split {text}: write a name and a share, such as validation=0.1"
        ) from None


class Teachers(StrEnum):
    """Which teachers a config is written for."""

    DEMO = "demo"
    BASE = "base"


@command(
    "init",
    "kdhiera init my.yaml --videos 'my-shards/*.tar'",
    "kdhiera init my.yaml --videos my-shards --teachers base",
    "kdhiera init my.yaml --videos 's3://videos/train-{000..099}.tar' --force",
    to=data_app,
)
def init(
    config_out: Annotated[
        str, typer.Argument(metavar="CONFIG_OUT", help="The YAML file to write.")
    ],
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="[PATTERN]...", help="The same as --videos.")
    ] = None,
    videos: Annotated[
        list[str] | None,
        typer.Option(
            "--videos",
            metavar="PATTERN",
            help="Your shards: a folder of them, paths or s3:// addresses with globs and braces. "
            "May be repeated.",
        ),
    ] = None,
    teachers: Annotated[
        Teachers | None,
        typer.Option(
            "--teachers",
            help="demo: the demo's small ones; base: DINOv2-B and VideoMAE-B. By default demo "
            "where these are there and no GPU is.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at your shards and write a config that fits them, with comments.

    Sizes, frame rates and lengths of some videos decide the clips; labels and splits, if there
    are any, the evaluation.
    """
    patterns = [*(videos or ()), *(shards or ())]
    if not patterns:
        raise UsageError("name your shards: kdhiera init my.yaml --videos 'my-shards/*.tar'")
    from kdhiera.progress import make_progress
    from kdhiera.stages.initialise import initialise
    from kdhiera.stages.initialising import fit as init_fit

    chosen = None if teachers is None else init_fit.Teachers(teachers.value)
    with make_progress() as progress:
        summary = initialise(config_out, patterns, teachers=chosen, force=force, progress=progress)
    emit(summary, summary.describe, as_json)


@command(
    "doctor",
    "kdhiera doctor",
    "kdhiera doctor configs/demo.yaml",
    "kdhiera doctor configs/demo.yaml cache.dir=s3://bucket/caches/demo --json",
    to=data_app,
)
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="Checked too: the run's YAML file.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and a config's run on it.

    Versions, devices, decoders (a clip is made and decoded), Ray (is started), disks, limits,
    the bucket of the cache (an object is written and removed). With a config, also all that
    `kdhiera config check` looks at. Exit code 1 if something does not work.
    """
    from kdhiera.stages.doctor import examine

    checks = examine(config, overrides or ())
    emit(checks, checks.describe, as_json)
    if checks.failed:
        raise typer.Exit(ExitCode.FAILED)
