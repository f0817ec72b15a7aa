"""A finished cache grows by exactly what is missing, on the rows that are there."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_runs import MakeConfig, contents, kdhiera

from kdhiera.cache.commit import Cache
from kdhiera.cache.encoding import calibrate, error_bound
from kdhiera.cache.reader import CacheReader
from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.featurize import Featurizer
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.assemble import columns_of
from kdhiera.stages.distill import distill
from kdhiera.stages.extract_teachers import extract
from kdhiera.teachers.base import TeacherOutput
from kdhiera.training.metrics import read_metrics

MakeRun = Callable[..., RunConfig]


@pytest.fixture
def progress() -> Iterator[Progress]:
    with make_progress() as made:
        yield made


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Clips by (teacher, layer) that teachers were really asked for; scores count as a layer."""
    seen: Counter[tuple[str, str]] = Counter()
    original = Featurizer.teach

    def teach(
        self: Featurizer,
        clips: np.ndarray,
        *,
        layers: Mapping[str, Sequence[str]],
        with_scores: bool,
    ) -> dict[str, TeacherOutput]:
        for teacher, names in layers.items():
            seen.update({(teacher, name): len(clips) for name in names})
        if with_scores:
            seen[self.score_teacher, "scores"] += len(clips)
        return original(self, clips, layers=layers, with_scores=with_scores)

    monkeypatch.setattr(Featurizer, "teach", teach)
    monkeypatch.setattr(Featurizer, "widths", _quiet_widths(Featurizer.widths, seen))
    return seen


def _quiet_widths(
    original: Callable[..., Any], seen: Counter[tuple[str, str]]
) -> Callable[..., Any]:
    def widths(self: Featurizer, layers: Mapping[str, Sequence[str]]) -> Any:
        before = Counter(seen)
        found = original(self, layers)
        seen.clear()
        seen.update(before)
        return found

    return widths


def teachers(make_run: MakeRun, **changes: Any) -> dict[str, Any]:
    """The usual teachers with some settings of theirs changed, by name."""
    usual = make_run("usual").model_dump(mode="json")["teachers"]
    return {name: {**values, **changes.get(name, {})} for name, values in usual.items()}


def test_layers_encodings_views_and_shards_are_added_and_nothing_is_done_twice(
    make_run: MakeRun,
    progress: Progress,
    taught: Counter[tuple[str, str]],
    shards: list[Path],
) -> None:
    one = {"views": {"num": 1, "frame_stride": 3}, "data": {"shards": str(shards[0])}}
    first = make_run("grow", teachers=teachers(make_run, image={"layers": ["12"]}), **one)
    extract(first, progress=progress)
    assert taught == {("image", "12"): 12, ("image", "scores"): 12, ("video", "3"): 12}
    before = contents(first)

    taught.clear()
    layer = make_run("grow", teachers=teachers(make_run, image={"layers": ["6", "12"]}), **one)
    extract(layer, progress=progress)
    assert taught == {("image", "6"): 12}  # a layer: no other one, no scores, no video teacher

    taught.clear()
    encoding = layer.model_copy(
        update={"cache": layer.cache.model_copy(update={"encoding": "int8"})}
    )
    extract(encoding, progress=progress)
    assert taught == {("image", "6"): 12, ("image", "12"): 12, ("video", "3"): 12}

    taught.clear()
    view = layer.model_copy(update={"views": layer.views.model_copy(update={"num": 2})})
    extract(view, progress=progress)
    assert set(taught.values()) == {12}

    taught.clear()
    more = view.model_copy(update={"data": make_run("usual").data})
    extract(more, progress=progress)
    assert set(taught.values()) == {24}  # two views of the other shard

    taught.clear()
    extract(more, progress=progress)
    assert not taught
    after = contents(more)
    assert all(after[key][:3] == what[:3] for key, what in before.items())  # rows as they were
    whole = contents(first.model_copy(update={"cache": layer.cache}))
    assert {key: whole[key] for key in before} == before

    fresh = more.model_copy(
        update={"cache": layer.cache.model_copy(update={"dir": layer.cache.dir + "-fresh"})}
    )
    extract(fresh, progress=progress)  # all of it at once gives the same bytes
    assert contents(fresh) == after


