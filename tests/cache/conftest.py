import tempfile
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for many small caches that no disk matters to."""
    there = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=there if there.is_dir() else tmp_path) as made:
        yield Path(made)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks of shapes and types, which make small caches ten times slower.

    The same calls are checked in the other tests.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
