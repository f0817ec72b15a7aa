"""Caches of a few small rows with known content."""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import NEEDS_BASIS, basis_to_npz, calibrate
from kdhiera.cache.expected import expect_shard
from kdhiera.cache.fingerprint import base_identity, column_identity
from kdhiera.cache.garbage import Collected, collect
from kdhiera.cache.layout import PartId, column_id, parse_column
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.records import BaseCommit, Commit, SourceInfo
from kdhiera.cache.rows import KeptRows
from kdhiera.cache.stats import channel_statistics
from kdhiera.cache.table import Row
from kdhiera.cache.writer import Attempt, CommitResult
from kdhiera.config import RunConfig
from kdhiera.progress import make_progress
from kdhiera.views import ClipView, RowStatus

WIDTHS = {"image.1.int8": 8, "image.1.fp32": 8, "image.norm.int8": 8, "video.2.int8": 6}
OTHERS = {"image.1.fp16": 8, "image.1.bf16": 8, "image.1.compact": 8, "video.2.compact": 6}
COLUMNS = ("image.1.int8", "video.2.int8")
SOURCE = SourceInfo(path="shard.tar", num_bytes=1000, sha256="ab" * 32)


def config(**changes: Any) -> RunConfig:
    """Clips of 4 x 64 x 64: 2 slots of 4 units, of which 2 a slot are kept (K = 4)."""
    values: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "runs",
        "data": {"shards": "shard-*.tar"},
        "clip": {"num_frames": 4, "height": 64, "width": 64},
        "teachers": {
            "image": {"kind": "timm", "model": "vit", "layers": [1, "norm"]},
            "video": {"kind": "module", "factory": "a.b:c", "layers": [2]},
        },
        "scores": {"teacher": "image"},
        "masks": {"ratio": 0.5, "draws": 1},
        "cache": {"dir": "cache"},
    }
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return RunConfig.model_validate(values)


def make_cache(root: Path | str, columns: Sequence[str] = COLUMNS) -> Cache:
    """Open or create the tiny cache and make sure it knows some columns."""
    run = config()
    identity = base_identity(run, score_teacher={"weights_sha256": "11"})
    cache = Cache.create_or_open(root, identity, provenance={"versions": {"kdhiera": "0"}})
    for column in columns:
        add_column(cache, column)
    return cache


def add_column(cache: Cache, column: str, weights: str = "22") -> None:
    name = parse_column(column)
    run = config(cache__encoding=name.encoding)
    identity = column_identity(
        run, name.teacher, name.layer, identity={}, weights_sha256=weights, precision="fp32"
    )
    assert column_id(name.teacher, name.layer, name.encoding) == column
    cache.columns.ensure(column, identity, provenance={})
    if name.encoding in NEEDS_BASIS and not cache.columns.has_basis(column):
        cache.columns.publish_basis(column, basis(column))


def basis(column: str) -> bytes:
    """A basis that suits the features of `content`, the same every time."""
    rng = np.random.default_rng(7)
    features = rng.normal(size=(40, 8, 4, (WIDTHS | OTHERS)[column])).astype(np.float32) * 3
    encoding = parse_column(column).encoding
    return basis_to_npz(calibrate(encoding, torch.from_numpy(features), error=0.01))


@dataclass(frozen=True, kw_only=True)
class Content:
    """What one part holds; arrays have an entry for every good row."""

    rows: Sequence[Row]
    units: np.ndarray
    scores: np.ndarray
    pixels: np.ndarray
    features: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]

    @property
    def good(self) -> list[Row]:
        return [row for row in self.rows if row.status is RowStatus.OK]


def content(part: PartId, num_rows: int = 5, *, bad: Sequence[int] = (), seed: int = 0) -> Content:
    """Content that depends on its arguments alone; samples do not depend on view or seed."""
    rng = np.random.default_rng([zlib.crc32(part.shard_id.encode()), part.view, seed])
    rows = []
    for i in range(num_rows):
        key = f"clip{i:03d}"
        row = Row(
            uid=f"{part.shard_id}/{i * 512}/{key}",
            key=key,
            status=RowStatus.OK,
            num_frames=90 + i,
            view=ClipView(frame_indices=(i, i + 4, i + 8, i + 12), crop=(1, 2, 64, 60), flip=False),
            pts_seconds=(0.0, 0.1, 0.2, 0.3 + i),
            decoder="pyav",
            clip_crc32c=int(rng.integers(0, 2**32)),
            source_offset=i * 512,
            source_bytes=512,
            labels={"category": "bird", "number": i},
        )
        if i in bad:
            row = replace(
                row,
                status=RowStatus.DECODE_ERROR,
                message="no frame: \x1b[31mred",
                view=None,
                pts_seconds=(),
                clip_crc32c=None,
                decoder="",
            )
        rows.append(row)
    n = num_rows - len(set(bad) & set(range(num_rows)))
    units = np.full((n, 4), -1, np.int16)
    for row_units in units:
        kept = rng.integers(2, 5)  # some rows keep fewer units than K
        row_units[:kept] = np.sort(rng.choice(8, kept, replace=False))
    pixels = rng.integers(0, 256, (n, 4, 2, 32, 32, 3), dtype=np.uint8)
    pixels[units < 0] = 0
    features, tokens = {}, {}
    for column, width in {**WIDTHS, **OTHERS}.items():
        everything = rng.normal(size=(n, 8, 4, width)).astype(np.float32) * 3
        tokens[column] = everything.reshape(-1, width)
        kept_features = everything[np.arange(n)[:, None], np.maximum(units, 0)]
        kept_features[units < 0] = 0
        features[column] = kept_features
    return Content(
        rows=rows,
        units=units,
        scores=rng.random((n, 2, 4), np.float32),
        pixels=pixels,
        features=features,
        tokens=tokens,
    )


