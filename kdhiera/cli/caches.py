"""Commands that look after a cache."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdhiera.cli.common import AsJson, command, emit, load
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
    from kdhiera.cache.repair import repair as mend

    opened = _open_cache(cache)
    found = checking.verify(opened)
    if repair:
        found = mend(opened, found)
    emit(found, found.describe, as_json)
    if any(not problem.drops for problem in found.problems) or (found.problems and not repair):
        raise typer.Exit(ExitCode.FAILED)


@command("drop", "kdhiera cache drop caches/demo image.9.int8", to=cache_app)
def cache_drop(
    cache: CacheAt,
    column: Annotated[str, typer.Argument(metavar="COLUMN", help="Such as image.9.int8.")],
) -> None:
    """Remove a column from a cache, so that it is not there for any reader."""
    from kdhiera.cache.drop import drop_column

    typer.echo(drop_column(_open_cache(cache), column).describe())


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
