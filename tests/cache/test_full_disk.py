import re
import subprocess
import sys
from pathlib import Path

import pytest
from mounts import may_mount, namespace


@pytest.mark.slow
@pytest.mark.parametrize(("how", "errors"), [("pages", 40), ("inodes", 50), ("limit", 1)])
def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(
    tmp_path: Path, how: str, errors: int
):
    if how != "limit" and not may_mount(tmp_path):
        pytest.skip("no file system may be mounted here; the other case still fills up")
    script = Path(__file__).with_name("full_disk.py")
    command = [sys.executable, str(script), str(tmp_path), how]
    done = subprocess.run(
        command if how == "limit" else [*namespace(), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, went_on = done.stdout.splitlines()
    assert re.fullmatch(
        r"the disk of .* takes no more \(.*; [\d,]+ bytes( and 0 files)? free\): free some space "
        "and run the same command again; what was committed is kept",
        error,
    )
    count = re.fullmatch(r"went on after (\d+) errors", went_on)
    assert count
    assert int(count[1]) >= errors


@pytest.mark.parametrize("how", ["mount", "limit"])
def test_so_is_a_full_disk_where_parts_for_a_bucket_are_staged(
    tmp_path: Path, how: str, s3_url: str
):
    if how == "mount" and not may_mount(tmp_path):
        pytest.skip("no file system may be mounted here; the other case still fills up")
    script = Path(__file__).with_name("full_staging.py")
    command = [sys.executable, str(script), str(tmp_path), how, s3_url]
    done = subprocess.run(
        command if how == "limit" else [*namespace(), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, went_on = done.stdout.splitlines()
    assert f"the disk of {tmp_path}/" in error
    assert "takes no more" in error
    assert "or set TMPDIR to a folder on another disk, and run the same command again" in error
    assert went_on == "went on"
