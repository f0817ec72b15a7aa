"""Statistics of a real extraction are those of every token that its teachers gave."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdhiera.cache.arrays import read_array
from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import ColumnStatus, column_group
from kdhiera.cache.reader import CacheReader
from kdhiera.cache.stats import ChannelStatistics, merge
from kdhiera.config import RunConfig
from kdhiera.featurize import Featurizer
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.extract_teachers import extract
from kdhiera.teachers.base import TeacherOutput

MakeRun = Callable[..., RunConfig]
Said = dict[tuple[str, str], dict[int, np.ndarray]]  # tokens of every clip, by its checksum

NONFINITE, TOO_LARGE = (1, 4, 7, 10, 13), (2, 17)  # clips in order of appearance
SPOILED_UNIT = 5


@pytest.fixture
def progress() -> Iterator[Progress]:
    with make_progress() as made:
        yield made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """All that the teachers say; of some clips a NaN in one unit, or values beyond fp16."""
    found: Said = {}
    order: dict[int, int] = {}
    original, widths = Featurizer.teach, Featurizer.widths
    listening = True

    @torch.inference_mode()
    def teach(
        self: Featurizer,
        clips: np.ndarray,
        *,
        layers: Mapping[str, Sequence[str]],
        with_scores: bool,
    ) -> dict[str, TeacherOutput]:
        out = original(self, clips, layers=layers, with_scores=with_scores)
        if not listening:
            return out
        names = [zlib.crc32(clip.tobytes()) for clip in clips]
        for name in names:
            order.setdefault(name, len(order))
        for teacher, layer in ((t, name) for t, names_ in layers.items() for name in names_):
            tokens = out[teacher].features[layer]
            for values, name in zip(tokens, names, strict=True):
                if teacher == "image" and order[name] in NONFINITE:
                    units = self.grid.tokens_to_units(values[None].clone())
                    units[0, SPOILED_UNIT] = torch.nan
                    values.copy_(self.grid.units_to_tokens(units)[0])
                if teacher == "image" and order[name] in TOO_LARGE:
                    values.mul_(1e7)
                found.setdefault((teacher, layer), {})[name] = values.double().numpy().copy()
        return out

    def quiet(self: Featurizer, layers: Any) -> Any:
        nonlocal listening
        listening = False
        try:
            return widths(self, layers)
        finally:
            listening = True

    monkeypatch.setattr(Featurizer, "teach", teach)
    monkeypatch.setattr(Featurizer, "widths", quiet)
    return found


def assert_equal(found: ChannelStatistics, tokens: np.ndarray) -> None:
    """To ten digits of what each channel's values are made of."""
    wide = tokens.astype(np.longdouble)
    mean, std = wide.mean(0), wide.std(0)
    assert found.count == len(tokens)
    assert np.all(np.abs(found.mean - mean) <= 1e-10 * np.maximum(np.abs(mean), std))
    np.testing.assert_allclose(found.std, std.astype(float), rtol=1e-10)


def all_tokens(clips: Mapping[int, np.ndarray]) -> np.ndarray:
    """Tokens of the clips that have none but finite ones."""
    return np.concatenate(
        [c.reshape(-1, c.shape[-1]) for c in clips.values() if np.isfinite(c).all()]
    )


def readers(config: RunConfig) -> Iterator[tuple[str, CacheReader]]:
    """One over everything, and one over every shard and view."""
    cache = Cache.open(config.cache.dir)
    columns = tuple(columns_of(config))
    yield "all", CacheReader(cache, num_views=config.views.num, columns=columns)
    for part in cache.commits():
        if part.view == 0:
            yield (
                part.shard_id,
                CacheReader(cache, num_views=1, columns=columns, shards={part.shard_id}),
            )


@pytest.mark.slow
def test_statistics_are_of_all_tokens_of_finite_rows_in_any_grouping(
    make_run: MakeRun, progress: Progress, said: Said
) -> None:
    config = make_run("fp16", cache={"encoding": "fp16"}, views={"num": 1, "frame_stride": 3})
    extract(config, progress=progress)
    whole, *shards = [reader for _, reader in readers(config)]
    for column, key in columns_of(config).items():
        tokens = all_tokens(said[key])
        assert_equal(whole.statistics(column), tokens)
        pieces = [reader.statistics(column) for reader in shards]
        for ordered in itertools.permutations(pieces):
            assert_equal(merge(ordered, width=tokens.shape[1]), tokens)
    _assert_rows_counted(config, whole)

    grown = make_run(  # the same layers in another encoding, on replayed rows
        "int8", cache={"encoding": "int8"}, views={"num": 1, "frame_stride": 3}
    )
    said.clear()
    extract(grown, progress=progress)
    again = next(reader for _, reader in readers(grown))
    for column, key in columns_of(grown).items():
        assert_equal(again.statistics(column), all_tokens(said[key]))
        other = whole.statistics(column.replace("int8", "fp16"))
        assert_equal(other, all_tokens(said[key]))


def _assert_rows_counted(config: RunConfig, reader: CacheReader) -> None:
    """Rows that overflow count, rows that are not finite do not, kept or not."""
    cache = Cache.open(Path(config.cache.dir))
    tokens_a_clip = config.clip.grid.num_units * 4
    unseen = 0
    for column in columns_of(config):
        counts = np.zeros(len(ColumnStatus), int)
        for commits in cache.commits().values():
            commit = commits.columns[column]
            status = read_array(cache, commit, f"{column_group(column)}/status")
            counts += np.bincount(status, minlength=len(counts))
            units = read_array(cache, commits.base, "base.zarr/units")
            nonfinite = units[status == ColumnStatus.NONFINITE]
            unseen += int((nonfinite != SPOILED_UNIT).all(1).sum())
        image = column.startswith("image")
        assert counts[ColumnStatus.NONFINITE] == (len(NONFINITE) if image else 0)
        assert counts[ColumnStatus.OVERFLOW] == (len(TOO_LARGE) if image else 0)
        counted = counts[ColumnStatus.OK] + counts[ColumnStatus.OVERFLOW]
        assert reader.statistics(column).count == counted * tokens_a_clip
    assert unseen, "no clip was spoiled only where it is not kept"
