"""`student.init`: weights that a student of either kind starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from kdhiera.errors import UsageError
from kdhiera.student import official
from kdhiera.student.base import Student
from kdhiera.student.vit import SIZES, VitStudent, is_vit

logger = logging.getLogger(__name__)

_POSITIONS = "pos_embed"  # fixed, and so the student's own whatever the clip size


def load_init(student: Student, path: str) -> None:
    """Load a checkpoint into a student's backbone.

    Args:
        student: A Hiera takes what `official.load_init` does; a plain ViT an export of one of
            its size, whatever its clips.
        path: Of the checkpoint; see there.

    Raises:
        UsageError: If the file is missing, cannot be read, or holds another model.
    """
    if isinstance(student, VitStudent):
        state, _ = official.read_weights(official.weights_file(path))
        if not is_vit(state):
            raise UsageError(
                f"student.init={path} is no plain ViT of kdhiera: name an export of a run with "
                "student.kind=vit, or set student.kind=hiera if it is a Hiera"
            )
        _load_vit(student, state, path)
    else:
        official.load_init(student.backbone, path, student.grid)


def _load_vit(student: VitStudent, state: Mapping[str, Tensor], path: str) -> None:
    own = student.backbone.state_dict()
    found = {name: value.float() for name, value in state.items()}
    found[_POSITIONS] = own[_POSITIONS]
    has, wanted = _describe(found), _describe(own)
    if has != wanted:
        raise UsageError(
            f"student.init={path} holds a plain ViT of {has}, and the student is one of {wanted}: "
            "set student.size to the checkpoint's"
        )
    shapes = [{n: v.shape for n, v in each.items()}.items() for each in (found, own)]
    differ = sorted({name for name, _ in shapes[0] ^ shapes[1]})
    if differ:
        raise UsageError(
            f"student.init={path} is no plain ViT as kdhiera builds it: {', '.join(differ[:3])} "
            "is not there, unknown, or of another shape"
        )
    student.backbone.load_state_dict(found)
    logger.info("student.init %s: the student starts from these weights", path)


def _describe(state: Mapping[str, Tensor]) -> str:
    width = len(state["patch_embed.proj.weight"])
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    depth = len(blocks)
    for name, size in SIZES.items():
        if (size["width"], size["depth"]) == (width, depth):
            return f"size {name}"
    return f"width {width} and {depth} blocks"
