"""Commands about a run's configuration."""

from __future__ import annotations

import typer

from kdhiera.cli.common import AsJson, Config, Overrides, command, emit, load

config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a run's configuration."
)


@command(
    "show",
    "kdhiera config show configs/demo.yaml",
    "kdhiera config show configs/demo.yaml student.size=tiny",
    to=config_app,
)
def config_show(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved configuration: the file, the overrides and all defaults."""
    run = load(config, overrides)
    from kdhiera.config import dump

    typer.echo(run.model_dump_json(indent=2) if as_json else dump(run), nl=as_json)


@command(
    "check",
    "kdhiera config check configs/demo.yaml",
    "kdhiera config check configs/demo.yaml train.epochs=50 --json",
    to=config_app,
)
def config_check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Hold a config against all it names, before any work: every problem, not only the first.

    Shards, teachers and their weights, masks, student, cache, run folder, evaluation. Writes
    nothing. Exit code 2 if something is wrong; 3 if only the cache or the run folder were made
    for another configuration.
    """
    from kdhiera.stages.check_config import check_config

    checks = check_config(config, overrides or ())
    emit(checks, checks.describe, as_json)
    if checks.exit_code:
        raise typer.Exit(checks.exit_code)
