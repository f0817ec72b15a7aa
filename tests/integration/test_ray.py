"""Extraction on real Ray: embedded, with an actor killed, and over two nodes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from real_runs import MakeConfig

from kdhiera.cache.commit import Cache
from kdhiera.cache.reader import CacheReader
from kdhiera.config import load
from kdhiera.stages.assemble import columns_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CLI = "from kdhiera.cli import main; main()"


def pixels(path: Path) -> bytes:
    config = load(path)
    cache = Cache.open(Path(config.cache.dir))
    reader = CacheReader(cache, num_views=2, columns=tuple(columns_of(config)))
    rows = [reader.read(np.arange(reader.num_samples), view=v) for v in range(2)]
    return b"".join(r.pixels.tobytes() + r.units.tobytes() for r in rows)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    direct = [int(p) for p in found.stdout.split()]
    return [*direct, *(c for p in direct for c in children(p))]


def actors(pid: int) -> list[int]:
    names = {p: Path(f"/proc/{p}/cmdline") for p in children(pid)}
    return [p for p, f in names.items() if f.exists() and b"ray::_Actor" in f.read_bytes()]


def test_an_actor_that_is_killed_is_replaced_and_nothing_is_lost(
    make_config: MakeConfig, usual_cache: Path, tmp_path: Path
) -> None:
    calm = make_config("calm", cache={"dir": str(usual_cache)})
    path = make_config("wild", cache={"dir": str(tmp_path / "wild")}, ray={"enabled": True})
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, "extract-teachers", str(path), "extract.num_actors=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    victims: list[int] = []
    while not victims and time.monotonic() < deadline:
        time.sleep(0.3)
        victims = actors(process.pid)
    time.sleep(3.0)  # it is loading or working
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    output, errors = process.communicate(timeout=250)
    assert victims
    assert process.returncode == 0, errors
    assert "failed (try 1)" in errors
    assert "48 of 48 clips good" in output
    assert pixels(path) == pixels(calm)


def test_two_nodes_share_the_work(make_config: MakeConfig, tmp_path: Path) -> None:
    """Ray's local multi-node cluster: each node has room for one actor."""
    path = make_config("nodes", ray={"enabled": True})
    script = tmp_path / "nodes.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, subprocess, sys
            os.environ["RAY_AUTH_MODE"] = "disabled"
            from ray.cluster_utils import Cluster

            cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 1, "include_dashboard": False},
            )
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            done = subprocess.run(
                [sys.executable, "-c", sys.argv[2], "extract-teachers", sys.argv[1],
                 f"ray.address={cluster.address}"]
            )
            cluster.shutdown()
            sys.exit(done.returncode)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), str(path), CLI],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "48 of 48 clips good" in done.stdout
    cache = Cache.open(Path(load(path).cache.dir))
    records = [cache.read_record(found.base) for found in cache.commits().values()]
    assert len({record["provenance"]["process"] for record in records}) == 2


@pytest.mark.long
def test_the_node_that_is_left_does_the_work_of_one_that_is_lost(
    make_config: MakeConfig, usual_cache: Path, tmp_path: Path
) -> None:
    """Its actor has no room any more: an idle one must take over, long before `stall_seconds`."""
    calm = make_config("calm", cache={"dir": str(usual_cache)})
    path = make_config("lost", cache={"dir": str(tmp_path / "lost")}, ray={"enabled": True})
    script = tmp_path / "lose.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, subprocess, sys, time
            os.environ["RAY_AUTH_MODE"] = "disabled"
            from ray.cluster_utils import Cluster

            head = {"num_cpus": 1, "include_dashboard": False}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            node = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            process = subprocess.Popen(
                [sys.executable, "-c", sys.argv[2], "extract-teachers", sys.argv[1],
                 f"ray.address={cluster.address}"]
            )
            begun = lambda: list(pathlib.Path(sys.argv[3]).glob("parts/*/*/*/attempt.json"))
            while process.poll() is None and not begun():
                time.sleep(0.05)
            cluster.remove_node(node, allow_graceful=False)
            code = process.wait()
            cluster.shutdown()
            sys.exit(code)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), str(path), CLI, str(tmp_path / "lost")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert pixels(path) == pixels(calm)
