from pathlib import Path

import pytest

from kdhiera.demo.prepare import Prepared, prepare

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def demo() -> Prepared:
    """The demo's data and teachers; made by `make pipeline`, or here if it has not run."""
    return prepare(REPOSITORY / "demo-data")
