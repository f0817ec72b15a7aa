"""Runs to evaluate without training: an export of drawn weights, labelled clips of the demo."""

from pathlib import Path

from real_runs import Member, read_tar, write_tar

from kdhiera.config import RunConfig
from kdhiera.demo.prepare import Prepared
from kdhiera.student.export import export
from kdhiera.student.hiera import HieraStudent, build

NUM_CLIPS = {"train": 24, "validation": 12, "test": 12}


def write_splits(demo: Prepared, folder: Path) -> dict[str, str]:
    """A shard a split, by the names of the config's keys."""
    paths = {}
    for split, count in NUM_CLIPS.items():
        members: list[Member] = []
        for shard in getattr(demo, split):
            members += read_tar(shard)
        paths[split] = str(write_tar(folder / f"{split}.tar", members[: 2 * count]))
    return paths


def with_export(config: RunConfig, *, seed: int = 5) -> RunConfig:
    """The same config, its run folder now holding a student of a seed's weights."""
    grid = config.clip.grid
    student = HieraStudent(build(config.student, grid, seed=seed), grid)
    export(student, config.student, Path(config.run_dir) / "export", name="drawn", provenance={})
    return config
