"""The command line: parse, call, print. Stages are imported inside their commands."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from kdhiera.cli.caches import cache_app, replay_app
from kdhiera.cli.common import EXIT_CODES, Debug, show_debug, with_examples
from kdhiera.cli.configs import config_app
from kdhiera.cli.datasets import data_app
from kdhiera.cli.runs import run_app
from kdhiera.errors import ExitCode, KdhieraError
from kdhiera.stopping import ignore_signals, stopping_at_once

logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app)
app.add_typer(run_app)
app.add_typer(replay_app)
app.add_typer(
    config_app,
    name="config",
    cls=with_examples(
        TyperGroup,
        ("kdhiera config show configs/demo.yaml", "kdhiera config check configs/demo.yaml"),
    ),
)


app.add_typer(
    cache_app,
    name="cache",
    cls=with_examples(
        TyperGroup,
        (
            "kdhiera cache verify configs/demo.yaml",
            "kdhiera cache verify caches/demo --repair",
            "kdhiera cache info configs/demo.yaml",
            "kdhiera cache bad configs/demo.yaml",
            "kdhiera cache diff configs/demo.yaml views.num=3",
            "kdhiera cache ls caches",
            "kdhiera cache drop caches/demo image.8.int8",
            "kdhiera cache gc caches/demo --yes",
            "kdhiera cache bench-encodings configs/demo.yaml",
        ),
    ),
)


@app.callback(
    cls=with_examples(
        TyperGroup,
        (
            "kdhiera pack my-videos my-shards",
            "kdhiera init my.yaml --videos my-shards",
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
    debug: Debug = False,
) -> None:
    """Cheap teacher-guided pre-training of hierarchical video transformers."""
    if version:
        from kdhiera import __version__

        typer.echo(f"kdhiera {__version__}")
        raise typer.Exit
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("kdhiera").setLevel(logging.WARNING if quiet else logging.INFO)
    if debug:
        show_debug()


def main() -> None:
    """Entry point: one sentence and an exit code for what a user can mend."""
    try:
        with stopping_at_once():
            app(prog_name="kdhiera")
    except KdhieraError as error:
        logger.debug("where it comes from", exc_info=error)
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        logger.debug("where it comes from", exc_info=error)
        where = f" {error.filename}" if error.filename else ""
        typer.echo(
            f"error: {error.strerror or error}:{where}; correct the path, or free it", err=True
        )
        sys.exit(ExitCode.FAILED)
    finally:
        ignore_signals()  # what the command came to stands while the interpreter shuts down
