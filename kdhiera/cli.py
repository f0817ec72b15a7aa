"""The command line: parse, call, print. Stages are imported inside their commands."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kdhiera.errors import ExitCode, KdhieraError

if TYPE_CHECKING:
    from kdhiera.config import RunConfig

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 wrong config or input, nothing started; 3 refused: made for "
    "another configuration; 4 too much bad data; 5 some shards failed, run again; 75 stopped, "
    "run again to go on."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a cache.")
config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a run's configuration."
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides: train.epochs=50"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _with_examples(base: type[Any], examples: tuple[str, ...]) -> type[Any]:
    """A command class whose help begins with examples."""

    class WithExamples(base):  # type: ignore[misc]
        def format_help(self, ctx: object, formatter: Any) -> None:
            formatter.write("Examples:\n" + "".join(f"  {line}\n" for line in examples) + "\n")
            super().format_help(ctx, formatter)

    return WithExamples


def _command(
    name: str, *examples: str, to: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    cls = _with_examples(TyperCommand, examples)
    return to.command(name, cls=cls, epilog=EXIT_CODES)


app.add_typer(
    config_app,
    name="config",
    cls=_with_examples(TyperGroup, ("kdhiera config show configs/demo.yaml",)),
)


app.add_typer(
    cache_app,
    name="cache",
    cls=_with_examples(
        TyperGroup,
        (
            "kdhiera cache verify configs/demo.yaml",
            "kdhiera cache verify caches/demo --repair",
            "kdhiera cache drop caches/demo image.9.int8",
        ),
    ),
)


@app.callback(
    cls=_with_examples(
        TyperGroup,
        (
            "kdhiera extract-teachers configs/demo.yaml",
            "kdhiera distill configs/demo.yaml train.epochs=50",
            "kdhiera evaluate configs/demo.yaml",
            "kdhiera show configs/demo.yaml",
        ),
    ),
    epilog=EXIT_CODES,
    invoke_without_command=True,
)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")] = False,
) -> None:
    """Cheap teacher-guided pre-training of hierarchical video transformers."""
    if version:
        from kdhiera import __version__

        typer.echo(f"kdhiera {__version__}")
        raise typer.Exit
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def _load(config: str, overrides: list[str] | None) -> RunConfig:
    from kdhiera.config import load

    return load(config, overrides or ())


def _emit(result: Any, lines: Callable[[], str], as_json: bool) -> None:
    typer.echo(json.dumps(result.to_json(), indent=2) if as_json else lines())


@_command(
    "extract-teachers",
    "kdhiera extract-teachers configs/demo.yaml",
    "kdhiera extract-teachers configs/demo.yaml --dry-run",
    "kdhiera extract-teachers configs/demo.yaml 'data.shards=/data/k400-{000..099}.tar'",
)
def extract_teachers(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the teachers over the shards and store features and scores in the cache.

    Computes what the config needs and the cache lacks; stopped or killed, the same command
    goes on. Bad videos become rows with a status.
    """
    run = _load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.extract_teachers import extract

    with make_progress() as progress:
        summary = extract(
            run,
            progress=progress,
            dry_run=dry_run,
            on_plan=lambda plan: typer.echo(plan.describe(), err=as_json),
        )
    _emit(summary, summary.describe, as_json)


@_command(
    "distill",
    "kdhiera distill configs/demo.yaml",
    "kdhiera distill configs/demo.yaml train.epochs=50 objective.loss=cosine",
    "kdhiera distill configs/demo.yaml cache.mode=live --overwrite",
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
    run = _load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.distill import distill as run_distill

    with make_progress() as progress:
        summary = run_distill(run, progress=progress, resume=resume, overwrite=overwrite)
    _emit(summary, summary.describe, as_json)


@_command(
    "evaluate",
    "kdhiera evaluate configs/demo.yaml",
    "kdhiera evaluate configs/demo.yaml evaluate.neighbours=5 --json",
)
def evaluate(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure the frozen student by k-NN and linear probe on held-out labelled clips.

    A student of random weights and the pooled teachers stand beside it.
    """
    run = _load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.evaluate import evaluate as run_evaluate

    with make_progress() as progress:
        summary = run_evaluate(run, progress=progress)
    _emit(summary, summary.describe, as_json)


@_command(
    "show",
    "kdhiera show configs/demo.yaml",
    "kdhiera show configs/demo.yaml --clips 3 --out pictures",
)
def show(
    config: Config,
    overrides: Overrides = None,
    clips: Annotated[int, typer.Option("--clips", min=1, max=50, help="Clips to draw.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; by default the run's pictures/.")
    ] = None,
) -> None:
    """Draw clips as PNG: frames, scores, mask, PCA of teacher and student features."""
    run = _load(config, overrides)
    from kdhiera.progress import make_progress
    from kdhiera.stages.show import show as run_show

    with make_progress() as progress:
        paths = run_show(run, num_clips=clips, folder=out, progress=progress)
    for path in paths:
        typer.echo(str(path))


@_command(
    "show",
    "kdhiera config show configs/demo.yaml",
    "kdhiera config show configs/demo.yaml student.size=tiny",
    to=config_app,
)
def config_show(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved configuration: the file, the overrides and all defaults."""
    run = _load(config, overrides)
    from kdhiera.config import dump

    typer.echo(run.model_dump_json(indent=2) if as_json else dump(run), nl=as_json)


CacheAt = Annotated[
    str, typer.Argument(metavar="CACHE", help="A config (.yaml), a folder, or s3://bucket/prefix.")
]


def _open_cache(where: str) -> Any:
    from kdhiera.cache.commit import Cache

    is_config = where.endswith((".yaml", ".yml"))
    return Cache.open(_load(where, None).cache.dir if is_config else where)


@_command(
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
    _emit(found, found.describe, as_json)
    if any(not problem.drops for problem in found.problems) or (found.problems and not repair):
        raise typer.Exit(ExitCode.FAILED)


@_command("drop", "kdhiera cache drop caches/demo image.9.int8", to=cache_app)
def cache_drop(
    cache: CacheAt,
    column: Annotated[str, typer.Argument(metavar="COLUMN", help="Such as image.9.int8.")],
) -> None:
    """Remove a column from a cache, so that it is not there for any reader."""
    from kdhiera.cache.verify import drop_column

    opened = _open_cache(cache)
    count = drop_column(opened, column)
    typer.echo(f"dropped   {column} of {opened.url}: {count:,} commits")


def main() -> None:
    """Entry point: one sentence and an exit code for what a user can mend."""
    try:
        app()
    except KdhieraError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        typer.echo(
            f"error: {error.strerror or error}:{where}; correct the path, or free it", err=True
        )
        sys.exit(ExitCode.FAILED)
