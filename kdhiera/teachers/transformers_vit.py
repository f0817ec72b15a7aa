"""Teachers through Hugging Face transformers: VideoMAE, V-JEPA 2, Dinov2, ViT, ViT-MAE.

The only file that imports transformers, and only when such a teacher is built. Models
are taken apart: the library's own forward masks tokens at random (`ViTMAEModel`, even
at ratio 0), gives no attention with fast kernels, and assumes square grids.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
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
from kdhiera.teachers.attention import Pair, linear_heads
from kdhiera.teachers.base import state_sha256
from kdhiera.teachers.compiling import compile_blocks
from kdhiera.teachers.frames import Frames
from kdhiera.teachers.positions import Resampling, grid_side, resample_positions, resample_table
from kdhiera.teachers.scores import ScoreChoice
from kdhiera.teachers.transformer import TransformerTeacher, input_size
from kdhiera.teachers.weights import (
    HubRepository,
    Source,
    load_weights,
    read_json,
    read_state,
    source_of,
)

logger = logging.getLogger(__name__)

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a model of transformers keeps what is needed; paths are dotted.

    Args:
        model: Class of the model.
        config: Class of its configuration.
        prefix: What names begin with in checkpoints of larger models.
        video: Whether it sees all frames.
        blocks: The blocks, in the model.
        attention: The attention, in a block.
        entering: The norm in front of it, in a block.
        projections: Query and key projections, in the attention.
        patches: The patch embedding, in the model.
        norm: The final norm, in the model.
        resampling: How its kind resamples positions.
        colours: Mean and standard deviation where the checkpoint does not say.
    """

    model: str
    config: str
    prefix: str
    video: bool = False
    blocks: str = "layers"
    attention: str = "attention"
    entering: str = "layernorm_before"
    projections: tuple[str, str] = ("q_proj", "k_proj")
    patches: str = "embeddings.patch_embeddings"
    norm: str = "layernorm"
    resampling: Resampling = Resampling.BICUBIC
    colours: tuple[Sequence[float], Sequence[float]] = _IMAGENET


ARCHITECTURES: Mapping[str, Architecture] = {
    "videomae": Architecture(
        model="VideoMAEModel",
        config="VideoMAEConfig",
        prefix="videomae.",
        video=True,
        blocks="encoder.layer",
        attention="attention.attention",
        projections=("query", "key"),
    ),
    "vjepa2": Architecture(
        model="VJEPA2Model",
        config="VJEPA2Config",
        prefix="vjepa2.",
        video=True,
        blocks="encoder.layer",
        entering="norm1",
        projections=("query", "key"),
        patches="encoder.embeddings",
        norm="encoder.layernorm",
        resampling=Resampling.NONE,
    ),
    "dinov2": Architecture(
        model="Dinov2Model",
        config="Dinov2Config",
        prefix="dinov2.",
        blocks="encoder.layer",
        entering="norm1",
    ),
    "dinov2_with_registers": Architecture(
        model="Dinov2WithRegistersModel",
        config="Dinov2WithRegistersConfig",
        prefix="dinov2_with_registers.",
        blocks="encoder.layer",
        entering="norm1",
        resampling=Resampling.BICUBIC_ANTIALIASED,
    ),
    "vit": Architecture(model="ViTModel", config="ViTConfig", prefix="vit.", colours=_HALF),
    "vit_mae": Architecture(model="ViTMAEModel", config="ViTMAEConfig", prefix="vit."),
}

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


