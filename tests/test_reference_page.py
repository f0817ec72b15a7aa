"""docs/configuration.md is what the models say, and they say something of every setting."""

import re
from pathlib import Path

from pydantic import BaseModel

from kdhiera.config.ablation import AblationConfig
from kdhiera.config.reference import reference
from kdhiera.config.run import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    made = reference()
    assert made == PAGE.read_text(), (
        "run `python -m kdhiera.config.reference > docs/configuration.md`"
    )


def names(model: type[BaseModel]) -> set[str]:
    """Every field of a model and of the sections in it, by the models' own JSON schema."""
    schema = model.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return {name for found in objects for name in found.get("properties", {})}


def test_every_setting_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    sections = set(re.findall(r"^## `(?:.*\.)?(\w+?)(?:\[\]|\.NAME)?`$", PAGE.read_text(), re.M))
    told = {name for name, *_ in rows}
    assert names(RunConfig) | names(AblationConfig) <= told | sections
    assert not [name for name, kind, _, meaning in rows if not meaning and kind != "section"]


def test_types_bounds_and_defaults_are_told() -> None:
    page = PAGE.read_text()
    assert "| `batch_size` | integer, >= 1 | `256` | Clips of an optimiser step, all" in page
    assert '| `keep` | `plan` \\| `all` | `"plan"` |' in page
    assert "| `shards` | list of text | **required** |" in page
