from pathlib import Path

import pytest

from kdhiera.demo.assets import Assets, fetch

DEMO_DATA = Path(__file__).parents[2] / "demo-data"


@pytest.fixture(scope="session")
def assets() -> Assets:
    """The demo's own assets, fetched once into the repository's `demo-data`."""
    return fetch(DEMO_DATA)


@pytest.fixture(scope="session")
def demo_data(assets: Assets) -> Path:
    return DEMO_DATA