class TransformersBackbone:
    """A model of transformers taken apart; see `Backbone`.

    Args:
        model: The model, on its device.
        architecture: Where its parts are.
        name: What messages call it.
        grid: The student's token grid.
        positions: Positions on that grid, prefix first; None where they are rotary.
        compile_how: See `compile_blocks`.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        name: str,
        grid: Grid,
        positions: Tensor | None,
        compile_how: bool | str,
    ) -> None:
        self._architecture = architecture
        self.blocks: list[Any] = list(model.get_submodule(architecture.blocks).children())
        self._patches: Any = model.get_submodule(architecture.patches)
        embeddings: Any = getattr(model, "embeddings", None)
        self._cls: Tensor | None = getattr(embeddings, "cls_token", None)
        self._registers: Tensor | None = getattr(embeddings, "register_tokens", None)
        self._positions = positions
        self._token_numbers = None
        if positions is None:
            self._token_numbers = _number_tokens(self._attentions(), grid)
        self.name = name
        self.num_blocks = len(self.blocks)
        self.has_cls = self._cls is not None
        self.num_prefix = sum(
            token.shape[1] for token in (self._cls, self._registers) if token is not None
        )
        self.norm: nn.Module | None = _optional(model, architecture.norm)
        self.num_heads = int(next(self._attentions()).num_attention_heads)
        self.gives_attention = True
        self._run = compile_blocks(self.blocks, compile_how)

    def embed(self, pixels: Float[Tensor, "*n 3 h w"]) -> tuple[Float[Tensor, "n m c"], Any]:
        """See `Backbone.embed`; beside the tokens go their numbers, for rotary positions."""
        tokens: Tensor = self._patches(pixels)
        if self._cls is not None:
            tokens = torch.cat([self._cls.expand(len(tokens), -1, -1), tokens], dim=1)
        if self._positions is not None:
            tokens = tokens + self._positions
        if self._registers is not None:
            registers = self._registers.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        numbers = self._token_numbers
        return tokens, None if numbers is None else numbers.to(tokens.device)

    def run_block(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any
    ) -> Float[Tensor, "n m c"]:
        """See `Backbone.run_block`."""
        extra = {} if beside is None else {"position_mask": beside}
        result = self._run[number - 1](tokens, **extra)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def queries_and_keys(
        self, number: int, tokens: Float[Tensor, "n m c"], beside: Any, rows: slice
    ) -> Pair:
        """See `Backbone.queries_and_keys`."""
        block = self.blocks[number - 1]
        attention: Any = block.get_submodule(self._architecture.attention)
        entering = block.get_submodule(self._architecture.entering)(tokens)
        q, k = (getattr(attention, name) for name in self._architecture.projections)
        asked = entering if beside is not None else entering[:, rows]
        queries = linear_heads(asked, q.weight, q.bias, num_heads=self.num_heads)
        keys = linear_heads(entering, k.weight, k.bias, num_heads=self.num_heads)
        if beside is not None:
            places = attention.get_position_ids(entering, masks=beside)
            queries = attention.apply_rotary_embeddings(queries, places)[:, :, rows]
            keys = attention.apply_rotary_embeddings(keys, places)
        return queries * attention.scaling, keys

    def _attentions(self) -> Iterator[Any]:
        for block in self.blocks:
            yield block.get_submodule(self._architecture.attention)


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
    state = _weights(config, source)
    table = None
    found: dict[str, Any] = {}
    published = read_json(source, "config.json") or {}
    if videomae_names.is_original(state):
        table = videomae_names.learned_positions(state)
        state = videomae_names.without_prefix(state)
        found = videomae_names.settings(state)
        state_for_model = videomae_names.in_published_names(state)
        published = {"model_type": "videomae"}
    architecture, settings = _settings(library, config, published, found)
    if not found:
        state = _needed(state, architecture)
        state_for_model = state
    name = config.model or settings.model_type
    _check_tubelet(name, architecture, settings)
    model = _loaded(library, architecture, settings, state_for_model, name=name)
    patch = _pair(settings.patch_size)
    size = input_size(grid, patch)
    mean, std = _colours(config, source, architecture)
    positions = _positions(model, architecture, settings, grid, table, name=name)
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
        weights_sha256=state_sha256(state if table is None else {**state, "pos_embed": table}),
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


def _weights(config: TeacherConfig, source: Source) -> dict[str, Tensor]:
    if config.weights and Path(config.weights).is_file():
        return load_weights(config.weights)
    return read_state(source)


def _settings(
    library: Any,
    config: TeacherConfig,
    published: Mapping[str, Any],
    found: Mapping[str, Any],
) -> tuple[Architecture, Any]:
    """The architecture and its configuration: defaults, then the checkpoint's, then options."""
    kind = published.get("model_type", config.model)
    if kind not in ARCHITECTURES:
        what = f"a model of type {kind!r}" if kind else "no `model_type` in a config.json"
        raise UsageError(
            f"the teacher is {what}, which kdhiera does not take apart: it knows "
            f"{', '.join(ARCHITECTURES)} (set `model` to one of these where the weights have no "
            "config.json); for others use kind: timm or kind: module"
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
            f"the weights do not fit {name} ({' '.join(str(error).split())[:300]}): name the "
            "weights' own model, or correct teachers.<name>.options"
        ) from None
    problems = [
        *(f"{k} is missing" for k in sorted(report["missing_keys"]) if not k.startswith(_UNUSED)),
        *(f"{k} is left over" for k in sorted(report["unexpected_keys"])),
        *(f"{k} has another shape" for k in sorted(map(str, report["mismatched_keys"]))),
    ]
    if problems:
        raise UsageError(
            f"the weights do not fit {name}: {len(problems)} tensors differ, such as "
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
        resampled = resample_table(
            native_positions if table is None else table, native=native, size=size
        )
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


def _number_tokens(attentions: Iterator[Any], grid: Grid) -> Tensor:
    """Raster numbers that V-JEPA 2's rotary positions are made from, `[1, n]`.

    It reads (t, y, x) from a token's number, taking the grid for square: on a wider one
    tokens are numbered as if rows went on. Positions are counted from 0 in steps of one
    token whatever the resolution, as V-JEPA 2 itself does.
    """
    slots, rows, columns = grid.tokens
    side = max(rows, columns)
    for attention in attentions:
        attention.grid_size = side
    t, y, x = (torch.arange(n) for n in (slots, rows, columns))
    numbers = (t[:, None, None] * side + y[:, None]) * side + x
    return numbers.reshape(1, -1)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _optional(model: nn.Module, path: str) -> nn.Module | None:
    """A submodule that a configuration may leave out (`use_mean_pooling`)."""
    try:
        found: nn.Module | None = model.get_submodule(path)
    except AttributeError:
        return None
    return found
