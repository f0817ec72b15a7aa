"""The documents: links lead somewhere, and what they name exists."""

import re
from pathlib import Path

import pytest

from kdhiera.errors import ExitCode

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:kdhiera|stages|pipelines|configs|tests|benchmarks)/[\w/.]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_exit_codes_are_all_told() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert told == {code.value for code in ExitCode}
