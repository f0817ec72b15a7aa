"""A plan against what it plans: real extractions, real files, counts made by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from real_runs import MakeConfig, kdhiera, write_tar

from kdhiera.cache.commit import Cache
from kdhiera.cache.totals import sum_up
from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.progress import make_progress
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.plan import makespan, plan_run
from kdhiera.stages.planning.figures import RunPlan

MakeRun = Callable[..., RunConfig]
CLIPS = 24  # all there are


def planned(config: RunConfig, clips: int = CLIPS) -> RunPlan:
    with make_progress() as progress:
        return plan_run(config, num_clips=clips, progress=progress)


def stored(config: RunConfig) -> dict[str, int]:
    with make_progress() as progress:
        extract(config, progress=progress)
    return dict(sum_up(Cache.open(config.cache.dir), unnamed=False).stored)


@pytest.fixture(scope="module")
def plan(usual: dict, tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """Of the usual config, with no cache."""
    folder = tmp_path_factory.mktemp("plan")
    values = {**usual, "name": "plan", "run_dir": str(folder / "run")}
    values["cache"] = {**usual["cache"], "dir": str(folder / "cache")}
    found = planned(RunConfig.model_validate(values))
    assert not list(folder.iterdir()), "nothing stays"
    return found


def test_whoever_is_free_takes_the_next_task() -> None:
    assert makespan([], 2) == 0
    assert makespan([3, 3, 3], 1) == 9
    assert makespan([5, 1, 1, 1, 4], 2) == 7  # 5 | 1 1 1 4
    assert makespan([1, 1, 1, 5], 4) == 5


def test_bytes_are_those_of_an_extraction(plan: RunPlan, usual_cache: Path) -> None:
    """The trial stores view 0 of all clips; the extraction has a second view of them."""
    found = sum_up(Cache.open(usual_cache), unnamed=False).stored
    assert (plan.good, plan.tried) == (CLIPS, CLIPS)
    by_name = {part.name: part for part in plan.bytes}
    assert set(by_name) == {*found, "statistics"} - {"other"}
    for name in ("pixels", "image.6.fp32", "image.12.fp32", "video.3.fp32"):
        assert by_name[name].whole_bytes == pytest.approx(found[name], rel=0.1), name
        assert by_name[name].missing_bytes == by_name[name].whole_bytes
    assert plan.whole_bytes == pytest.approx(sum(found.values()), rel=0.1)


def test_work_and_steps_are_counted(plan: RunPlan) -> None:
    """24 samples x 2 views in 2 shards; 10 epochs of 24 // 8 steps."""
    assert (plan.num_samples, plan.num_views, plan.num_shards) == (CLIPS, 2, 2)
    assert (plan.extract.num_clips, plan.extract.num_parts) == (2 * CLIPS, 4)
    assert plan.training.steps == 30
    assert plan.training.epochs == 10
    assert plan.training.step_seconds.keys() == {0.5}
    assert plan.training.live_epoch_seconds > plan.training.cached_epoch_seconds > 0
    saved = plan.training.live_epoch_seconds - plan.training.cached_epoch_seconds
    epochs = plan.training.break_even_epochs
    assert (epochs - 1) * saved < plan.extraction.seconds <= epochs * saved
    assert plan.extraction.seconds > plan.extraction.view_seconds > 0


def test_multiply_accumulates_of_a_vit_are_those_of_its_formula(plan: RunPlan) -> None:
    """ViT-S/14: 12 C^2 + 2 N C a token and block; scores need queries and keys of the last."""
    image = next(t for t in plan.extraction.teachers if t.name == "image")
    width, tokens, slots = 384, 4 * 4 + 1, 2
    blocks = 12 * tokens * (12 * width**2 + 2 * tokens * width)
    patches = (tokens - 1) * 14 * 14 * 3 * width
    scores = (tokens + 1) * width**2 + tokens * width
    assert image.macs == pytest.approx(slots * (blocks + patches + scores), rel=2e-3)


def test_a_plan_is_one_screen(plan: RunPlan) -> None:
    said = plan.describe()
    assert "24 samples of 2 shards x 2 views = 48 clips; of 24 that were tried 24 decode" in said
    assert "does not fit" not in said
    full = replace(plan, space=replace(plan.space, free_bytes=1000))
    assert "warning   it does not fit" in full.describe()
    table = {(a.encoding, a.keep): a.clip_bytes for a in plan.alternatives}
    assert len(table) == 10
    for keep in ("plan", "all"):
        sizes = [table[e, keep] for e in ("fp32", "fp16", "bf16", "int8", "compact")]
        assert sizes == sorted(sizes, reverse=True)
    assert all(table[e, "plan"] < table[e, "all"] for e, _ in table)
    assert json.loads(json.dumps(plan.to_json()))["whole_bytes"] == plan.whole_bytes


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["int8", "compact"])
@pytest.mark.parametrize("keep", ["plan", "all"])
def test_an_alternative_is_what_it_would_be(
    plan: RunPlan, make_run: MakeRun, encoding: str, keep: str
) -> None:
    found = stored(make_run(cache={"encoding": encoding}, masks={"keep": keep}))
    wanted = {(a.encoding, a.keep): a.whole_bytes for a in plan.alternatives}[encoding, keep]
    assert wanted == pytest.approx(sum(found.values()), rel=0.1)


@pytest.mark.long
def test_only_what_is_missing_is_counted(own_cache: Path, make_run: MakeRun) -> None:
    there = planned(make_run(), clips=4)
    assert there.extraction.seconds == there.missing_bytes == 0
    assert there.training.break_even_epochs == 0
    assert there.there_bytes > 0
    assert "nothing to do" in there.describe()
    assert "are there already" in there.describe()
    teachers = make_run().model_dump(mode="json")["teachers"]
    teachers["image"]["layers"] = [6, 9, 12]
    more = planned(make_run("more", teachers=teachers), clips=8)
    missing = {part.name for part in more.bytes if part.missing_bytes}
    assert missing == {"image.9.fp32", "statistics"}
    assert more.extraction.seconds > 0


@pytest.mark.long
def test_a_bucket_needs_room_for_a_part(make_config: MakeConfig, s3_url: str) -> None:
    done = kdhiera("plan", make_config(cache={"dir": f"{s3_url}/cache"}), "--clips", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["extract"]["exists"] is False
    assert 0 < found["space"]["needed_bytes"] < found["missing_bytes"]


def test_too_few_clips_to_train_on_are_said_before_any_are_tried(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="only 24 clips can be trained on"):
        planned(make_run(train={"batch_size": 25}))


def test_what_does_not_decode_is_no_plan(make_run: MakeRun, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "noise.tar", [(f"{i}.mp4", bytes(100)) for i in range(8)])
    with pytest.raises(UsageError, match="0 of 4 clips that were tried decode"):
        planned(make_run(data={"shards": [str(shard)]}), clips=4)
