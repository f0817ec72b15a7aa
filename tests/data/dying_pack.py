"""Packs a folder and dies by SIGKILL at a chosen file operation; run by test_pack.py.

Usage: dying_pack.py SOURCE OUT OPERATION; prints how many there were if that was beyond them.
"""

import os
import signal
import sys

from kdhiera.progress import make_progress
from kdhiera.stages.pack import pack
from kdhiera.stages.packing.order import PackSettings

source, out, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0


def hook(event: str, arguments: tuple) -> None:
    global seen
    if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir"):
        if event != "open" or str(arguments[0]).startswith(out):
            seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)


settings = PackSettings(max_per_shard=3, check=False, splits={"validation": 0.3})
sys.addaudithook(hook)
with make_progress() as progress:
    pack(source, out, settings=settings, progress=progress)
print(seen)