def folder_of(cache: Cache, commit: Commit) -> Path:
    """Where the attempt that a commit names lies on this disk."""
    return Path(cache.url) / cache.folder(commit)


def begin(
    cache: Cache,
    part: PartId,
    columns: Sequence[str] = COLUMNS,
    *,
    base: BaseCommit | None = None,
    source: SourceInfo = SOURCE,
    lease_seconds: float = 1000.0,
) -> Attempt:
    expect_shard(cache, part.shard_id, path=f"/data/{part.shard_id}.tar")
    return Attempt(
        cache,
        part,
        source=source,
        columns={c: (WIDTHS | OTHERS)[c] for c in columns},
        base=base,
        provenance={"versions": {"kdhiera": "0"}},
        lease_seconds=lease_seconds,
    )


def fill(
    attempt: Attempt,
    what: Content,
    columns: Sequence[str] = COLUMNS,
    *,
    rows: bool = True,
    batch: int = 3,
) -> None:
    """Append all of a part, some rows at a time; padded units get garbage."""
    for start in range(0, len(what.rows), batch) if rows else ():
        some = what.rows[start : start + batch]
        begin_good = sum(r.status is RowStatus.OK for r in what.rows[:start])
        good = slice(begin_good, begin_good + sum(r.status is RowStatus.OK for r in some))
        pixels = what.pixels[good].copy()
        pixels[what.units[good] < 0] = 77
        attempt.append_rows(some, units=what.units[good], scores=what.scores[good], pixels=pixels)
    for column in columns:
        for start in range(0, len(what.units), batch):
            piece = slice(start, start + batch)
            features = torch.from_numpy(what.features[column][piece].copy())
            features[torch.from_numpy(what.units[piece] < 0)] = float("nan")
            attempt.append_features(column, features, np.zeros(len(features), np.uint8))
        attempt.append_statistics(column, channel_statistics(torch.from_numpy(what.tokens[column])))


def write_part(
    cache: Cache,
    part: PartId,
    what: Content | None = None,
    columns: Sequence[str] = COLUMNS,
    *,
    base: BaseCommit | None = None,
) -> CommitResult:
    what = content(part) if what is None else what
    with begin(cache, part, columns, base=base) as attempt:
        fill(attempt, what, columns, rows=base is None)
        return attempt.commit()


def catch_up(
    cache: Cache,
    part: PartId,
    columns: Sequence[str] = COLUMNS,
    what: Content | None = None,
) -> None:
    """What extraction does with a part: whatever is missing of it."""
    missing = cache.missing(part, columns)
    found = cache.part_commits(part)
    if missing:
        write_part(cache, part, what, missing.columns, base=found.base if found else None)


def assert_holds(
    reader: CacheReader, parts: Mapping[PartId, Content], columns: Sequence[str] = COLUMNS
) -> None:
    """Every trainable row reads back as it was written, within what its encoding loses."""
    shards = sorted({part.shard_id for part in parts})
    views = 1 + max(part.view for part in parts)
    for view in range(views):
        wanted = [parts[PartId(shard_id=shard, view=view)] for shard in shards]
        rows = reader.read(np.arange(reader.num_samples), view=view)
        assert rows.uids == tuple(row.uid for what in wanted for row in what.good)
        np.testing.assert_array_equal(rows.units, np.concatenate([w.units for w in wanted]))
        np.testing.assert_array_equal(rows.scores, np.concatenate([w.scores for w in wanted]))
        np.testing.assert_array_equal(rows.pixels, np.concatenate([w.pixels for w in wanted]))
        for column in columns:
            features = np.concatenate([w.features[column] for w in wanted])
            assert_close(column, decoded(reader, rows, column), features)


def decoded(reader: CacheReader, rows: KeptRows, column: str) -> np.ndarray:
    """Features of a column as a training step sees them."""
    arrays = {name: torch.from_numpy(values) for name, values in rows.columns[column].items()}
    units = torch.from_numpy(rows.units.astype(np.int64))
    return (
        reader.codec(column)
        .decode(arrays, units)
        .masked_fill(units[..., None, None] < 0, 0)
        .numpy()
    )


LOSSES = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "int8": 0.06, "compact": 0.5}


def assert_close(column: str, found: np.ndarray, features: np.ndarray) -> None:
    """Hold features against what was encoded: other rows would be off by about 9.

    Args:
        column: Column id.
        found: Decoded features.
        features: Of `content`: normal, of standard deviation 3.
    """
    loss = LOSSES[parse_column(column).encoding]
    assert found.shape == features.shape
    np.testing.assert_allclose(found, features, rtol=0, atol=loss * 5)


def gc(cache: Cache, *, remove: bool = True, later: float = 0.0) -> Collected:
    """Collect garbage as if some seconds had passed."""
    with make_progress(io.StringIO()) as progress:
        return collect(cache, remove=remove, progress=progress, now=time.time() + later)
