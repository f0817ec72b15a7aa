from pathlib import Path

import pytest
from tiny_run import MemorySource, Setup


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(run_dir=tmp_path / "run")
