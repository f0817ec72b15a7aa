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
    if how == "mount" and not may_mount(tmp_path):
        pytest.skip("no file system may be mounted here; the other case still fills up")
    script = Path(__file__).with_name("full_disk.py")
    command = [sys.executable, str(script), str(tmp_path), how]
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
    assert "run the same command again; what was committed is kept" in error
    assert went_on == "went on"
