"""Every setting as a page of documentation, from the models themselves.

python -m kdhiera.config.reference > docs/configuration.md
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdhiera.config.ablation import AblationConfig
from kdhiera.config.run import RunConfig

_HEAD = """# Configuration

One YAML file describes a run; `key.sub=value` after it on the command line overrides a setting
(`train.epochs=50`). An unknown key is an error that names the nearest one. `kdhiera config show
CONFIG` prints a run with all defaults. Times are in seconds, sizes in pixels and bytes.

This page is made from the models of `kdhiera/config/`.
"""

_ABLATION = """
# Ablations

The file of `kdhiera ablate` ([how](ablations.md)); `base` names the file of a run.
"""


def reference() -> str:
    """The page, in Markdown."""
    run = "".join(_sections(RunConfig, ""))
    return f"{_HEAD}{run}{_ABLATION}{''.join(_sections(AblationConfig, ''))}"


def _sections(model: type[BaseModel], path: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    within: list[tuple[str, type[BaseModel]]] = []
    meanings = _meanings(model)
    rows = []
    for name, field in model.model_fields.items():
        inner = _models(field.annotation)
        if inner:
            within.append((f"{path}{name}{_index(field.annotation)}", inner[0]))
        if not inner or path or name in meanings:
            rows.append(
                f"| `{name}` | {_type(field)} | {_default(field)} | {meanings.get(name, '')} |\n"
            )
    summary = (inspect.getdoc(model) or "").partition("\n\nAttributes:")[0]
    title = f"`{path.rstrip('.')}`" if path else "The file itself"
    yield f"\n## {title}\n\n{summary}\n"
    if rows:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
    for name, inner_model in within:
        yield from _sections(inner_model, f"{name}.")


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring's `Attributes` say of each field, a line each."""
    listed = (inspect.getdoc(model) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", listed):
        name, colon, meaning = entry.strip().partition(":")
        if colon:
            found[name] = " ".join(meaning.split()).replace("|", "\\|")
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a field holds, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in _models(part)]


def _index(annotation: Any) -> str:
    """How entries of a field that holds several sections are written."""
    origin = typing.get_origin(annotation)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return ".NAME"
    return "[]" if origin is tuple else ""


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _name(args[0])
    if origin is Literal:
        return " \\| ".join(f"`{json.dumps(a) if isinstance(a, bool) else a}`" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(a) for a in args)
    if origin is tuple:
        kinds = [a for a in args if a is not Ellipsis]
        return (
            f"list of {_name(kinds[0])}" if Ellipsis in args else f"{len(kinds)} x {_name(args[0])}"
        )
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of {_name(args[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " \\| ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    known = {str: "text", int: "integer", float: "number", bool: "`true` \\| `false`"}
    return "null" if annotation is type(None) else known.get(annotation, "any value")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "below"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        value = [entry.model_dump(mode="json", exclude_none=True) for entry in value]
    elif isinstance(value, Enum):
        value = value.value
    return f"`{json.dumps(value, default=list)}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
