"""Commands that look after a cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdhiera.cli.common import AsJson, Config, Overrides, command, emit, load
from kdhiera.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from kdhiera.cache.commit import Cache
    from kdhiera.config import RunConfig

replay_app = typer.Typer()
cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a cache.")


CacheAt = Annotated[
    str, typer.Argument(metavar="CACHE", help="A config (.yaml), a folder, or s3://bucket/prefix.")
]


def _locate(where: str, overrides: list[str] | None = None) -> tuple[str, RunConfig | None]:
    """Address of a cache, and the config if it was named by one."""
    if where.endswith((".yaml", ".yml")):
        run = load(where, overrides)
        return run.cache.dir, run
    if overrides:
        raise UsageError(
            f"'{overrides[0]}' overrides a setting of a config, and {where} is none: name the "
            "config's .yaml file instead"
        )
    return where, None


def _open_cache(where: str, overrides: list[str] | None = None) -> Cache:
    from kdhiera.cache.commit import Cache

    return Cache.open(_locate(where, overrides)[0])


@command(
    "replay",
    "kdhiera replay caches/demo shard-0003-clip-17",
    "kdhiera replay configs/demo.yaml shard-0003-clip-17 --view 1 --debug",
    "kdhiera replay s3://bucket/caches/k400 KEY --config configs/k400.yaml --json",
    to=replay_app,
)
def replay(
    cache: CacheAt,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A sample's key, or its uid (SHARD/OFFSET/KEY).")
    ],
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="CONFIG", help="Whose shards and teachers to use."),
    ] = None,
    view: Annotated[int | None, typer.Option("--view", min=0, help="Only this view.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one sample through decoding and teachers again and compare it with what is stored.

    Says at every step what it finds, for good rows and bad ones; changes nothing. Without a
    config, shards and teachers are those that the cache records; --debug prints all that FFmpeg
    said. Exit code 1 if something does not come out as it is stored.
    """
    url, run = _locate(cache)
    if config is not None:
        run = load(config)
    from kdhiera.stages.replay_key import replay_key

    debug = logging.getLogger("kdhiera").isEnabledFor(logging.DEBUG)
    found = replay_key(url, key, config=run, view=view, debug=debug)
    emit(found, found.describe, as_json)
    if not found.same:
        raise typer.Exit(ExitCode.FAILED)


@command(
    "verify",
    "kdhiera cache verify configs/demo.yaml",
    "kdhiera cache verify caches/demo --repair",
    "kdhiera cache verify configs/demo.yaml --sources --recompute 16",
    to=cache_app,
)
def cache_verify(
    cache: CacheAt,
    overrides: Overrides = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Hash the shards that it was made from as well.")
    ] = False,
    recompute: Annotated[
        int,
        typer.Option(
            "--recompute",
            metavar="N",
            min=0,
            help="Run the teachers again on N rows of every column and compare; needs a config.",
        ),
    ] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove the commits of what is damaged.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a cache and list what is missing or wrong.

    Repair removes only commits, and what makes a cache or column unreadable; the next
    extraction computes that again. Safe beside running extractions.
    """
    url, run = _locate(cache, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.verify import check_cache

    with make_progress() as progress:
        report = check_cache(
            url, config=run, sources=sources, recompute=recompute, repair=repair, progress=progress
        )
    emit(report, report.describe, as_json)
    if not report.sound:
        raise typer.Exit(ExitCode.FAILED)


@command(
    "drop",
    "kdhiera cache drop caches/demo image.8.int8",
    "kdhiera cache drop caches/demo image.8.int8 --dry-run",
    to=cache_app,
)
def cache_drop(
    cache: CacheAt,
    column: Annotated[str, typer.Argument(metavar="COLUMN", help="Such as image.8.int8.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a column from a cache.

    No reader finds it any more; a training that is reading it ends with an error that says so.
    Its bytes stay until `kdhiera cache gc` frees them.
    """
    from kdhiera.cache.drop import drop_column

    dropped = drop_column(_open_cache(cache), column, dry_run=dry_run)
    emit(dropped, dropped.describe, as_json)


@command(
    "info",
    "kdhiera cache info configs/demo.yaml",
    "kdhiera cache info s3://bucket/caches/k400 --json",
    to=cache_app,
)
def cache_info(cache: CacheAt, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a cache is and holds.

    Clips, masks, rows by status, columns and their bytes, what is missing, who made it.
    Reads records and the sizes of files, no features. Exit code 1 if a record is damaged.
    """
    opened = _open_cache(cache, overrides)
    from kdhiera.cache.info import describe_cache
    from kdhiera.progress import make_progress

    with make_progress() as progress:
        info = describe_cache(opened, progress=progress)
    emit(info, info.describe, as_json)
    if info.damaged:
        raise typer.Exit(ExitCode.FAILED)


@command(
    "bad",
    "kdhiera cache bad configs/demo.yaml",
    "kdhiera cache bad caches/demo --status decode_timeout --json",
    to=cache_app,
)
def cache_bad(
    cache: CacheAt,
    overrides: Overrides = None,
    status: Annotated[
        list[str] | None,
        typer.Option("--status", metavar="STATUS", help="List only rows of this status."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what training cannot use: bad rows with their reasons, and parts that were given up.

    `kdhiera replay` looks at one of them; `kdhiera extract-teachers --retry` tries them again.
    """
    opened = _open_cache(cache, overrides)
    from kdhiera.stages.extraction.retry import parse_statuses
    from kdhiera.stages.list_bad import list_bad

    found = list_bad(opened, parse_statuses(status or ()))
    emit(found, found.describe, as_json)


@command("ls", "kdhiera cache ls caches", "kdhiera cache ls s3://bucket/caches", to=cache_app)
def cache_ls(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder, or s3://bucket/prefix.")
    ] = ".",
    as_json: AsJson = False,
) -> None:
    """List the caches in a folder and below it.

    Size, shards, views, columns, whether complete, last commit; damaged ones as damaged.
    """
    from kdhiera.cache.listing import list_caches
    from kdhiera.progress import make_progress

    with make_progress() as progress:
        listing = list_caches(folder, progress=progress)
    emit(listing, listing.describe, as_json)


@command(
    "diff",
    "kdhiera cache diff configs/demo.yaml",
    "kdhiera cache diff configs/demo.yaml objective.ratio=0.9 views.num=3",
    to=cache_app,
)
def cache_diff(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Hold a run against its cache.

    Says what differs or is missing, and what extraction and training would do. Opens neither
    teachers nor shards; weights are compared by extraction. Exit code 0 if all is there, 5 if
    extraction has something to add, 3 if extraction or training would be refused.
    """
    run = load(config, overrides)
    from kdhiera.stages.cache_diff import diff_cache

    found = diff_cache(run)
    emit(found, found.describe, as_json)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@command(
    "gc",
    "kdhiera cache gc configs/demo.yaml",
    "kdhiera cache gc caches/demo --yes",
    to=cache_app,
)
def cache_gc(
    cache: CacheAt,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; otherwise only look.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove files that no commit names: of dropped columns, lost attempts, dead processes.

    An attempt that has not ended is left alone until twice extract.lease_seconds after it last
    wrote a file. Safe beside a running extraction and training.
    """
    opened = _open_cache(cache)
    from kdhiera.cache.garbage import collect
    from kdhiera.progress import make_progress

    with make_progress() as progress:
        found = collect(opened, remove=yes, progress=progress)
    emit(found, found.describe, as_json)
    if found.problems:
        raise typer.Exit(ExitCode.FAILED)


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
