"""Teachers through Hugging Face transformers: from a config and weights to a teacher.

The only file that imports transformers, and only when such a teacher is built.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdhiera.config import TeacherConfig
from kdhiera.errors import UsageError
from kdhiera.grid import TUBELET_FRAMES, Grid
from kdhiera.teachers import videomae_names
from kdhiera.teachers.base import state_sha256
from kdhiera.teachers.frames import Frames
from kdhiera.teachers.positions import Resampling, grid_side, resample_positions, resample_table
from kdhiera.teachers.scores import ScoreChoice
from kdhiera.teachers.transformer import TransformerTeacher, input_size
from kdhiera.teachers.transformers_vit import ARCHITECTURES, Architecture, TransformersBackbone
from kdhiera.teachers.weights import (
    HubRepository,
    Source,
    load_weights,
    read_json,
    read_state,
    source_of,
)

logger = logging.getLogger(__name__)

# Parts that no token feature needs: they may be there or not.
_UNUSED = (
    "classifier",
    "decoder",
    "embeddings.mask_token",
    "encoder_to_decoder",
    "fc_norm",
    "mask_token",
    "pooler",
    "predictor",
)
# What decides features and is in no weight; recorded in the identity.
_SETTINGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "mlp_ratio",
    "hidden_act",
    "layer_norm_eps",
    "patch_size",
    "tubelet_size",
    "image_size",
    "num_frames",
    "use_mean_pooling",
    "use_swiglu_ffn",
    "num_register_tokens",
)


def build_transformers_teacher(
    config: TeacherConfig,
    *,
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
    choice: ScoreChoice,
) -> TransformerTeacher:
    """Build a teacher from transformers whose patches fall on the student's tokens.

    Args:
        config: `weights` is a folder with `config.json`, or a file beside one, or a file
            alone with `model` an architecture (`options` set what its defaults do not);
            None takes the hub repository that `model` names.
        grid: The student's grid.
        device: Where it runs.
        dtype: float32, or bfloat16 for autocast.
        choice: What scores are read from.

    Raises:
        UsageError: If transformers is not installed, the weights are not to be had or do
            not fit, or the model's patches cannot fall on the student's tokens.
    """
    library = _library()
    source: Source = source_of(config.weights) if config.weights else _hub(config)
    checkpoint = _checkpoint(config, source)
    architecture, settings = _settings(library, config, checkpoint)
    name = config.model or settings.model_type
    _check_tubelet(name, architecture, settings)
    kept, tensors = checkpoint.tensors_for(architecture)
    where = config.weights or f"the hub's {name}"
    model = _loaded(library, architecture, settings, tensors, name=name, where=where)
    size = input_size(grid, _pair(settings.patch_size))
    mean, std = _colours(config, source, architecture)
    positions = _positions(model, architecture, settings, grid, checkpoint.positions, name=name)
    model = model.eval().requires_grad_(False).to(device)
    _accept_size(model, architecture, size)
    known = {key: getattr(settings, key) for key in _SETTINGS if hasattr(settings, key)}
    return TransformerTeacher(
        TransformersBackbone(
            model,
            architecture,
            name=name,
            grid=grid,
            positions=None if positions is None else positions.to(device),
            compile_how=config.compile,
        ),
        Frames(grid, size=size, mean=mean, std=std, video=architecture.video, device=device),
        device=device,
        dtype=dtype,
        choice=choice,
        identity={
            "kind": "transformers",
            "model": name,
            "architecture": settings.model_type,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()},
            "input_px": list(size),
            "resize": "bicubic-antialias",
            "position_grid": architecture.resampling.value,
            "frames": "all" if architecture.video else "first of every tubelet",
            "mean": list(mean),
            "std": list(std),
        },
        weights_sha256=state_sha256(kept),
    )


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """A state dict and what is known of it before a model is made.

    Args:
        state: Tensors under the names they have on disk; of an original VideoMAE the
            encoder's part.
        original: Whether it has VideoMAE's original names.
        published: Its `config.json`; empty if there is none.
        settings: What the shapes of an original VideoMAE say.
        positions: Learned positions of an original VideoMAE.
    """

    state: Mapping[str, Tensor]
    original: bool
    published: Mapping[str, Any]
    settings: Mapping[str, Any]
    positions: Tensor | None

    def tensors_for(
        self, architecture: Architecture
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What features need under its own names, and under those that the library loads."""
        if not self.original:
            needed = _needed(self.state, architecture)
            return needed, needed
        learned = {} if self.positions is None else {"pos_embed": self.positions}
        return {**self.state, **learned}, videomae_names.in_published_names(self.state)


