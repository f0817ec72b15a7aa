"""File systems of a test's own, without a trace outside it."""

import os
import subprocess
from pathlib import Path


def namespace() -> list[str]:
    """Command prefix under which file systems may be mounted."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", "--mount", *user]


def may_mount(folder: Path) -> bool:
    """Whether they may be here."""
    command = [*namespace(), "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
