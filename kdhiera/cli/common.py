"""What every command shares: its help, its arguments, how a result is printed."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from kdhiera.errors import KdhieraError

if TYPE_CHECKING:
    from kdhiera.config import RunConfig

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 wrong config or input, nothing started; 3 refused: made for "
    "another configuration; 4 too much bad data; 5 some shards or runs failed, run again; 75 "
    "stopped, run again to go on."
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides: train.epochs=50"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]


def with_examples(base: type[Any], examples: tuple[str, ...]) -> type[Any]:
    """A command class whose help begins with examples."""

    class WithExamples(base):  # type: ignore[misc]
        def format_help(self, ctx: object, formatter: Any) -> None:
            formatter.write("Examples:\n" + "".join(f"  {line}\n" for line in examples) + "\n")
            super().format_help(ctx, formatter)

    return WithExamples


def show_debug() -> None:
    """Log all that kdhiera says, tracebacks of errors among it."""
    logging.getLogger("kdhiera").setLevel(logging.DEBUG)


def command(
    name: str, *examples: str, to: typer.Typer
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose help begins with examples and ends with the exit codes."""
    cls = with_examples(TyperCommand, examples)
    registered = to.command(name, cls=cls, epilog=EXIT_CODES)
    return lambda function: registered(_with_debug(function))


def _with_debug(function: Callable[..., None]) -> Callable[..., None]:
    """The same command with one more option, so that `--debug` may also stand at the end."""

    @functools.wraps(function)
    def called(*, debug: bool, **arguments: Any) -> None:
        if debug:
            show_debug()
        function(**arguments)

    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    parameters = [*signature.parameters.values(), option]
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def load(config: str, overrides: list[str] | None = None) -> RunConfig:
    """The run's configuration."""
    from kdhiera.config import load as read_config

    return read_config(config, overrides or ())


@contextmanager
def json_of_errors(as_json: bool) -> Iterator[None]:
    """Print what was done nevertheless as JSON, where an error within says it."""
    try:
        yield
    except KdhieraError as error:
        if as_json and error.result is not None:
            typer.echo(json.dumps(error.result.to_json(), indent=2))
        raise


def emit(result: Any, lines: Callable[[], str], as_json: bool) -> None:
    """Print a result for people, or as JSON."""
    typer.echo(json.dumps(result.to_json(), indent=2) if as_json else lines())
