"""Processes forked from the tests: ranks that meet, and runs that die."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdhiera.training.ranks import Ranks, joined

FORK = multiprocessing.get_context("fork")


def together(
    size: int, function: Callable[[Ranks], Any], folder: Path, *, timeout: float = 120
) -> list[Any]:
    """What a function comes to at every rank: what it returns or raises, or its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        os.environ |= {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        try:
            with joined("cpu") as ranks:
                told = function(ranks)
        except Exception as error:
            told = error
        (folder / f"told-{number}").write_bytes(pickle.dumps(told))

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("told-*"):
        old.unlink()
    children = [FORK.Process(target=rank, args=(number,)) for number in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
        child.kill()
        child.join()
    return [
        pickle.loads(path.read_bytes()) if path.exists() else child.exitcode
        for number, child in enumerate(children)
        for path in [folder / f"told-{number}"]
    ]


def dies(function: Callable[[], Any]) -> int:
    """Exit code of a process that does something; negative numbers are signals."""
    child = FORK.Process(target=function)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode
