"""What a teacher of the user's own must give, held against what it gives."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, UInt8
from torch import Tensor

from kdhiera.errors import UsageError
from kdhiera.grid import Grid
from kdhiera.teachers.base import TeacherOutput

SUM_TOLERANCE = 1e-2  # bfloat16 keeps 3 digits of every score


def check_output(
    output: object,
    *,
    who: str,
    clips: UInt8[Tensor, "b f y x 3"],
    grid: Grid,
    layers: Sequence[str],
    scored: bool,
) -> None:
    """Hold one output against `TeacherOutput`.

    Values of features are not looked at: what a clip does to them is that clip's matter.

    Args:
        output: What the teacher returned.
        who: What messages call the teacher.
        clips: What it was shown.
        grid: The student's grid.
        layers: Layers that were asked for.
        scored: Whether scores were asked for.

    Raises:
        UsageError: If something is missing, or is not what it should be.
    """
    if not isinstance(output, TeacherOutput):
        raise UsageError(
            f"{who} returned {_described(output)}: return a kdhiera.teachers.base.TeacherOutput"
        )
    wanted = (len(clips), *grid.tokens)
    for layer in layers:
        if layer not in output.features:
            given = ", ".join(map(repr, output.features)) or "none"
            raise UsageError(
                f"{who} was asked for layer {layer!r} and gave {given}: return every layer that is "
                "asked for, or let `check` refuse it"
            )
        values = output.features[layer]
        if not _is_usable(values, clips) or values.ndim != 5 or values.shape[:4] != wanted:
            raise UsageError(
                f"{who} gave layer {layer!r} as {_described(values)}: return float features "
                f"[{', '.join(map(str, wanted))}, channels] on the clips' device, made under "
                "torch.no_grad()"
            )
    if not scored:
        return
    if output.scores is None:
        raise UsageError(
            f"{who} was asked for scores and gave none: return them, or take the scores from "
            "another teacher (`scores.teacher`), or set scores.source=uniform"
        )
    if not _is_usable(output.scores, clips) or output.scores.shape != wanted:
        raise UsageError(
            f"{who} gave scores as {_described(output.scores)}: return float scores "
            f"[{', '.join(map(str, wanted))}] on the clips' device, made under torch.no_grad()"
        )
    check_scores(output.scores, who=who)


def check_scores(scores: Float[Tensor, "b t h w"], *, who: str) -> None:
    """Refuse scores that masks cannot be drawn from; what is not finite is a clip's matter.

    The logarithm of a score decides, with a floor: of negative scores all would be at the
    floor, and masks that should follow them would be random ones. A slot of zeros may be:
    it says nothing.

    Args:
        scores: Of all tokens.
        who: What messages call the teacher.

    Raises:
        UsageError: If a score is negative, or a slot's scores do not sum to 1.
    """
    finite = scores.float().where(scores.isfinite(), 0.0)
    least = finite.min().item()
    if least < 0:
        raise UsageError(
            f"{who} gives negative scores ({least:.3g}): they must be shares of their slot, at "
            "least 0 and summing to 1, as a softmax gives them"
        )
    sums = finite.sum((2, 3))[scores.isfinite().all((2, 3))]
    wrong = sums[(sums != 0) & ((sums - 1).abs() > SUM_TOLERANCE)]
    if len(wrong):
        raise UsageError(
            f"{who} gives scores that sum to {wrong[0].item():.3g} in a slot: they must be shares "
            "of their slot, at least 0 and summing to 1; divide them by their sum"
        )


def _is_usable(value: object, clips: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not value.requires_grad
        and value.device.type == clips.device.type
    )


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    name = str(value.dtype).removeprefix("torch.")
    gradient = " with a gradient" if value.requires_grad else ""
    return f"{name} {list(value.shape)} on {value.device}{gradient}"
