"""Commands about a run's configuration."""

from __future__ import annotations

import typer

from kdhiera.cli.common import AsJson, Config, Overrides, command, load

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
