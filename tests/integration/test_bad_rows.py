"""Bad rows and parts that were given up: listed, looked at, tried again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numbered
import pytest
from odd_videos import ODD
from real_runs import Member, contents, kdhiera, write_config, write_tar

from kdhiera.cache.commit import Cache
from kdhiera.cache.quarantine import given_up
from kdhiera.config import RunConfig, load
from kdhiera.errors import IncompleteError, MismatchError, UsageError
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.extract_teachers import ExtractSummary, extract
from kdhiera.stages.extraction.retry import parse_statuses
from kdhiera.stages.list_bad import list_bad
from kdhiera.stages.replay_key import replay_key

Run = Callable[..., ExtractSummary]
BAD = {
    "cut": "no moov",
    "slices": "lost slices",
    "short": "three frames",
    "hls": "a playlist (HLS)",
}


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


def videos(first: int, count: int) -> list[Member]:
    return [(f"good{i}.mp4", numbered.render(20 + i)) for i in range(first, first + count)]


@pytest.fixture
def usual_odd(tmp_path: Path) -> dict[str, Any]:
    """Two shards, one of them with bad videos, and teachers without weights."""
    large = numbered.render(20, size=(192, 96))
    bad = [(f"{key}.mp4", ODD[name].make()) for key, name in BAD.items()]
    first = write_tar(tmp_path / "a.tar", [*videos(0, 4), *bad, ("large.mp4", large)])
    second = write_tar(tmp_path / "b.tar", videos(4, 4))
    return {
        "data": {"shards": [str(first), str(second)], "max_bad_fraction": 0.9},
        "clip": {"num_frames": 8, "height": 64, "width": 64},
        "views": {"num": 2, "frame_stride": 2},
        "teachers": {
            "hog": {"kind": "hog"},
            "moody": {
                "kind": "module",
                "factory": "moody_teacher:build",
                "options": {"mood": str(tmp_path / "mood")},
                "layers": ["1"],
                "precision": "fp32",
            },
        },
        "scores": {"teacher": "hog", "source": "uniform"},
        "masks": {"ratio": 0.5, "draws": 1},
        "cache": {"encoding": "fp32"},
        "extract": {"batch_size": 4, "device": "cpu"},
        "ray": {"enabled": False},
    }


@pytest.fixture
def config_of(usual_odd: dict[str, Any], tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda name="odd", **sections: load(write_config(tmp_path, usual_odd, name, **sections))


def mood(folder: Path, text: str) -> None:
    (folder / "mood").write_text(text)


def test_bad_rows_are_listed_with_their_reasons(
    config_of: Callable[..., RunConfig], progress: Progress, tmp_path: Path
) -> None:
    config = config_of()
    mood(tmp_path, "nan")
    extract(config, progress=progress)
    found = list_bad(Cache.open(config.cache.dir))
    statuses = {bad.row.key: bad.status for bad in found.chosen if bad.column is None}
    assert statuses == {key: ODD[name].status for key, name in BAD.items()}
    assert {bad.column for bad in found.chosen if bad.status == "nonfinite"} == {"moody.1.fp32"}
    assert all(ODD[BAD[b.row.key]].words in b.row.message for b in found.chosen if not b.column)
    text = found.describe()
    assert "moov atom not found" in text
    assert "column    moody.1.fp32:" in text
    some = list_bad(Cache.open(config.cache.dir), parse_statuses(["too_short, decode_error"]))
    assert {bad.row.key for bad in some.chosen} == {"short", "cut", "hls"}
    first = [bad["key"] for bad in some.to_json()["bad"] if bad["view"] == 0]
    assert first == ["cut", "short", "hls"]
    with pytest.raises(UsageError, match="unknown status 'to_short': use some of missing_member"):
        parse_statuses(["to_short"])


def test_only_parts_in_which_a_row_decodes_now_are_made_again(
    config_of: Callable[..., RunConfig], progress: Progress
) -> None:
    calm = config_of("calm", cache={"dir": str(Path(config_of().cache.dir).parent / "calm")})
    extract(calm, progress=progress)
    tight = {"decode": {"max_frame_pixels": 100 * 100}}
    config = config_of(**tight)
    extract(config, progress=progress)
    cache = Cache.open(config.cache.dir)
    before = {p: c.base.sha256 for p, c in cache.commits().items()}
    nothing = extract(config, progress=progress, retry=parse_statuses(["all"]))
    assert nothing.retried is not None
    assert (nothing.retried.tried, nothing.retried.mended, len(nothing.plan.parts)) == (10, (), 0)
    dry = extract(config_of(), progress=progress, retry=["decode_limit"], dry_run=True)
    assert dry.retried is not None
    assert "2 of 2 bad rows decode now; 2 parts" in dry.describe()
    assert {p: c.base.sha256 for p, c in cache.commits().items()} == before
    done = extract(config_of(), progress=progress, retry=["decode_limit"])
    assert (len(done.plan.parts), done.rows["ok"]) == (2, 18)
    after = {p: c.base.sha256 for p, c in cache.commits().items()}
    assert {p.shard_id[0] for p in after if after[p] != before[p]} == {"a"}
    assert contents(config) == contents(calm)


def test_a_column_with_bad_rows_is_made_again_on_the_same_rows(
    config_of: Callable[..., RunConfig], progress: Progress, tmp_path: Path
) -> None:
    config = config_of()
    mood(tmp_path, "nan")
    extract(config, progress=progress)
    cache = Cache.open(config.cache.dir)
    before = {p: c.base.sha256 for p, c in cache.commits().items()}
    mood(tmp_path, "")
    done = extract(config, progress=progress, retry=["nonfinite"])
    assert [(task.base, list(task.columns)) for task in done.plan.parts] == [
        (False, ["moody.1.fp32"])
    ] * 4
    assert {p: c.base.sha256 for p, c in cache.commits().items()} == before
    assert not [bad for bad in list_bad(cache).chosen if bad.column]


def test_a_part_that_always_fails_is_given_up_listed_and_tried_last(
    config_of: Callable[..., RunConfig], progress: Progress, tmp_path: Path
) -> None:
    config = config_of(extract={"batch_size": 5}, views={"num": 1})
    mood(tmp_path, "raise 5")  # only the shard with five good clips has a batch of five
    with pytest.raises(IncompleteError, match="not in the mood") as caught:
        extract(config, progress=progress)
    assert "kdhiera cache bad" in str(caught.value)
    cache = Cache.open(config.cache.dir)
    (given,) = given_up(cache).values()
    assert (given.part.shard_id[0], given.tries) == ("a", 3)
    assert [p.shard_id[0] for p in cache.commits()] == ["b"]
    assert "3 attempts: RuntimeError: not in the mood" in list_bad(cache).describe()
    more = config_of(extract={"batch_size": 5}, views={"num": 2})
    plan = extract(more, progress=progress, dry_run=True).plan
    assert [(t.part.shard_id[0], t.view) for t in plan.parts] == [("a", 1), ("b", 1), ("a", 0)]
    assert "1 of them were given up before: tried last" in plan.describe()
    mood(tmp_path, "")
    assert not extract(more, progress=progress).failed
    assert given_up(cache) == {}


def test_replay_says_of_every_row_whether_it_comes_out_as_stored(
    config_of: Callable[..., RunConfig], progress: Progress, tmp_path: Path
) -> None:
    config = config_of()
    extract(config, progress=progress)
    url = config.cache.dir
    good = replay_key(url, "good1")
    assert good.same
    assert [row.part.view for row in good.rows] == [0, 1]
    steps = {step.name: step for step in good.rows[0].steps}
    assert list(steps) == ["stored", "shard", "sample", "look", "decode", "teachers"]
    assert steps["look"].values["info"]["num_frames"] == 21
    assert steps["decode"].same
    assert steps["teachers"].same
    assert steps["teachers"].values["columns"]["moody.1.fp32"]["worst_cosine"] == 1.0
    for key, name in BAD.items():
        odd = replay_key(url, key, view=0)
        steps = {step.name: step for step in odd.rows[0].steps}
        assert odd.same
        assert steps["decode"].values["status"] == ODD[name].status
        assert "teachers" not in steps
    slices = replay_key(url, "slices", view=0).describe()
    assert "frame 2 is damaged" in slices or "frame 3 is damaged" in slices
    assert "FFmpeg: h264: " in slices
    (one,) = replay_key(url, good.rows[1].uid, config=config, view=1).rows
    assert one.same
    with pytest.raises(UsageError, match="like it are: good"):
        replay_key(url, "godo1")
    with pytest.raises(MismatchError, match=r"views\.seed"):
        replay_key(url, "good1", config=config_of(views={"seed": 8}))


def test_replay_finds_what_does_not_come_out_as_stored(
    config_of: Callable[..., RunConfig], progress: Progress, tmp_path: Path
) -> None:
    config = config_of(decode={"max_frame_pixels": 100 * 100})
    extract(config, progress=progress)
    url = config.cache.dir
    mended = replay_key(url, "large", config=config_of(), view=0)
    assert not mended.same
    assert "stored is decode_limit" in mended.describe()
    assert replay_key(url, "large", view=0).same  # with the limits that are recorded
    mood(tmp_path, "nan")
    (row,) = replay_key(url, "good1", view=0).to_json()["rows"]
    assert not row["same"]
    assert row["steps"]["decode"]["same"]
    assert row["steps"]["teachers"]["columns"]["moody.1.fp32"]["status"] == "nonfinite"
    (tmp_path / "a.tar").unlink()
    gone = replay_key(url, "good1", view=0)
    assert not gone.same
    assert "not there" in gone.describe()


@pytest.mark.long
def test_the_commands_end_with_what_they_found(
    config_of: Callable[..., RunConfig],
    progress: Progress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parent)  # where the teacher's module is found again
    config = config_of()
    extract(config, progress=progress)
    url = config.cache.dir
    listed = kdhiera("cache", "bad", url, "--status", "too_short", "--json")
    assert [bad["key"] for bad in json.loads(listed.stdout)["bad"]] == ["short", "short"]
    assert kdhiera("replay", url, "good1", "--view", "0", "--debug").returncode == 0
    assert kdhiera("replay", url, "nobody").returncode == 2
    mood(tmp_path, "nan")
    done = kdhiera("replay", url, "good1", "--view", "0", "--json")
    assert (done.returncode, json.loads(done.stdout)["same"]) == (1, False)


def test_all_odd_videos_in_one_shard_become_what_the_page_says(
    config_of: Callable[..., RunConfig], progress: Progress, tmp_path: Path
) -> None:
    """The children go from one to the next; whatever comes before, a good video stays good."""
    members = [(f"{number:03}.mp4", odd.make()) for number, odd in enumerate(ODD.values())]
    shard = write_tar(tmp_path / "odd.tar", members)
    config = config_of(
        data={"shards": [str(shard)], "max_bad_fraction": 1.0},
        views={"num": 1, "frames": "uniform"},
    )
    summary = extract(config, progress=progress)
    cache = Cache.open(config.cache.dir)
    (part,) = cache.commits().values()
    rows = {row.key: row for row in cache.rows(part.base)}
    for number, (name, odd) in enumerate(ODD.items()):
        row = rows[f"{number:03}"]
        assert row.status == odd.status, (name, row.message)
        assert odd.words in row.message
    assert summary.rows["ok"] == sum(odd.status == "ok" for odd in ODD.values())
    again = extract(config, progress=progress, retry=["all"])
    assert again.retried is not None
    assert (again.retried.mended, again.plan.parts) == ((), ())
