"""Shards of a tiny task, read back with webdataset."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from kdhiera.demo.assets import Assets
from kdhiera.demo.render import render_task
from kdhiera.demo.task import TaskSpec
from kdhiera.demo.video import decode

TINY = TaskSpec(
    size_px=32, train=24, validation=12, test=12, clips_per_shard=12, window_px=48, window_frames=64
)


def render(assets: Assets, out: Path, spec: TaskSpec = TINY, num_processes: int = 1) -> list[str]:
    said: list[str] = []
    render_task(
        spec,
        videos=assets.videos,
        stamps=assets.stamps,
        out=out,
        num_processes=num_processes,
        progress=said.append,
    )
    return said


@pytest.fixture(scope="module")
def shards(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "shards"
    render(assets, out)
    return out


def read(shards: Path, pattern: str) -> list[dict[str, bytes]]:
    samples = []
    for path in sorted(shards.glob(pattern)):
        with path.open("rb") as file:
            samples += list(group_by_keys(tar_file_expander([{"url": path.name, "stream": file}])))
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_samples_are_what_the_plan_says(shards: Path, tmp_path: Path) -> None:
    samples = read(shards, "train-*.tar")
    assert len(samples) == 24
    assert len({sample["__key__"] for sample in samples}) == 24
    first, second = (json.loads(sample["json"]) for sample in samples[:2])
    assert first["labels"].items() >= {"category": "bird", "direction": "right"}.items()
    assert second["labels"].items() >= {"category": "bird", "direction": "left"}.items()
    assert first["centres_yx_px"] == second["centres_yx_px"][::-1]
    assert first["trajectory"] == second["trajectory"]
    for key in ("object", "background"):
        assert first["labels"][key] == second["labels"][key]
    path = tmp_path / "clip.mp4"
    path.write_bytes(samples[0]["mp4"])
    assert decode(path, 32).shape == (16, 32, 32, 3)


def test_splits_are_disjoint_in_what_was_drawn(shards: Path) -> None:
    seen: dict[str, tuple[set[str], set[str]]] = {}
    for split in ("train", "validation", "test"):
        facts = [json.loads(s["json"])["labels"] for s in read(shards, f"{split}-*.tar")]
        seen[split] = {f["object"] for f in facts}, {f["background"] for f in facts}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not seen[one][0] & seen[other][0]
        assert not seen[one][1] & seen[other][1]


def test_unlabelled_clips_show_training_backgrounds_only(shards: Path) -> None:
    backgrounds = json.loads((shards / "task.json").read_text())["splits"]["train"]["backgrounds"]
    samples = read(shards, "unlabelled-*.tar")
    facts = [json.loads(sample["json"]) for sample in samples]
    assert {fact["background"] for fact in facts} == set(backgrounds)
    assert all("labels" not in fact for fact in facts)
    assert len(facts) == sum((frames - 64) // 32 + 1 for frames in (795, 250, 68, 132, 350))


def test_same_spec_gives_the_same_bytes_whatever_the_processes(
    assets: Assets, shards: Path, tmp_path: Path
) -> None:
    render(assets, tmp_path / "again", num_processes=2)
    assert contents(tmp_path / "again") == contents(shards)


def test_second_call_does_nothing(assets: Assets, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert render(assets, shards) == []
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_interrupted_call_goes_on(assets: Assets, shards: Path, tmp_path: Path) -> None:
    digest = json.loads((shards / "task.json").read_text())["digest"]
    half = tmp_path / f".out-{digest[:12]}"
    half.mkdir()
    kept = half / "test-000000.tar"
    kept.write_bytes((shards / kept.name).read_bytes())
    stamp = kept.stat().st_mtime_ns
    render(assets, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)
    assert (tmp_path / "out" / kept.name).stat().st_mtime_ns == stamp
    assert not half.exists()


def test_another_spec_replaces_the_shards(assets: Assets, tmp_path: Path) -> None:
    small = replace(TINY, train=12, validation=12, test=12)
    render(assets, tmp_path / "out", small)
    render(assets, tmp_path / "out", replace(small, seed=1))
    assert json.loads((tmp_path / "out/task.json").read_text())["spec"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_cutouts_there_are_plain_clips_of_all_videos(
    assets: Assets, tmp_path: Path
) -> None:
    videos = {name: assets.videos[name] for name in ("bikes", "tree")}
    render_task(TINY, videos=videos, stamps={}, out=tmp_path / "out", num_processes=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "task.json",
        "unlabelled-000000.tar",
    ]
    backgrounds = {
        json.loads(s["json"])["background"] for s in read(tmp_path / "out", "unlabelled-*.tar")
    }
    assert backgrounds == {"bikes", "tree"}


def test_real_cutout_moves_by_the_planned_way(shards: Path, tmp_path: Path) -> None:
    centres = np.array(json.loads(read(shards, "test-*.tar")[0]["json"])["centres_yx_px"])
    steps = np.diff(centres, axis=0)
    moved = (np.minimum(abs(steps), 32 - abs(steps))).sum()
    assert 0.4 * 32 - 2 <= moved <= 0.65 * 32 + 2
