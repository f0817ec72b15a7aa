"""Failures injected by signal into the installed command, at random instants.

    calm run -> what every part should hold
    run, failure at a random instant -> every part that is committed holds exactly that
    ... the same command again, until one gets through -> all parts are there and hold that

Every trial is a row of `benchmarks/results/faults.json`: what was done to which process, when
after the first byte was written, how the command ended, and whether the digests are equal. The
file is written after every trial. `python -m benchmarks.faults --minutes 30 --trials 20`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.campaign import (
    Campaign,
    attempts,
    digests,
    first_byte,
    make_clip,
    prepare,
    small_config,
    write_shard,
)
from benchmarks.processes import COMMAND, STRIKES, WAIT_SECONDS, actors, pause, send, start
from benchmarks.report import RESULTS
from kdhiera.cache.commit import Cache
from kdhiera.cache.quarantine import given_up

Row = dict[str, Any]


def driver_killed(campaign: Campaign, rng: random.Random) -> Generator[Row, None, None]:
    """SIGKILL of the driver and its decoding children at a random instant, again and again."""
    yield from _struck(campaign, rng, "driver SIGKILL", signal.SIGKILL, {-signal.SIGKILL})


def driver_terminated(campaign: Campaign, rng: random.Random) -> Generator[Row, None, None]:
    """SIGTERM at a random instant: the resumable exit code."""
    yield from _struck(campaign, rng, "driver SIGTERM", signal.SIGTERM, {75})


def _struck(
    campaign: Campaign, rng: random.Random, name: str, number: signal.Signals, ends: set[int]
) -> Generator[Row, None, None]:
    cache = campaign.folder / name.replace(" ", "-")
    while True:
        shutil.rmtree(cache, ignore_errors=True)
        code = None
        while code != 0:
            started, before = time.monotonic(), attempts(cache)
            process = campaign.start(cache)
            first_byte(process, cache, before)
            instant = rng.uniform(0.0, campaign.work_seconds)
            pause(instant, process)
            struck = process.poll() is None
            if struck:
                send(process, number)
            code = process.wait(WAIT_SECONDS)
            equal = campaign.equal(cache, whole=code == 0)
            whole = campaign.equal(cache, whole=True)  # struck when all was done
            yield {
                "failure": name if struck else f"{name}: none, it got through",
                "instant_seconds": instant if struck else None,
                "exit_code": code,
                "as_expected": (code in ends or whole if struck else code == 0) and equal,
                "digests_equal": equal,
                "commits": len(digests(cache)),
                "seconds": time.monotonic() - started,
            }


def actors_struck(campaign: Campaign, rng: random.Random) -> Generator[Row, None, None]:
    """Ray actors struck one after another while a run goes on: it must end as if nothing was."""
    cache = campaign.folder / "actors"
    kinds = ["actor SIGKILL"] * 8 + list(STRIKES)[1:]
    while True:
        shutil.rmtree(cache, ignore_errors=True)
        started = time.monotonic()
        process = campaign.start(
            cache, "ray.enabled=true", "extract.num_actors=1", "extract.stall_seconds=25"
        )
        rows: list[Row] = []
        first_byte(process, cache, 0)
        while process.poll() is None and len(rows) < 8:
            victims = actors(process.pid)
            if not victims:
                pause(0.2, process)
                continue
            instant = rng.uniform(0.0, 1.5 * campaign.work_seconds)
            pause(instant, process)
            name = rng.choice(kinds)
            try:
                STRIKES[name](victims[0])
            except (ProcessLookupError, FileNotFoundError):
                continue
            rows.append({"failure": name, "instant_seconds": instant})
            while process.poll() is None and victims[0] in actors(process.pid):
                pause(0.2, process)
                if name == "actor out of memory" and time.monotonic() - started > 120:
                    break  # it had all the memory that it needs
        code = process.wait(WAIT_SECONDS)
        equal = campaign.equal(cache, whole=True)
        for row in rows:
            yield {
                **row,
                "exit_code": code,
                "as_expected": code == 0 and equal,
                "digests_equal": equal,
                "commits": len(digests(cache)),
                "seconds": (time.monotonic() - started) / max(len(rows), 1),
            }


def deadly_shard(campaign: Campaign, rng: random.Random) -> Generator[Row, None, None]:
    """A shard that kills every actor that works on it: the others are done, and it is named."""
    folder = campaign.folder / "deadly"
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(1)
    for number in range(3):
        white = number == 1
        clips = [make_clip(noise, white=white) for _ in range(2)]
        write_shard(folder / f"shard-{number}.tar", clips)
    while True:
        how = rng.choice(["SIGKILL", "SIGSEGV", "SIGABRT"])
        shutil.rmtree(folder / "cache", ignore_errors=True)
        values = small_config(folder, "shard-*.tar")
        values["teachers"]["deadly"] = {
            "kind": "module",
            "factory": "benchmarks.deadly:build",
            "options": {"how": how},
            "layers": ["1"],
            "precision": "fp32",
        }
        values["views"]["num"] = 1
        values["extract"]["max_attempts"] = 2
        values["ray"] = {"enabled": True}
        config = folder / "deadly.yaml"
        config.write_text(yaml.safe_dump(values))
        started = time.monotonic()
        errors = campaign.folder / "errors.txt"
        code = start(errors, "extract-teachers", str(config)).wait(WAIT_SECONDS)
        cache = Cache.open(folder / "cache")
        done = sorted(part.shard_id.rpartition("-")[0] for part in cache.commits())
        named = sorted(part.shard_id.rpartition("-")[0] for part in given_up(cache))
        right = done == ["shard-0", "shard-2"] and named == ["shard-1"]
        yield {
            "failure": f"a shard that kills every actor ({how})",
            "instant_seconds": None,
            "exit_code": code,
            "as_expected": code == 5 and right,
            "digests_equal": None,
            "commits": len(done),
            "given_up": named,
            "seconds": time.monotonic() - started,
        }


def node_lost(campaign: Campaign, rng: random.Random) -> Generator[Row, None, None]:
    """One of two nodes of a local Ray cluster dies at a random instant."""
    cache = campaign.folder / "nodes"
    script = campaign.folder / "nodes.py"
    script.write_text(_NODES)
    while True:
        shutil.rmtree(cache, ignore_errors=True)
        started = time.monotonic()
        instant = rng.uniform(0.0, campaign.work_seconds)
        with (campaign.folder / "errors.txt").open("wb") as errors:
            code = subprocess.run(
                [sys.executable, script, cache, f"{instant}", COMMAND, "extract-teachers",
                 campaign.config, f"cache.dir={cache}", "ray.enabled=true"],
                stdout=subprocess.DEVNULL, stderr=errors, check=False,
            ).returncode  # fmt: skip
        equal = campaign.equal(cache, whole=True)
        yield {
            "failure": "node lost (one of two)",
            "instant_seconds": instant,
            "exit_code": code,
            "as_expected": code == 0 and equal,
            "digests_equal": equal,
            "commits": len(digests(cache)),
            "seconds": time.monotonic() - started,
        }


_NODES = textwrap.dedent(
    """
    import os, pathlib, subprocess, sys, time
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cache, instant, command = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    process = subprocess.Popen([*command, f"ray.address={cluster.address}"])
    while process.poll() is None and not list(cache.glob("parts/*/*/*/attempt.json")):
        time.sleep(0.05)
    time.sleep(instant)
    cluster.remove_node(node, allow_graceful=False)
    code = process.wait()
    cluster.shutdown()
    sys.exit(code)
    """
)


def disk_full(campaign: Campaign, rng: random.Random) -> Generator[Row, None, None]:
    """A file system that fills up after a random number of bytes, then has room again."""
    disk = campaign.folder / "disk"
    disk.mkdir(exist_ok=True)
    needed = sum(f.stat().st_size for f in (campaign.folder / "calm").rglob("*") if f.is_file())
    while True:
        room = rng.randrange(needed // 20, needed)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)],
            check=False,
            capture_output=True,
        )
        if mounted.returncode:
            return  # not permitted here: `tests/cache/test_full_disk.py` says what else there is
        try:
            started = time.monotonic()
            cache = disk / "cache"
            code = campaign.start(cache).wait(WAIT_SECONDS)
            words = campaign.errors().replace(str(disk), "DISK").strip().splitlines()[-1:]
            equal = campaign.equal(cache, whole=code == 0)
            parts = len(digests(cache))
            more = f"remount,size={10 * needed}"
            subprocess.run(["mount", "-o", more, str(disk)], check=True)
            resumed = campaign.start(cache).wait(WAIT_SECONDS)
            whole = campaign.equal(cache, whole=True)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        yield {
            "failure": "disk full",
            "instant_seconds": None,
            "room_bytes": room,
            "exit_code": code,
            "resumed_exit_code": resumed,
            "as_expected": code in (0, 1) and resumed == 0 and equal and whole,
            "digests_equal": equal and whole,
            "commits": parts,
            "said": words,
            "seconds": time.monotonic() - started,
        }


KINDS = {
    "driver SIGKILL": driver_killed,
    "driver SIGTERM": driver_terminated,
    "actors struck": actors_struck,
    "node lost": node_lost,
    "deadly shard": deadly_shard,
    "disk full": disk_full,
}
FEWER = {"node lost": 3, "deadly shard": 3, "disk full": 5}  # these take long


def run(minutes: float = 40.0, trials: int = 20) -> None:
    """Inject every kind of failure in turn, until the time or the trials are used up.

    Args:
        minutes: For all trials together.
        trials: Of each kind that strikes at a random instant; fewer of the others.
    """
    end = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        campaign = prepare(Path(folder))
        seeds = {name: number for number, name in enumerate(KINDS)}
        going = {name: kind(campaign, random.Random(seeds[name])) for name, kind in KINDS.items()}
        wanted = {name: min(trials, FEWER.get(name, trials)) for name in KINDS}
        done: Counter[str] = Counter()
        while going and time.monotonic() < end:
            name = min(going, key=lambda name: done[name] / wanted[name])  # all get on alike
            row = next(going[name], None)
            if row is None:
                del going[name]
                continue
            done[name] += "none" not in row["failure"]
            rows.append({"kind": name, "seed": seeds[name], "trial": done[name], **row})
            _write(campaign, rows)
            print(json.dumps(rows[-1]), flush=True)
            if done[name] >= wanted[name]:
                going.pop(name).close()
        _print(rows)


def _write(campaign: Campaign, rows: list[Row]) -> None:
    whole = hashlib.sha256(json.dumps(campaign.calm, sort_keys=True).encode()).hexdigest()
    content = {
        "command": "python -m benchmarks faults",
        "calm_commits": len(campaign.calm),
        "calm_digest": whole,
        "calm_work_seconds": campaign.work_seconds,
        "trials": Counter(row["failure"] for row in rows),
        "not_as_expected": [row for row in rows if not row["as_expected"]],
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "faults.json").write_text(json.dumps(content, indent=1) + "\n")


def _print(rows: list[Row]) -> None:
    print("\nfaults")
    for failure, count in Counter(row["failure"] for row in rows).items():
        right = sum(row["as_expected"] for row in rows if row["failure"] == failure)
        print(f"  {failure:<48} {right:3} of {count:3} as expected")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    run(options.minutes, options.trials)
