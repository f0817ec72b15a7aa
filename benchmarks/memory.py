"""Figure 7: peak resident memory of extraction and of training, by the number of clips.

Every measurement is a process of its own. Teachers are pixels and HOG, so that what is
counted is what the stages hold, not a network's weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from glob import glob
from pathlib import Path

from benchmarks.report import publish
from kdhiera.config import RunConfig, load
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract

SHARDS = "demo-data/shards/train-*.tar"
COPIES = (1, 4)
STEPS = 60
SETTINGS = (
    "teachers={pixels: {kind: pixels}, hog: {kind: hog}}",
    "scores={teacher: pixels, source: uniform}",
    "objective.teachers=[pixels, hog]",
    "ray.enabled=false",
    f"train.max_steps={STEPS}",
)


def run() -> None:
    """Extract the labelled training clips, and the same four times over; train on both."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for copies in COPIES:
            here = Path(folder, str(copies))
            here.mkdir()
            for number in range(copies):
                _copy(here, number)
            where = [
                f"data.shards={here}/*.tar", f"cache.dir={here}/cache", f"run_dir={here}/run"
            ]  # fmt: skip
            clips, peak = _child("extract", where)
            figures[f"extraction of {clips:.0f} clips, MB"] = peak
            clips, peak = _child("train", where)
            figures[f"{STEPS} steps of training on {clips:.0f} clips, MB"] = peak
    fewer, trained_fewer, more, trained_more = figures.values()
    figures["extraction, more / fewer"] = more / fewer
    figures["training, more / fewer"] = trained_more / trained_fewer
    publish("memory", {}, figures)


def _copy(folder: Path, number: int) -> None:
    """All shards once more, with samples of other names."""
    for path in sorted(glob(SHARDS)):
        with (
            tarfile.open(path) as source,
            tarfile.open(folder / f"{number}-{Path(path).name}", "w") as copy,
        ):
            for member in source:
                content = source.extractfile(member)
                member.name = f"{number}-{member.name}"
                copy.addfile(member, content)


def _child(what: str, overrides: list[str]) -> tuple[float, float]:
    """Clips, and the peak resident memory in MB, of one process."""
    code = f"from benchmarks.memory import child; child({what!r}, {[*SETTINGS, *overrides]!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    clips, peak = json.loads(done.stdout.splitlines()[-1])
    return clips, peak


def child(what: str, overrides: list[str]) -> None:
    """Extract or train, and print the number of clips and the peak."""
    config = load("configs/demo.yaml", overrides)
    with make_progress() as progress:
        clips = (_extract if what == "extract" else _train)(config, progress)
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([clips, int(peak) / 1e3]))


def _extract(config: RunConfig, progress: Progress) -> int:
    return sum(extract(config, progress=progress).rows.values())


def _train(config: RunConfig, progress: Progress) -> int:
    return distill(config, progress=progress).training.num_samples