def _checkpoint(config: TeacherConfig, source: Source) -> _Checkpoint:
    """Read the weights and what lies beside them."""
    is_file = config.weights is not None and Path(config.weights).is_file()
    state = load_weights(str(config.weights)) if is_file else read_state(source)
    if videomae_names.is_original(state):
        plain = videomae_names.without_prefix(state)
        return _Checkpoint(
            state=plain,
            original=True,
            published={"model_type": "videomae"},
            settings=videomae_names.settings(plain),
            positions=videomae_names.learned_positions(state),
        )
    published = read_json(source, "config.json") or {}
    return _Checkpoint(
        state=state, original=False, published=published, settings={}, positions=None
    )


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"teachers of kind transformers need the package transformers ({error}): "
            "pip install 'kdhiera[teachers]'"
        ) from None
    return transformers


def _hub(config: TeacherConfig) -> HubRepository:
    if config.model in ARCHITECTURES:
        raise UsageError(
            f"model {config.model} is an architecture without weights: name a file or folder in "
            "`teachers.<name>.weights`, or a repository of the hub as the model"
        )
    return HubRepository(str(config.model))


def _settings(
    library: Any, config: TeacherConfig, checkpoint: _Checkpoint
) -> tuple[Architecture, Any]:
    """The architecture and its configuration: defaults, then the checkpoint's, then options."""
    published, found = checkpoint.published, checkpoint.settings
    kind = published.get("model_type", config.model)
    if kind not in ARCHITECTURES:
        what = f"a model of type {kind!r}" if kind else "no `model_type` in a config.json"
        raise UsageError(
            f"the teacher is {what}, which kdhiera does not take apart: it knows "
            f"{', '.join(ARCHITECTURES)} (set `model` to one of these where the weights have no "
            "config.json); for others use kind: timm or kind: module"
        )
    if config.model in ARCHITECTURES and config.model != kind:
        raise UsageError(
            f"{config.weights} holds weights of {kind}, but teachers.<name>.model is "
            f"{config.model}: name the weights' own model"
        )
    architecture = ARCHITECTURES[kind]
    make = getattr(library, architecture.config)
    known = {*make().to_dict(), "qkv_bias"} - {"out_features", "out_indices", "stage_names"}
    for option in config.options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{architecture.config} has no option {option!r}{hint}")
    values = {k: v for k, v in published.items() if k in known} | dict(found) | dict(config.options)
    if found and "num_attention_heads" not in values:
        raise UsageError(
            f"the weights of width {found['hidden_size']} do not say how many attention heads they "
            "have: set teachers.<name>.options.num_attention_heads"
        )
    try:
        return architecture, make(**values)
    except Exception as error:  # its validation raises errors of huggingface_hub
        raise UsageError(
            f"{architecture.config} refuses its settings ({' '.join(str(error).split())[:300]}): "
            "correct teachers.<name>.options"
        ) from None


