"""Every file of `configs/` plans, extracts and trains some steps on real clips, at reduced size."""

from pathlib import Path

import pytest
from real_runs import read_tar, write_tar

from kdhiera.config import load
from kdhiera.demo.prepare import Prepared
from kdhiera.progress import make_progress
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract
from kdhiera.training.metrics import read_metrics

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CLIPS, STEPS = 8, 15


@pytest.fixture(scope="module")
def shard(demo: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clips.tar"
    return write_tar(path, read_tar(demo.train[0])[: 2 * CLIPS])


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes that name one cache share it here as well."""
    return tmp_path_factory.mktemp("caches")


def reduced(path: Path, shard: Path, caches: Path, demo: Prepared) -> list[str]:
    """Overrides: the demo's teachers, small clips, one view and draw, the nano student."""
    config = load(path)
    image, video = demo.image_teacher, demo.video_weights
    overrides = [
        f"data.shards=[{shard}]",
        "clip={num_frames: 4, height: 96, width: 96}",
        "views={num: 1, frames: dense, frame_stride: 2, crop: center}",
        "masks.draws=1",
        f"cache.dir={caches / Path(config.cache.dir).name}",
        f"run_dir={caches / 'runs' / config.name}",
        "ray.enabled=false",
        "extract.device=cpu",
        "student.size=nano",
        "student.drop_path=0",
        f"train.batch_size={CLIPS}",
        f"train.epochs={STEPS}",
        "train.warmup_epochs=3",
        f"train.lr={0.001 * 256 / CLIPS}",
        "train.min_lr=1.0e-5",
        "train.clip_grad=1.0",
        "train.device=cpu",
        "train.num_threads=1",
    ]
    for name, teacher in config.teachers.items():
        if teacher.kind in ("timm", "transformers") and name == "image":
            overrides += [
                f"teachers.{name}={{kind: timm, model: vit_small_patch14_dinov2, "
                f"weights: {image}, layers: {list(teacher.layers)}}}"
            ]
        elif name == "video":
            layers = [1, 2, 3][-len(teacher.layers) :]
            overrides += [
                f"teachers.{name}={{kind: module, factory: 'kdhiera.demo.teachers:transnetv2', "
                f"weights: {video}, options: {{source: {demo.video_source}}}, layers: {layers}}}"
            ]
    if config.objective.layers:
        overrides += ["objective.layers.video=[3]"]
    return overrides


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_plans_extracts_and_trains(
    path: Path, shard: Path, caches: Path, demo: Prepared
) -> None:
    config = load(path, reduced(path, shard, caches, demo))
    with make_progress() as progress:
        assert extract(config, progress=progress).rows == {"ok": CLIPS}
        distill(config, progress=progress)
    lines = read_metrics(Path(config.run_dir))
    assert lines[-1]["step"] == STEPS
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {name for name in lines[-1] if name.startswith("loss/")} == {
        f"loss/{teacher}/{layer}"
        for teacher, layers in config.objective_layers.items()
        for layer in layers
    }


def test_ablations_share_the_cache_of_their_base(shard: Path, caches: Path, demo: Prepared) -> None:
    """After the base was extracted, nothing is left to do for any of them."""
    with make_progress() as progress:
        for name in ("k400_hiera_base", "last_layer_only", "image_only", "video_only"):
            path = CONFIGS[0].with_name(f"{name}.yaml")
            config = load(path, reduced(path, shard, caches, demo))
            base = name == "k400_hiera_base"
            summary = extract(config, progress=progress, dry_run=not base)
            assert base or (summary.plan.exists and not summary.plan.parts), name
