"""Every file of `configs/` plans, extracts and learns 32 real clips by heart, at reduced size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import read_tar, write_tar
from torch import Tensor
from torch.nn import functional as F

from kdhiera.config import RunConfig, load
from kdhiera.demo.prepare import Prepared
from kdhiera.objective.targets import normalise
from kdhiera.progress import make_progress
from kdhiera.stages.distill import distill, open_cache
from kdhiera.stages.extract_teachers import extract
from kdhiera.training.batches import make_batch, position_of
from kdhiera.training.metrics import read_metrics

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CLIPS, STEPS = 32, 200


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
        "train.warmup_epochs=20",
        f"train.lr={0.004 * 256 / CLIPS}",
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


def best_constant(targets: Tensor, config: RunConfig) -> float:
    """Loss of the vector that predicts all tokens best, found by descent on the loss itself."""
    kind, beta = config.objective.loss, config.objective.beta
    constant = targets.mean(0).clone().requires_grad_()
    optimiser = torch.optim.LBFGS([constant], max_iter=200, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        if kind == "cosine":
            return (2 - 2 * F.cosine_similarity(constant[None], targets)).mean()
        if kind == "mse":
            return (constant - targets).square().mean()
        assert kind == "smooth_l1"
        return F.smooth_l1_loss(constant.expand_as(targets), targets, beta=beta)

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = value()
        found.backward()
        return found

    optimiser.step(closure)
    return float(value())


def constant_losses(config: RunConfig) -> dict[str, float]:
    """By target, over the units that training predicts."""
    opened = open_cache(config)
    rows = opened.source.read(np.arange(opened.source.num_samples), view=0)
    masks = config.mask_schedule
    position = position_of(0, steps_per_epoch=1, num_views=1, num_draws=1)
    batch = make_batch(
        rows,
        masks.widest,
        position,
        np.arange(len(rows.uids)),
        predict_hidden=masks.predicts_hidden,
    )
    losses = {}
    for (teacher, layer), codec in opened.codecs.items():
        column = f"{teacher}.{layer}.{config.cache.encoding}"
        raw = codec.decode(batch.columns[column], batch.target_units).flatten(0, 2)
        targets = normalise(raw, config.objective.normalise)
        losses[f"{teacher}/{layer}"] = best_constant(targets, config)
    return losses


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_learns_a_few_clips_by_heart(
    path: Path, shard: Path, caches: Path, demo: Prepared
) -> None:
    """60 % of what the best constant leaves is explained after 200 steps, with every teacher."""
    config = load(path, reduced(path, shard, caches, demo))
    with make_progress() as progress:
        summary = extract(config, progress=progress)
        assert summary.rows == {"ok": CLIPS}
        distill(config, progress=progress)
    last = read_metrics(Path(config.run_dir))[-1]
    constants = constant_losses(config)
    print({n: round(1 - last[f"loss/{n}"] / c, 3) for n, c in constants.items()}, last["seconds"])
    assert constants.keys() == {
        f"{t}/{layer}" for t, chosen in config.objective_layers.items() for layer in chosen
    }
    by_teacher = {
        teacher: [
            (last[f"loss/{teacher}/{layer}"], constants[f"{teacher}/{layer}"]) for layer in layers
        ]
        for teacher, layers in config.objective_layers.items()
    }
    for teacher, pairs in by_teacher.items():
        ours, theirs = (sum(column) for column in zip(*pairs, strict=True))
        assert ours < 0.4 * theirs, teacher


def test_ablations_share_the_cache_of_their_base(
    shard: Path, caches: Path, demo: Prepared
) -> None:
    """After the base was extracted, nothing is left to do for any of them."""
    with make_progress() as progress:
        for name in ("k400_hiera_base", "last_layer_only", "image_only", "video_only"):
            path = CONFIGS[0].with_name(f"{name}.yaml")
            config = load(path, reduced(path, shard, caches, demo))
            base = name == "k400_hiera_base"
            summary = extract(config, progress=progress, dry_run=not base)
            assert base or (summary.plan.exists and not summary.plan.parts), name
