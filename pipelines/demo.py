"""The demo from nothing: its data and teachers, then the main job. `make pipeline`.

The labelled task is checked on the way: controls that must be at chance, and the same
probe with the frames in order, which must not be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdhiera.config import RunConfig, load
from kdhiera.data.patterns import expand
from kdhiera.demo.controls import pooled_features, read_clips, run_controls
from kdhiera.demo.prepare import prepare
from kdhiera.demo.task import SPLITS, TaskSpec
from kdhiera.pipelines.pretrain import pretrain, run, say_on_stdout
from kdhiera.progress import Progress
from kdhiera.report.tables import percent
from kdhiera.results import Control
from kdhiera.stages.evaluate import EvaluateSummary
from kdhiera.stages.evaluating.labelled import settings_of

CONFIG = "configs/demo.yaml"
ROOT = Path("demo-data")
POOLED_TEACHER = "image teacher"


def demo(overrides: list[str], progress: Progress) -> None:
    """Prepare what is missing, then run `configs/demo.yaml` through all stages.

    Args:
        overrides: Dotted overrides of the config.
        progress: Where progress is shown.
    """
    load(CONFIG, overrides)  # a typo is found before anything is fetched
    say_on_stdout("== demo data ==")
    prepared = prepare(ROOT, progress=say_on_stdout)
    if not prepared.train:
        say_on_stdout(
            "without the cut-outs there is no labelled task: the demo trains on the plain clips "
            "and evaluates nothing"
        )
        plain = [str(path) for path in prepared.unlabelled]
        overrides = [f"data.shards={plain}", "evaluate=null", *overrides]
    config = load(CONFIG, overrides)
    pretrain(
        config,
        progress=progress,
        say=say_on_stdout,
        controls=lambda evaluated: _controls(config, evaluated),
    )


def _controls(config: RunConfig, evaluated: EvaluateSummary) -> tuple[Control, ...]:
    """Run and print the controls of the labelled task, on the clips that were evaluated."""
    settings = settings_of(config)
    shards = {name: [Path(p) for p in expand(getattr(settings, name))] for name in SPLITS}
    splits = {name: read_clips(s, size_px=TaskSpec().size_px) for name, s in shards.items()}
    pooled = pooled_features(Path(evaluated.features), POOLED_TEACHER)
    say_on_stdout("\n== controls: the sign of the motion, given its axis (chance 50 %) ==")
    controls = run_controls(splits, image_features=pooled)
    for found in controls:
        wanted = "above chance" if found.expected == "above" else "at chance"
        verdict = "holds" if found.holds else "DOES NOT HOLD"
        say_on_stdout(f"{found.name:<32} {percent(found.accuracy):<28} {wanted}: {verdict}")
    return tuple(controls)


def main(arguments: list[str] | None = None) -> int:
    """Command line: overrides only."""
    parser = argparse.ArgumentParser(
        prog="python -m kdhiera.pipelines.demo",
        description="examples:\n"
        "  python -m kdhiera.pipelines.demo\n"
        "  python -m kdhiera.pipelines.demo train.epochs=20\n\n"
        f"Fetch and draw the demo's data, then run {CONFIG} through all stages.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    options = parser.parse_args(arguments)
    return run(lambda progress: demo(options.overrides, progress))


if __name__ == "__main__":
    sys.exit(main())
