"""From a YAML file and overrides to a config, and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from kdhiera.addresses import redact, refuse_secrets
from kdhiera.config.run import RunConfig
from kdhiera.config.teachers import TeacherConfig
from kdhiera.errors import UsageError


class ConfigError(UsageError):
    """Values that are no config.

    Args:
        where: What was read.
        problems: All that is wrong, one sentence each.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{where}: {'; '.join(problems)}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply `key.sub=value` overrides.

    Args:
        path: The YAML file.
        overrides: Dotted assignments; values are parsed as YAML.

    Raises:
        UsageError: With one sentence: the file is not there or no YAML, a key is unknown
            (the nearest valid one is named), or a value is wrong.
    """
    raw = read_raw(path)
    for override in overrides:
        apply(raw, override)
    return parse_run(raw, str(path))


def parse_run(raw: Mapping[str, Any], where: str) -> RunConfig:
    """A run from plain values.

    Args:
        raw: Sections by name.
        where: Begins the message when something is wrong.

    Raises:
        UsageError: With one sentence.
    """
    config = parse(RunConfig, raw, where)
    _refuse_secrets(config)
    return config


def read_raw(path: str | Path) -> dict[str, Any]:
    """Plain values of a YAML file that holds a mapping.

    Raises:
        UsageError: If there is no such file, or it holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no config file at {file}: name an existing YAML file")
    try:
        raw = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{file} must hold a mapping of sections, got {type(raw).__name__}")
    return raw


_Model = TypeVar("_Model", bound=BaseModel)


def parse(model: type[_Model], raw: Mapping[str, Any], where: str) -> _Model:
    """A model from plain values; see `parse_run`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(where, _explain(error, model)) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _refuse_secrets(config: RunConfig) -> None:
    """A config is kept with its run and its addresses in the cache."""
    addresses = {"data.shards": config.data.shards, "cache.dir": (config.cache.dir,)}
    if config.evaluate is not None:
        for split in ("train", "validation", "test"):
            addresses[f"evaluate.{split}"] = getattr(config.evaluate, split)
    for name, teacher in config.teachers.items():
        addresses[f"teachers.{name}.weights"] = (teacher.weights or "",)
    addresses["student.init"] = (config.student.init or "",)
    for what, values in addresses.items():
        for address in values:
            refuse_secrets(address, what)


def apply(raw: dict[str, Any], override: str) -> None:
    """Set one value, in place.

    Args:
        raw: Sections by name.
        override: `key.sub=value`; the value is parsed as YAML.

    Raises:
        UsageError: If it does not read so, or a part of the key is a value.
    """
    key, found, value = override.partition("=")
    if not found or not key:
        raise UsageError(f"override {override!r} must read key.sub=value, such as train.epochs=50")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"override {override!r}: the value is not valid YAML") from None
    assign(raw, key, parsed)


def assign(raw: dict[str, Any], key: str, value: object) -> None:
    """Set the value of a dotted key, in place; see `apply`."""
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"override {key!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """All problems, unknown keys with their nearest valid neighbour."""
    lines = []
    found = error.errors()
    for item in found:
        inside = [o for o in found if o is not item and o["loc"][: len(item["loc"])] == item["loc"]]
        if item["type"] == "too_short" and inside:
            continue  # short only because what is wrong in it was left out
        where = ".".join(str(p) for p in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(item["loc"][-1]), _valid_keys(model, item["loc"][:-1]), n=1, cutoff=0.5
            )
            prefix = "".join(f"{p}." for p in item["loc"][:-1])
            valid = _list_keys(model, item["loc"][:-1])
            hint = f"; did you mean `{prefix}{near[0]}`?" if near else valid
            lines.append(f"unknown key `{where}`{hint}")
        elif item["type"] == "missing":
            lines.append(f"`{where}` is required")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
            got = item["input"]
            shown = "" if isinstance(got, dict | BaseModel) else f", got {redact(repr(got))}"
            lines += [f"`{where}`: {message}{shown}"] if item["loc"] else message.splitlines()
    return lines


def _list_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    keys = _valid_keys(model, loc)
    return f"; valid here: {', '.join(keys)}" if keys else ""


def _valid_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `loc` (mapping levels, such as a teacher's name, pass)."""
    section: type[BaseModel] | None = model
    for part in loc:
        if section is None:
            return []
        if part == "teachers":
            section = TeacherConfig
        elif part in section.model_fields:
            kinds = _sections(section.model_fields[str(part)].annotation)
            section = kinds[0] if kinds else None
    return list(section.model_fields) if section else []


def _sections(annotation: object) -> list[type[BaseModel]]:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
