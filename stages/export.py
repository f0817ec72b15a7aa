"""A run's student in the form that the original Hiera loads."""

from __future__ import annotations

from pathlib import Path

from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.stages.assemble import exported_student
from kdhiera.student.export import export_hiera
from kdhiera.student.hiera import HieraStudent


def export_original(config: RunConfig, out: Path | None) -> Path:
    """Write the student of a finished run as a checkpoint of the original Hiera.

    Args:
        config: The run.
        out: The `.pth` file; None is `export/hiera.pth` in the run folder.

    Returns:
        What was written.

    Raises:
        UsageError: If the run has no student yet, or one that is no Hiera, or `out` is a folder.
        MismatchError: If the run's student is not the config's.
        DamagedError: If the run's export cannot be read.
    """
    source = Path(config.run_dir) / "export"
    if not source.is_dir():
        raise UsageError(f"{config.run_dir} holds no student: run `kdhiera distill` first")
    file = out or source / "hiera.pth"
    if file.is_dir():
        raise UsageError(f"--out {file} is a folder: name the .pth file to write")
    student = exported_student(config, source)
    if not isinstance(student, HieraStudent):
        raise UsageError(
            f"--to hiera: the student is a plain ViT (student.kind={student.kind}), which the "
            f"original Hiera cannot load; {source} holds it as timm loads it"
        )
    export_hiera(student, file)
    return file
