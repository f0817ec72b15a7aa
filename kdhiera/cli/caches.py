"""Commands that look after a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdhiera.cli.common import AsJson, Config, Overrides, command, emit, load
from kdhiera.errors import ExitCode

cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a cache.")


CacheAt = Annotated[
    str, typer.Argument(metavar="CACHE", help="A config (.yaml), a folder, or s3://bucket/prefix.")
]


def _open_cache(where: str) -> Any:
    from kdhiera.cache.commit import Cache

    is_config = where.endswith((".yaml", ".yml"))
    return Cache.open(load(where).cache.dir if is_config else where)


@command(
    "verify",
    "kdhiera cache verify configs/demo.yaml",
    "kdhiera cache verify caches/demo --repair",
    to=cache_app,
)
def cache_verify(
    cache: CacheAt,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove the commits of what is damaged.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a cache and list what is missing or wrong.

    Repair removes commits only; the next extraction computes what they named again.
    """
    from kdhiera.cache import verify as checking

    opened = _open_cache(cache)
    found = checking.verify(opened)
    if repair:
        found = checking.repair(opened, found)
    emit(found, found.describe, as_json)
    if any(not problem.drops for problem in found.problems) or (found.problems and not repair):
        raise typer.Exit(ExitCode.FAILED)


@command("drop", "kdhiera cache drop caches/demo image.9.int8", to=cache_app)
def cache_drop(
    cache: CacheAt,
    column: Annotated[str, typer.Argument(metavar="COLUMN", help="Such as image.9.int8.")],
) -> None:
    """Remove a column from a cache, so that it is not there for any reader."""
    from kdhiera.cache.verify import drop_column

    opened = _open_cache(cache)
    count = drop_column(opened, column)
    typer.echo(f"dropped   {column} of {opened.url}: {count:,} commits")


@command(
    "bench-encodings",
    "kdhiera cache bench-encodings configs/demo.yaml",
    "kdhiera cache bench-encodings configs/demo.yaml cache.compact_error=0.01 --clips 256",
    to=cache_app,
)
def cache_bench_encodings(
    config: Config,
    overrides: Overrides = None,
    clips: Annotated[
        int, typer.Option("--clips", min=4, max=100_000, help="Clips; half of them calibrate.")
    ] = 128,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the plot; the run's encodings/.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every encoding on clips of the config's shards through its teachers.

    Stored bits, errors, nearest neighbours and speed, and a plot of rate against distortion;
    needs no cache and writes nothing into one.
    """
    run = load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.bench_encodings import bench_encodings

    with make_progress() as progress:
        bench = bench_encodings(run, num_clips=clips, folder=out, progress=progress)
    emit(bench, bench.describe, as_json)
