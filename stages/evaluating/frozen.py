"""Features of frozen models over labelled clips: decoded once, seen by every model.

Pooled features stay in memory. Tokens for the attentive probe, hundreds of vectors a clip,
go to temporary files, so that memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8

from kdhiera.config import RunConfig
from kdhiera.data.sandbox import Sandbox
from kdhiera.devices import resolve_device
from kdhiera.errors import UsageError
from kdhiera.evaluation.kept import Kept, from_text_array, text_array
from kdhiera.featurize import Featurizer
from kdhiera.machine import num_cpus
from kdhiera.progress import Progress
from kdhiera.stages.assemble import decode_limits
from kdhiera.stages.clips import ClipBatch, clip_batches, mapped
from kdhiera.stages.evaluating.labelled import (
    SPLITS,
    Shards,
    Split,
    Splits,
    clips_identity,
    evaluation_policy,
    settings_of,
    splits_digest,
    splits_from_arrays,
    splits_to_arrays,
)
from kdhiera.storage import disk_errors
from kdhiera.student.base import Student

logger = logging.getLogger(__name__)

READOUTS = ("mean", "slots")
TOKEN_TYPE = np.dtype(np.float16)
CLIPS = "clips"  # digest of the clips that features belong to


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model makes of a batch.

    Args:
        pooled: By readout.
        tokens: Of the last block; None if the model gives none or they are not wanted.
    """

    pooled: Mapping[str, Float[np.ndarray, "b c"]]
    tokens: Float[np.ndarray, "b n c"] | None


