import os
import subprocess
import sys
from pathlib import Path

import pytest


def namespace() -> list[str]:
    """Command prefix under which file systems may be mounted, without a trace outside."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", "--mount", *user]


def may_mount(folder: Path) -> bool:
    command = [*namespace(), "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("how", ["mount", "limit"])
def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(tmp_path: Path, how: str):
    error = fill_up(tmp_path, how)
    assert "free some space and run the same command again; what was committed is kept" in error


@pytest.mark.parametrize("how", ["mount", "limit"])
def test_so_is_a_full_disk_where_parts_for_a_bucket_are_staged(
    tmp_path: Path, how: str, s3_url: str
):
    error = fill_up(tmp_path, how, s3_url)
    assert f"the disk of {tmp_path}/" in error
    assert "or set TMPDIR to a folder on another disk, and run the same command again" in error


def fill_up(folder: Path, how: str, *url: str) -> str:
    if how == "mount" and not may_mount(folder):
        pytest.skip("no file system may be mounted here; the other case still fills up")
    script = Path(__file__).with_name("full_disk.py")
    command = [sys.executable, str(script), str(folder), how, *url]
    done = subprocess.run(
        [*namespace(), *command] if how == "mount" else command,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, went_on = done.stdout.splitlines()
    assert "takes no more" in error
    assert "bytes free" in error
    assert went_on == "went on"
    return error