def test_the_plan_says_what_is_missing_and_a_dry_run_writes_nothing(
    make_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_config("plan", teachers=teachers(make_run, image={"layers": ["12"]}))
    dry = kdhiera("extract-teachers", config, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "4 parts, 48 clips: rows and image.12.fp32, video.3.fp32" in dry.stdout
    assert not (tmp_path / "cache").exists()
    done = kdhiera("extract-teachers", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("plan ") < done.stdout.index("coverage")
    grown = make_config("plan")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    dry = kdhiera("extract-teachers", grown, "--dry-run", "--json")
    plan = json.loads(dry.stdout)["plan"]
    assert plan["work"] == [{"rows": False, "columns": ["image.6.fp32"], "parts": 4, "clips": 48}]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before


@pytest.mark.usefixtures("own_cache")
def test_a_basis_is_made_once_and_compact_rows_stay_within_their_bound(
    make_run: MakeRun, progress: Progress
) -> None:
    exact = make_run("exact")
    compact = make_run(
        "compact",
        cache={"encoding": "compact"},
        extract={"batch_size": 4, "device": "cpu", "calibration_rows": 24},
        train={"max_steps": 3, "epochs": 3, "batch_size": 8, "device": "cpu", "lr": 1e-3},
    )
    extract(compact, progress=progress)
    cache = Cache.open(compact.cache.dir)
    columns = [*columns_of(exact), *columns_of(compact)]
    reader = CacheReader(cache, num_views=2, columns=columns)
    rows = reader.read(np.arange(reader.num_samples), view=0)  # what the basis saw
    import torch

    units = torch.from_numpy(rows.units.astype(np.int64))
    for column, key in columns_of(exact).items():
        other = next(c for c, k in columns_of(compact).items() if k == key)
        values = []
        for name in (column, other):
            arrays = {n: torch.from_numpy(a) for n, a in rows.columns[name].items()}
            values.append(reader.codec(name).decode(arrays, units)[units >= 0].double())
        mean = torch.from_numpy(reader.statistics(column).mean)
        share = (values[1] - values[0]).square().sum() / (values[0] - mean).square().sum()
        assert share < error_bound("compact", error=compact.cache.compact_error), column
    stamp = {c: cache.columns.basis_sha256(c) for c in columns_of(compact)}
    assert all(stamp.values())
    more = compact.model_copy(update={"views": compact.views.model_copy(update={"num": 3})})
    extract(more, progress=progress)
    assert stamp == {c: Cache.open(compact.cache.dir).columns.basis_sha256(c) for c in stamp}
    distill(compact, progress=progress)
    assert len(read_metrics(Path(compact.run_dir))) == 3


def test_a_basis_does_not_depend_on_who_makes_it(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    import torch

    features = torch.from_numpy(rng.normal(size=(4, 8, 4, 12)).astype(np.float32))
    first, second = (calibrate("compact", features, error=0.01) for _ in range(2))
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


def test_a_run_under_a_wider_plan_uses_it_and_a_wider_run_is_told(
    make_run: MakeRun, make_config: MakeConfig, progress: Progress
) -> None:
    wide = {"strategies": ["attention", {"strategy": "tube", "ratio": 0.5, "draws": 1}]}
    planned = make_run("wide", masks={"ratio": 0.5, "draws": 2, **wide})
    extract(planned, progress=progress)
    narrow = make_config("narrow")  # attention at 0.5, two draws: all of it is there
    assert kdhiera("extract-teachers", narrow, "--dry-run").returncode == 0
    steps = ("train.max_steps=2", "train.epochs=2")
    for override in ("objective.strategy=tube", "objective.ratio=0.75"):
        run = kdhiera("distill", narrow, override, "masks.draws=1", *steps, "--overwrite")
        assert run.returncode == 0, run.stderr
    for override, words in (
        ("objective.strategy=random", "random"),
        ("objective.ratio=0.25", "ratio 0.25"),
        ("objective.draws=3", "3 draws"),
        ("masks.seed=1", "mask seed 1"),
    ):
        run = kdhiera("distill", narrow, override, *steps, "--overwrite")
        assert run.returncode == 3, (override, run.stderr)
        assert words in run.stderr
        assert "tube" in run.stderr  # what it does cover
        assert "Traceback" not in run.stderr


def test_everything_is_covered_where_every_unit_is_kept(
    make_run: MakeRun, progress: Progress
) -> None:
    full = make_run("full", masks={"keep": "all", "ratio": 0.5, "draws": 1})
    extract(full, progress=progress)
    for strategy in ("random", "attention-tube"):
        run = make_run(
            f"full-{strategy}",
            masks={"keep": "all", "seed": 5, "ratio": 0.25, "draws": 3},
            objective={"strategy": strategy},
            train={"max_steps": 2, "epochs": 2, "batch_size": 8, "device": "cpu", "lr": 1e-3},
        )
        distill(run, progress=progress)
        assert len(read_metrics(Path(run.run_dir))) == 2


def test_an_objective_that_the_plan_lacks_is_refused_before_extraction(
    make_run: MakeRun, progress: Progress
) -> None:
    run = make_run("gap", objective={"strategy": "random"})
    with pytest.raises(UsageError, match="random"):
        extract(run, progress=progress)
    assert not Path(run.cache.dir).exists()