Model = Callable[[UInt8[np.ndarray, "b f y x 3"], bool], Output]  # the flag asks for tokens


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A model that is not trained here.

    Args:
        name: As in results.
        seed: That its weights were drawn from; None if they were not.
        identity: JSON values that decide its features, given the clips.
        distilled: Whether it is the run's own; others are the same for many runs.
        has_tokens: Whether it is asked for tokens.
        load: Gives what runs it.
    """

    name: str
    seed: int | None
    identity: Mapping[str, object]
    distilled: bool
    has_tokens: bool
    load: Callable[[], Model]

    @property
    def key(self) -> str:
        """Its name, told apart from those of other seeds."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one model says of all clips.

    Args:
        pooled: By readout and split, `[clips, views, width]`.
        tokens: By split, `[clips, views, tokens, width]` on disk; None where not wanted.
    """

    pooled: Mapping[str, Mapping[str, Float[np.ndarray, "n v c"]]]
    tokens: Mapping[str, np.ndarray] | None


def student_model(student: Student, device: torch.device) -> Model:
    """Runs a student; for `FrozenModel.load`."""
    student.to(device).eval()

    @torch.inference_mode()
    def run(clips: UInt8[np.ndarray, "b f y x 3"], with_tokens: bool) -> Output:
        tokens = student.dense(torch.from_numpy(clips).to(device))
        return Output(
            pooled={
                "mean": student.pool(tokens, "mean").float().cpu().numpy(),
                "slots": student.pool(tokens, "slots").float().cpu().numpy(),
            },
            tokens=tokens.flatten(1, 3).float().cpu().numpy() if with_tokens else None,
        )

    return run


def teacher_model(featurizer: Featurizer, name: str, layer: str) -> Model:
    """Runs a teacher, pooled; for `FrozenModel.load`."""

    def run(clips: UInt8[np.ndarray, "b f y x 3"], with_tokens: bool) -> Output:
        assert not with_tokens, "teachers are measured pooled"
        output = featurizer.teach(clips, layers={name: (layer,)}, with_scores=False)
        tokens = output[name].features[layer].float()
        return Output(
            pooled={
                "mean": tokens.mean((1, 2, 3)).cpu().numpy(),
                "slots": tokens.mean((2, 3)).flatten(1).cpu().numpy(),
            },
            tokens=None,
        )

    return run


@dataclass(frozen=True, kw_only=True)
class FrozenStage:
    """Computes features of models, or finds them computed.

    Args:
        config: The run.
        shards: Indices by split.
        own: Where features of the run's own model are kept.
        baselines: Where those of the others are.
        spool: Folder for temporary files of tokens; must exist.
        progress: Where progress is shown.
    """

    config: RunConfig
    shards: Shards
    own: Kept
    baselines: Kept
    spool: Path
    progress: Progress

    def run(
        self,
        models: Sequence[FrozenModel],
        *,
        wants_tokens: Callable[[FrozenModel, Splits], bool],
    ) -> tuple[Splits, dict[str, Features]]:
        """Clips, and features by `FrozenModel.key`.

        Args:
            models: Whose features are wanted.
            wants_tokens: Whether a model's tokens are needed; asked once the clips are known.

        Raises:
            UsageError: If no clip of a split decodes.
        """
        where = clips_identity(self.config, self.shards)
        stored = self.baselines.load(where)
        splits = splits_from_arrays(stored, self.shards) if stored else None
        there = {m.key: found for m in models if (found := self._load(m, where)) is not None}
        if splits is not None:
            digest = splits_digest(splits)
            there = {key: found for key, found in there.items() if found[0] == digest}
        missing = [m for m in models if m.key not in there]
        tokens = {
            m.key for m in models if m.has_tokens and (splits is None or wants_tokens(m, splits))
        }
        if splits is not None and not missing and not tokens:
            return splits, {key: found for key, (_, found) in there.items()}
        computed = [m for m in models if m.key in tokens or m in missing]
        seen, features = self._pass(computed, tokens)
        digest = splits_digest(seen)
        if any(found[0] != digest for found in there.values()):
            logger.warning("other clips decode than before: all features are computed again")
            computed, tokens = list(models), {m.key for m in models if m.has_tokens}
            seen, features = self._pass(computed, tokens)
            digest, there = splits_digest(seen), {}
        self.baselines.save(where, splits_to_arrays(seen))
        for model in computed:
            self._save(model, where, digest, features[model.key])
        return seen, {key: found for key, (_, found) in there.items()} | features

    def _load(self, model: FrozenModel, where: Mapping[str, object]) -> tuple[str, Features] | None:
        arrays = self._kept(model).load(_features_identity(model, where))
        if arrays is None:
            return None
        pooled = {r: {s: arrays[f"{r} {s}"] for s in SPLITS} for r in READOUTS}
        return str(from_text_array(arrays[CLIPS])), Features(pooled=pooled, tokens=None)

    def _save(
        self, model: FrozenModel, where: Mapping[str, object], digest: str, features: Features
    ) -> None:
        arrays = {
            f"{r} {s}": values for r, of in features.pooled.items() for s, values in of.items()
        }
        identity = _features_identity(model, where)
        self._kept(model).save(identity, {CLIPS: text_array(digest), **arrays})

    def _kept(self, model: FrozenModel) -> Kept:
        return self.own if model.distilled else self.baselines

    def _pass(
        self, models: Sequence[FrozenModel], tokens: set[str]
    ) -> tuple[Splits, dict[str, Features]]:
        """Decode every clip once and show it to all models."""
        total = sum(len(shard.samples) for shards in self.shards.values() for shard in shards)
        bar = self.progress.start("evaluate", total, "clips")
        device = resolve_device(self.config.train.device)
        running = {model.key: model.load() for model in models}
        # On CPUs a batch a core with one thread each is faster than one batch with all of them.
        workers = 1 if device.type == "cuda" else self.config.train.num_threads or num_cpus()
        start = (lambda: None) if device.type == "cuda" else partial(torch.set_num_threads, 1)
        splits: dict[str, Split] = {}
        pooled: dict[str, dict[str, dict[str, np.ndarray]]] = {
            key: {r: {} for r in READOUTS} for key in running
        }
        spooled: dict[str, dict[str, np.ndarray]] = {key: {} for key in tokens}
        with (
            Sandbox(decode_limits(self.config.decode), num_children=workers) as sandbox,
            ThreadPoolExecutor(workers, initializer=start) as pool,
            contextlib.ExitStack() as stack,
        ):
            for split, shards in self.shards.items():
                batches = clip_batches(
                    self.config,
                    shards,
                    policy=evaluation_policy(self.config, split),
                    sandbox=sandbox,
                    batch_size=settings_of(self.config).batch_size,
                )
                found: list[tuple[ClipBatch, dict[str, dict[str, np.ndarray]]]] = []
                spools = {key: _Spool(self.spool) for key in tokens}
                for spool in spools.values():
                    stack.callback(spool.close)
                look = partial(_look, running, tokens)
                for batch, outputs in mapped(pool, look, batches, workers):
                    found.append((batch, {key: dict(o.pooled) for key, o in outputs.items()}))
                    for key, spool in spools.items():
                        spool.add(outputs[key].tokens, len(batch.uids))
                    self.progress.advance(bar, len(batch.uids))
                if not found:
                    paths = ", ".join(shard.path for shard in shards)
                    raise UsageError(f"evaluate.{split} has no clip that decodes: {paths}")
                splits[split] = Split(
                    places=[place for batch, _ in found for place in batch.places],
                    uids=[uid for batch, _ in found for uid in batch.uids],
                    labels=[labels for batch, _ in found for labels in batch.labels],
                )
                for key, of in pooled.items():
                    for readout in READOUTS:
                        parts = [_by_clip(o[key][readout], len(b.uids)) for b, o in found]
                        of[readout][split] = np.concatenate(parts)
                for key, spool in spools.items():
                    spooled[key][split] = spool.finish()
        self.progress.finish(bar)
        return splits, {
            key: Features(pooled=pooled[key], tokens=spooled.get(key)) for key in running
        }


def _features_identity(model: FrozenModel, where: Mapping[str, object]) -> dict[str, object]:
    return {"what": "features", "model": dict(model.identity), "clips": dict(where)}


def _look(models: Mapping[str, Model], tokens: set[str], batch: ClipBatch) -> dict[str, Output]:
    frames = batch.frames.reshape(-1, *batch.frames.shape[2:])
    return {key: model(frames, key in tokens) for key, model in models.items()}


def _by_clip(values: np.ndarray, num_clips: int) -> np.ndarray:
    return values.reshape(num_clips, -1, *values.shape[1:])


class _Spool:
    """A file of tokens that grows; `finish` maps it.

    It has no name: when the map has gone, or the process has been killed, it is gone too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` does
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def add(self, tokens: Float[np.ndarray, "b n c"] | None, num_clips: int) -> None:
        assert tokens is not None, "a model with tokens was asked for them"
        limit = np.finfo(TOKEN_TYPE).max
        values = _by_clip(tokens.clip(-limit, limit).astype(TOKEN_TYPE), num_clips)
        self._shape, self._count = values.shape[1:], self._count + num_clips
        with disk_errors(self._folder):
            self._file.write(values.tobytes())

    def finish(self) -> np.ndarray:
        with disk_errors(self._folder):
            self._file.flush()
        return np.memmap(self._file, TOKEN_TYPE, "r", shape=(self._count, *self._shape))

    def close(self) -> None:
        """The map stays."""
        with contextlib.suppress(OSError):  # a full disk was told of before
            self._file.close()
