import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdhiera import staging

MAKE_AND_WAIT = """
import sys, time
from kdhiera import staging
folder = staging.new_folder()
(folder / "zarr.json").write_bytes(b"x" * 1000)
print(folder, flush=True)
time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_made_and_removed(temporary):
    first, second = staging.new_folder(), staging.new_folder()
    assert first.is_dir()
    assert first != second
    assert first.parent == temporary
    (first / "sub").mkdir()
    (first / "sub" / "x").write_bytes(b"1")
    for folder in (first, first, second):
        staging.remove_folder(folder)
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(temporary):
    environment = {**os.environ, "TMPDIR": str(temporary)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE_AND_WAIT],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in "ab"
    ]
    folders = []
    for process in processes:
        assert process.stdout is not None
        folders.append(Path(process.stdout.readline().strip()))
    own = staging.new_folder()
    assert all((folder / "zarr.json").exists() for folder in folders)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    staging.remove_folder(staging.new_folder())
    assert not folders[0].exists()
    assert (folders[1] / "zarr.json").exists()
    assert own.is_dir()
    processes[1].kill()
    for process in processes:
        process.communicate()
    staging.remove_folder(own)
    staging.remove_folder(staging.new_folder())
    assert list(temporary.iterdir()) == []


def test_other_files_there_are_left_alone(temporary):
    (temporary / "kdhiera-other").mkdir()
    (temporary / "something.lock").touch()
    staging.remove_folder(staging.new_folder())
    assert sorted(p.name for p in temporary.iterdir()) == ["kdhiera-other", "something.lock"]
