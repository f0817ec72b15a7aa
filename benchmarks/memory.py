"""Figure 7: peak resident memory of extraction and of training, by the number of clips.

Every measurement is a process of its own. Teachers are pixels and HOG, so that what is
counted is what the stages hold, not a network's weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import publish
from kdhiera.config import RunConfig, load
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract

VIEWS = (1, 4)
STEPS = 60
TEACHERS = (
    "teachers={pixels: {kind: pixels}, hog: {kind: hog}}",
    "scores={teacher: pixels, source: uniform}",
    "objective.teachers=[pixels, hog]",
    "ray.enabled=false",
)


def run() -> None:
    """Extract 1 and 4 views of all clips; train as long on one shard and on all."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for views in VIEWS:
            cache = f"cache.dir={folder}/cache-{views}"
            rows, peak = _child("extract", [cache, f"views.num={views}"])
            figures[f"extraction of {rows:.0f} rows, MB"] = peak
        shards = load("configs/demo.yaml").data.shards
        for name, chosen in (("one pattern", shards[-1:]), ("all", shards)):
            wanted = [
                f"cache.dir={folder}/cache-{VIEWS[-1]}",
                f"views.num={VIEWS[-1]}",
                f"data.shards={json.dumps(list(chosen))}",
                f"run_dir={folder}/run-{name}",
                f"train.max_steps={STEPS}",
            ]
            samples, peak = _child("train", wanted)
            figures[f"{STEPS} steps of training on {samples:.0f} clips, MB"] = peak
    extraction = [v for k, v in figures.items() if k.startswith("extraction")]
    training = [v for k, v in figures.items() if "training" in k]
    figures["extraction, more / fewer"] = extraction[1] / extraction[0]
    figures["training, more / fewer"] = max(training) / min(training)
    publish("memory", {}, figures)


def _child(what: str, overrides: list[str]) -> tuple[float, float]:
    """Clips, and the peak resident memory in MB, of one process."""
    code = f"from benchmarks.memory import child; child({what!r}, {[*TEACHERS, *overrides]!r})"
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
