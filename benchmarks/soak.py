"""The demo extracted and trained again and again while its processes are killed at random.

    calm:   extract -> distill, undisturbed           -> content of the cache, weights, losses
    storm:  extract -> distill, struck at random instants, the same command again until it
            gets through; then everything is compared with calm's; a new round, until the
            time is used up

`benchmarks/results/soak.json` holds a row a strike (what was done to which process how long after
its start, how the command ended, whether what is committed is right) and a row a round. It is
written after every strike. `python -m benchmarks.soak --minutes 60`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign import digests, holds
from benchmarks.processes import STRIKES, WAIT_SECONDS, actors, pause, send, start
from benchmarks.report import RESULTS
from kdhiera.training.metrics import read_metrics

CONFIG = "configs/demo.yaml"
LONGEST_SECONDS = 60.0  # between strikes; half of it on average
STEADY = {"driver SIGKILL": signal.SIGKILL, "driver SIGTERM": signal.SIGTERM}
RESUMABLE = 75
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What both stages leave.

    Args:
        parts: Digest of every commit of the cache.
        weights: Digest of the exported student.
        losses: Digest of the loss of every step.
    """

    parts: dict[str, str]
    weights: str
    losses: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cache and one student.

    Args:
        folder: Of both.
        epochs: Of training.
    """

    folder: Path
    epochs: int

    def arguments(self, stage: str) -> list[str]:
        """Of the command, for `extract-teachers` or `distill`."""
        return [
            stage,
            CONFIG,
            f"cache.dir={self.folder}/cache",
            f"run_dir={self.folder}/run",
            f"train.epochs={self.epochs}",
            "train.save_every=1",
            "extract.max_attempts=1000",
            "extract.stall_seconds=45",
        ]

    def result(self) -> Result:
        """Of a finished run."""
        run = self.folder / "run"
        weights = (run / "export" / "model.safetensors").read_bytes()
        losses = [(line["step"], line["loss"]) for line in read_metrics(run)]
        return Result(
            parts=digests(self.folder / "cache"),
            weights=hashlib.sha256(weights).hexdigest(),
            losses=hashlib.sha256(repr(losses).encode()).hexdigest(),
        )


def run(minutes: float = 60.0, epochs: int = 20) -> None:
    """Calm once, then rounds of storm; no strike comes after the time is used up.

    Args:
        minutes: Of storm.
        epochs: Of training in every round.
    """
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calm = _calm(Run(folder=folder / "calm", epochs=epochs))
        strikes: list[Row] = []
        rounds: list[Row] = []
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            here = Run(folder=folder / "storm", epochs=epochs)
            shutil.rmtree(here.folder, ignore_errors=True)
            began = time.monotonic()
            for stage in ("extract-teachers", "distill"):
                for row in _storm(here, stage, calm, rng, end):
                    strikes.append({"round": len(rounds), **row})
                    _write(calm, minutes, strikes, rounds)
                    print(json.dumps(strikes[-1]), flush=True)
            result = here.result()
            rounds.append(
                {
                    "seconds": time.monotonic() - began,
                    "strikes": sum(row["round"] == len(rounds) for row in strikes),
                    "cache_equal": result.parts == calm.parts,
                    "weights_equal": result.weights == calm.weights,
                    "losses_equal": result.losses == calm.losses,
                }
            )
            _write(calm, minutes, strikes, rounds)
            print(json.dumps(rounds[-1]), flush=True)


def _calm(run: Run) -> Result:
    run.folder.mkdir()
    said = run.folder / "errors.txt"
    for stage in ("extract-teachers", "distill"):
        code = start(said, *run.arguments(stage)).wait()
        if code:
            raise SystemExit(f"{stage} undisturbed ended with {code}: {said.read_text()}")
    return run.result()


def _storm(run: Run, stage: str, calm: Result, rng: random.Random, end: float) -> Iterator[Row]:
    """Strike one stage until it gets through."""
    run.folder.mkdir(exist_ok=True)
    said = run.folder / "errors.txt"
    kinds = [*STEADY, *STRIKES] if stage == "extract-teachers" else [*STEADY]
    code = None
    while code != 0:
        process, began = start(said, *run.arguments(stage)), time.monotonic()
        while process.poll() is None and time.monotonic() < end:
            pause(rng.uniform(0.0, LONGEST_SECONDS), process)
            kind = rng.choice(kinds)
            instant = time.monotonic() - began
            if process.poll() is not None or not _strike(process, kind):
                continue
            if kind in STEADY:
                process.wait(WAIT_SECONDS)
            yield {
                "stage": stage,
                "strike": kind,
                "instant_seconds": instant,
                "exit_code": process.poll(),
                "committed_equal": holds(digests(run.folder / "cache"), calm.parts, whole=False),
            }
        code = process.wait()
        if code not in (0, RESUMABLE, -signal.SIGKILL):
            raise SystemExit(f"{stage} ended with {code}: {said.read_text()}")


def _strike(process: Any, kind: str) -> bool:
    """Whether there was something to strike."""
    if kind in STEADY:
        send(process, STEADY[kind])
        return True
    victims = actors(process.pid)
    if victims:
        STRIKES[kind](victims[0])
    return bool(victims)


def _write(calm: Result, minutes: float, strikes: list[Row], rounds: list[Row]) -> None:
    content = {
        "command": f"python -m benchmarks.soak --minutes {minutes:g}",
        "seed": 0,
        "calm": {**asdict(calm), "commits": len(calm.parts)},
        "strikes": Counter(f"{row['stage']}: {row['strike']}" for row in strikes),
        "rounds": rounds,
        "rows": strikes,
    }
    (RESULTS / "soak.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    run(options.minutes, options.epochs)
