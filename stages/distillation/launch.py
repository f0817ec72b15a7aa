"""Distillation by one process, by those of torchrun, or by workers on Ray.

torchrun --nproc-per-node 2 -m kdhiera.stages.distill configs/demo.yaml train.epochs=50
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

from kdhiera.config import RunConfig, load
from kdhiera.errors import KdhieraError
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import DistillSummary, distill
from kdhiera.stages.distillation.workers import distill_on_ray
from kdhiera.training.ranks import joined


def launch(
    config: RunConfig, *, progress: Progress, resume: bool = False, overwrite: bool = False
) -> DistillSummary:
    """Distill with as many ranks as torchrun started, or as `train.num_workers` says.

    See `distill`.
    """
    if "WORLD_SIZE" in os.environ:
        with joined(config.train.device) as ranks:
            return distill(
                config, progress=progress, resume=resume, overwrite=overwrite, ranks=ranks
            )
    started = distill if config.train.num_workers == 1 else distill_on_ray
    return started(config, progress=progress, resume=resume, overwrite=overwrite)


def main(arguments: list[str] | None = None) -> int:
    """What torchrun starts, once a rank; the first one speaks for all."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhiera.stages.distill",
        description="examples:\n"
        "  torchrun --nproc-per-node 2 -m kdhiera.stages.distill configs/demo.yaml\n"
        "  python -m kdhiera.stages.distill configs/demo.yaml train.epochs=20\n\n"
        "kdhiera distill, as torchrun starts it: one process a rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    parser.add_argument("--resume", action="store_true", help="demand a checkpoint to go on from")
    parser.add_argument("--overwrite", action="store_true", help="start anew over an earlier run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        config = load(options.config, options.overrides)
        with (
            open(os.devnull, "w") as nowhere,
            make_progress(None if rank == "0" else nowhere) as progress,
        ):
            summary = launch(
                config, progress=progress, resume=options.resume, overwrite=options.overwrite
            )
    except KdhieraError as error:
        sys.stderr.write(f"error: {error}\n" if rank == "0" else f"rank {rank}: {error}\n")
        return error.exit_code
    if rank == "0":
        result = json.dumps(summary.to_json(), indent=2) if options.json else summary.describe()
        sys.stdout.write(f"{result}\n")
    return 0