def _needed(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The backbone's tensors, under the names they are published with."""
    prefix = architecture.prefix
    if any(name.startswith(prefix) for name in state):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {k: v for k, v in state.items() if not k.startswith(_UNUSED)}


def _loaded(
    library: Any,
    architecture: Architecture,
    settings: Any,
    state: Mapping[str, Tensor],
    *,
    name: str,
    where: str,
) -> nn.Module:
    """The library's model with these weights; it renames old names by itself."""
    try:
        with _quiet(library):
            model, report = getattr(library, architecture.model).from_pretrained(
                None,
                config=settings,
                state_dict=dict(state),
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the weights in {where} do not fit {name} ({' '.join(str(error).split())[:300]}): "
            "name the weights' own model, or correct teachers.<name>.options"
        ) from None
    problems = [
        *(f"{k} is missing" for k in sorted(report["missing_keys"]) if not k.startswith(_UNUSED)),
        *(f"{k} is left over" for k in sorted(report["unexpected_keys"])),
        *(f"{k} has another shape" for k in sorted(map(str, report["mismatched_keys"]))),
    ]
    if problems:
        raise UsageError(
            f"the weights in {where} do not fit {name}: {len(problems)} tensors differ, such as "
            f"{problems[0]}; name the weights' own model, or correct teachers.<name>.options"
        )
    loaded: nn.Module = model
    return loaded


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's report and bars: what is wrong is said in one sentence."""
    log = library.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _check_tubelet(name: str, architecture: Architecture, settings: Any) -> None:
    if architecture.video and settings.tubelet_size != TUBELET_FRAMES:
        raise UsageError(
            f"{name} sees {settings.tubelet_size} frames a token, but a token of the student "
            f"covers {TUBELET_FRAMES}: choose a video teacher whose tubelets do too"
        )


def _colours(
    config: TeacherConfig, source: Source, architecture: Architecture
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation: the config's, the checkpoint's, or the family's."""
    saved: dict[str, Any] = {}
    if config.mean is None or config.std is None:
        for file in ("video_preprocessor_config.json", "preprocessor_config.json"):
            saved = saved or read_json(source, file) or {}
    mean = config.mean or saved.get("image_mean") or architecture.colours[0]
    std = config.std or saved.get("image_std") or architecture.colours[1]
    return tuple(map(float, mean)), tuple(map(float, std))


def _positions(
    model: nn.Module,
    architecture: Architecture,
    settings: Any,
    grid: Grid,
    table: Tensor | None,
    *,
    name: str,
) -> Float[Tensor, "1 n c"] | None:
    """Positions on the student's grid, prefix first; None where they are rotary."""
    if architecture.resampling is Resampling.NONE:
        return None
    size = grid.tokens
    native_positions: Tensor = model.embeddings.position_embeddings.detach()  # type: ignore[union-attr,operator]
    if architecture.video:
        height, width = _pair(settings.image_size)
        patch = _pair(settings.patch_size)
        slots = settings.num_frames // settings.tubelet_size
        native = (slots, height // patch[0], width // patch[1])
        positions = native_positions if table is None else table
        if positions.shape[1] != math.prod(native):
            raise UsageError(
                f"the weights of {name} hold {positions.shape[1]} positions, but its settings say "
                f"{' x '.join(map(str, native))}: set num_frames and image_size in "
                "teachers.<name>.options"
            )
        resampled = resample_table(positions, native=native, size=size)
    else:
        side = grid_side(native_positions, num_prefix=1)
        native, size = (1, side, side), (1, *size[1:])
        resampled = resample_positions(
            native_positions, num_prefix=1, size=size[1:], resampling=architecture.resampling
        )
    if native != size:
        logger.info(
            "%s: position grid resampled from %s to %s (%s)",
            name,
            " x ".join(map(str, native)),
            " x ".join(map(str, size)),
            architecture.resampling.value,
        )
    return resampled


def _accept_size(model: nn.Module, architecture: Architecture, size: tuple[int, int]) -> None:
    """Tell a patch embedding that refuses other sizes which one it gets."""
    patches: Any = model.get_submodule(architecture.patches)
    if hasattr(patches, "image_size"):
        patches.image_size = size


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
