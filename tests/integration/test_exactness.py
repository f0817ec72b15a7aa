"""Training from the cache equals training with live teachers; nothing else is needed for it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr

from kdhiera.cache.commit import Cache
from kdhiera.cache.layout import PartId
from kdhiera.cache.reader import CacheReader
from kdhiera.config import RunConfig
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract
from kdhiera.training.metrics import read_metrics

MakeRun = Callable[..., RunConfig]


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(config.run_dir))]


@pytest.mark.usefixtures("own_cache")
def test_cached_fp32_and_live_give_the_same_losses(make_run: MakeRun, progress: Progress) -> None:
    steps = {"epochs": 7, "max_steps": 20}
    base = make_run("cached")
    train = base.train.model_dump(mode="json") | steps
    cached = make_run("cached", train=train)
    distill(cached, progress=progress)
    live = make_run("live", train=train, cache={"mode": "live"})
    distill(live, progress=progress)
    assert len(losses(cached)) == 20
    np.testing.assert_allclose(losses(cached), losses(live), rtol=0, atol=1e-5)
    assert losses(cached)[-1] < losses(cached)[0]


@pytest.mark.usefixtures("own_cache")
def test_int8_stays_within_its_bound_of_fp32(make_run: MakeRun, progress: Progress) -> None:
    """Real features: error energy after layer norm at most 5e-4, and close losses."""
    exact = make_run("exact")
    coarse = make_run("coarse", cache={"encoding": "int8"})
    extract(coarse, progress=progress)  # more columns in the same cache: rows are replayed
    cache = Cache.open(Path(exact.cache.dir))
    everything = {**columns_of(exact), **columns_of(coarse)}
    reader = CacheReader(cache, num_views=2, columns=tuple(everything))
    rows = reader.read(np.arange(reader.num_samples), view=1)
    real = torch.from_numpy(rows.units >= 0)
    for column, key in columns_of(exact).items():
        other = next(c for c, k in columns_of(coarse).items() if k == key)
        decoded = {
            name: reader.codec(name).decode(
                {n: torch.from_numpy(a) for n, a in rows.columns[name].items()},
                torch.from_numpy(rows.units.astype(np.int64)),
            )[real]
            for name in (column, other)
        }
        width = decoded[column].shape[-1:]
        a, b = (torch.nn.functional.layer_norm(decoded[n], width) for n in (column, other))
        assert ((a - b).square().sum() / a.square().sum()) < 5e-4, column
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999, column


def test_training_reads_the_cache_alone(
    make_run: MakeRun, shards: list[Path], progress: Progress, tmp_path: Path
) -> None:
    """Shards deleted, teachers' files gone, their packages not importable."""
    import subprocess
    import sys

    copies = [Path(shutil.copy(s, tmp_path)) for s in shards]
    config = make_run("alone", data={"shards": [str(c) for c in copies]})
    extract(config, progress=progress)
    for copy in copies:
        copy.unlink()
    gone = {
        name: t.model_dump(mode="json")
        | {"weights": "nowhere"}
        | ({"options": {"source": "nowhere"}} if t.kind == "module" else {})
        for name, t in config.teachers.items()
    }
    later = make_run("alone", data={"shards": ["nowhere.tar"]}, teachers=gone)
    from kdhiera.config import dump

    path = tmp_path / "later.yaml"
    path.write_text(
        dump(later.model_copy(update={"train": later.train.model_copy(update={"max_steps": 3})}))
    )
    code = (
        "import sys\n"
        "for name in ('av', 'decord', 'onnx', 'transformers', 'webdataset', 'ray',"
        " 'kdhiera.demo.teachers'):\n"
        "    sys.modules[name] = None\n"
        "from kdhiera.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "distill", str(path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "steps     3 of 8 clips" in done.stdout


def test_plain_zarr_and_tensorstore_read_what_the_reader_reads(
    make_run: MakeRun, usual_cache: Path
) -> None:
    cache = Cache.open(usual_cache)
    columns = tuple(columns_of(make_run("plain")))
    reader = CacheReader(cache, num_views=2, columns=columns)
    part = min(p for p in cache.commits() if p.view == 1)
    found = cache.part_commits(part)
    assert found is not None
    rows = reader.read(np.arange(12), view=part.view)
    base = Path(cache.url) / cache.folder(found.base)
    for name, expected in (
        ("base.zarr/units", rows.units),
        ("base.zarr/scores", rows.scores),
        ("base.zarr/pixels", rows.pixels),
        ("targets.zarr/image/12.fp32/codes", rows.columns["image.12.fp32"]["codes"]),
        ("targets.zarr/video/3.fp32/codes", rows.columns["video.3.fp32"]["codes"]),
    ):
        group, _, array = name.partition(".zarr/")
        plain = zarr.open_group(base / f"{group}.zarr", mode="r")[array][:]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(base / name)}}
        other = ts.open(spec, read=True).result().read().result()
        assert np.array_equal(plain, expected), name
        assert np.array_equal(other, expected), name


def test_kept_pixels_are_those_of_the_replayed_clip(make_run: MakeRun, usual_cache: Path) -> None:
    """Rows record what replays them: PyAV or decord give the stored bytes again."""
    from kdhiera.cache.reader import read_base
    from kdhiera.data.clip import Clip, ClipRequest
    from kdhiera.data.patterns import expand
    from kdhiera.data.sandbox import Sandbox
    from kdhiera.data.shards import index_shard, read_shard
    from kdhiera.stages.assemble import decode_limits

    config = make_run("replay")
    cache = Cache.open(usual_cache)
    index = index_shard(expand(config.data.shards)[0])
    found = cache.part_commits(PartId(shard_id=index.shard_id, view=0))
    assert found is not None
    stored = {row.uid: (row, i) for i, row in enumerate(read_base(cache, found.base).rows)}
    reader = CacheReader(cache, num_views=1, columns=(), shards=[index.shard_id])
    kept = reader.read(np.arange(reader.num_samples), view=0)
    with Sandbox(decode_limits(config.decode), num_children=1) as sandbox:
        for sample in read_shard(index, video_extensions=("mp4",)):
            row, i = stored[sample.uid]
            assert sample.video is not None
            clip = sandbox.submit(
                sample.video,
                ClipRequest(
                    uid=sample.uid,
                    view=0,
                    policy=config.view_policy,
                    replay=row.view,
                    replay_decoder=row.decoder,
                ),
            ).result()
            assert isinstance(clip, Clip)
            assert clip.crc32c == row.clip_crc32c
            cubes = config.clip.grid.frames_to_units(clip.frames[None])[0]
            units = kept.units[i][kept.units[i] >= 0]
            assert np.array_equal(kept.pixels[i][: len(units)], cubes[units])
