"""Every file of `configs/` plans, extracts and learns real clips by heart, at reduced size."""

from pathlib import Path

import numpy as np
import pytest
from real_runs import read_tar, write_tar

from kdhiera.config import RunConfig, load
from kdhiera.demo.prepare import Prepared
from kdhiera.objective.targets import normalise
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import distill, student_of
from kdhiera.stages.distillation.source import open_source
from kdhiera.stages.extract_teachers import extract
from kdhiera.training.batches import batches
from kdhiera.training.metrics import read_metrics

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CLIPS, STEPS = 32, 200
OFTEN = ("demo", "mvd_baseline", "pixels_baseline")  # each kind of objective and target
EVERY = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in OFTEN else [pytest.mark.long])
    for path in CONFIGS
]


@pytest.fixture(scope="module")
def shard(demo: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clips.tar"
    return write_tar(path, read_tar(demo.unlabelled[0])[: 2 * CLIPS])


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
        "clip={num_frames: 4, height: 32, width: 64}",
        f"views={{num: 1, frames: {config.views.frames}, frame_stride: 2, crop: center}}",
        "masks.draws=1",
        f"cache.dir={caches / Path(config.cache.dir).name}",
        f"run_dir={caches / 'runs' / config.name}",
        "ray.enabled=false",
        "extract.device=cpu",
        "student.size=nano",
        "student.drop_path=0",
        f"train.batch_size={CLIPS}",
        f"train.epochs={STEPS}",
        "train.warmup_epochs=20",
        f"train.lr={0.001 * 256 / CLIPS}",
        "train.min_lr=1.0e-5",
        "train.device=cpu",
        "train.num_threads=1",
        "train.log_every=50",
        f"train.save_every={STEPS}",
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


def constant_losses(config: RunConfig) -> dict[str, float]:
    """Loss of the best constant vector for every target, on what training shows."""
    with open_source(config, None) as opened:
        _, _, specs = student_of(config, opened)
        everything = batches(
            opened.source, config.mask_schedule,
            first_step=0, num_steps=1, batch_size=CLIPS, num_views=1, seed=config.train.seed,
        )  # fmt: skip
        batch = next(iter(everything))
        found = {}
        for spec in specs:
            features = spec.decode(batch.columns[spec.column], batch.target_units)
            target = normalise(features, config.objective.normalise, spec.statistics)
            tokens = target.reshape(-1, spec.width).double().numpy()
            found[spec.name] = best_constant(tokens, config.objective.loss)
    return found


def best_constant(tokens: np.ndarray, loss: str) -> float:
    if loss == "mse":
        return float(tokens.var(0).mean())
    if loss == "cosine":  # 2 - 2 cos is least for the direction of the mean unit vector
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        return float(2 - 2 * np.linalg.norm(unit.mean(0)))
    assert loss == "smooth_l1"  # convex in every channel: halve where the slope changes sign
    low, high = tokens.min(0), tokens.max(0)
    for _ in range(60):
        middle = (low + high) / 2
        rising = np.clip(middle - tokens, -1, 1).sum(0) > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    far = np.abs(tokens - (low + high) / 2)
    return float(np.where(far < 1, far**2 / 2, far - 0.5).mean())


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("path", EVERY)
def test_a_recipe_learns_clips_by_heart(
    path: Path, shard: Path, caches: Path, demo: Prepared, progress: Progress
) -> None:
    """In 200 steps 60 % of what the best constant leaves is gone; a head without input has 0 %."""
    config = load(path, reduced(path, shard, caches, demo))
    assert extract(config, progress=progress).rows == {"ok": CLIPS}
    constant = constant_losses(config)
    distill(config, progress=progress)
    last = read_metrics(Path(config.run_dir))[-1]
    assert last["step"] == STEPS
    assert {name for name in last if name.startswith("loss/")} == {f"loss/{n}" for n in constant}
    for teacher, layers in config.objective_layers.items():
        names = [f"{teacher}/{layer}" for layer in layers]
        left = sum(last[f"loss/{n}"] for n in names) / sum(constant[n] for n in names)
        assert left < 0.4, (teacher, {n: last[f"loss/{n}"] / constant[n] for n in names})


def test_ablations_share_the_cache_of_their_base(
    shard: Path, caches: Path, demo: Prepared, progress: Progress
) -> None:
    """After the base was extracted, nothing is left to do for any of them."""
    for name in ("k400_hiera_base", "last_layer_only", "image_only", "video_only"):
        path = CONFIGS[0].with_name(f"{name}.yaml")
        config = load(path, reduced(path, shard, caches, demo))
        base = name == "k400_hiera_base"
        summary = extract(config, progress=progress, dry_run=not base)
        assert base or (summary.plan.exists and not summary.plan.parts), name
