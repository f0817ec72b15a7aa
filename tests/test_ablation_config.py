"""Ablations as they are written: lists, grids, seeds, questions."""

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdhiera.config.ablation import AblationConfig, load_ablation
from kdhiera.errors import UsageError

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"
SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an ablation of the demo; keyword arguments are sections, None leaves one out."""

    def write(**sections) -> Path:
        usual = {
            "name": "many",
            "run_dir": "runs/many",
            "base": str(DEMO),
            "variants": {"usual": None, "short": {"train.epochs": 5}},
        }
        merged = {k: v for k, v in {**usual, **sections}.items() if v is not None}
        path = tmp_path / "many.yaml"
        path.write_text(yaml.safe_dump(merged, sort_keys=False))
        return path

    return write


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_ablation(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_ablation_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, runs = load_ablation(path)
    assert len(runs) == len(config.changes) * len(config.seeds)


def test_a_list_of_variants_over_seeds(write: Write) -> None:
    config, runs = load_ablation(write(seeds=[3, 1]))
    assert [r.name for r in runs] == [
        "usual/seed-3", "short/seed-3", "usual/seed-1", "short/seed-1",
    ]  # fmt: skip
    assert config.baseline_name == "usual"
    for r in runs:
        assert r.config.name == "many"
        assert r.config.run_dir == f"runs/many/{r.variant}/seed-{r.seed}"
        assert r.config.train.seed == r.seed
        assert r.config.evaluate.seeds == (r.seed,)
        assert r.config.train.epochs == (5 if r.variant == "short" else 40)


def test_a_grid_is_all_combinations(write: Write) -> None:
    grid = {"objective.loss": ["smooth_l1", "cosine"], "train.lr": [1e-3, 2e-3, 4e-3]}
    config, runs = load_ablation(write(variants=None, grid=grid))
    found = {(r.config.objective.loss, r.config.train.lr) for r in runs}
    assert found == {(loss, lr) for loss in grid["objective.loss"] for lr in grid["train.lr"]}
    assert config.baseline_name == "loss=smooth_l1,lr=0.001" == runs[0].variant


@given(
    st.lists(
        st.one_of(
            st.integers(),
            st.floats(),
            st.text(max_size=8),
            st.lists(st.integers(0, 20), max_size=3),
            st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
            st.none(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_names_of_combinations_are_safe_and_none_is_lost(values: list) -> None:
    raw = {"name": "n", "run_dir": "r", "base": "b", "grid": {"some.key": values}}
    try:
        config = AblationConfig.model_validate(raw)
    except ValidationError as error:
        reason = str(error)
    else:
        reason = ""
        assert len(config.changes) == len(values)
        allowed = set(string.ascii_letters + string.digits + "_.,=+-")
        assert all(set(name) <= allowed and name[0].isalnum() for name in config.changes)
        kept = [change["some.key"] for change in config.changes.values()]
        assert repr(kept) == repr(values)
    assert not reason or "same name" in reason


def test_dotted_keys_replace_and_sections_merge(write: Write) -> None:
    variants = {
        "merged": {"views": {"num": 1}, "teachers": {"image": {"weight": 2.0}}},
        "replaced": {"teachers.image.layers": [12], "objective.layers": {"image": [12]}},
    }
    overrides = {"train": {"epochs": 7}, "objective.layers": {"image": [6]}}
    _, (merged, replaced) = load_ablation(write(variants=variants, overrides=overrides))
    assert merged.config.views.num == 1
    assert merged.config.views.frame_stride == 2
    assert merged.config.teachers["image"].weight == 2.0
    assert merged.config.teachers["image"].layers == ("6", "8", "10")
    assert merged.config.objective.layers == {"image": ("6",)}
    assert replaced.config.teachers["image"].layers == ("12",)
    assert replaced.config.objective.layers == {"image": ("12",)}
    assert {r.config.train.epochs for r in (merged, replaced)} == {7}
    assert merged.config.train.batch_size == 32


def test_a_variant_does_not_leak_into_the_next(write: Write) -> None:
    variants = {"a": {"objective": {"teachers": ["image"]}}, "b": {}}
    _, (a, b) = load_ablation(write(variants=variants))
    assert a.config.objective.teachers == ("image",)
    assert b.config.objective.teachers != ("image",)


def test_seeds_may_have_their_own_data(write: Write) -> None:
    per_seed = {0: {"evaluate.test": "fold-0.tar"}, 1: {"evaluate": {"test": "fold-1.tar"}}}
    _, runs = load_ablation(write(seeds=[0, 1], per_seed=per_seed))
    assert {(r.seed, r.config.evaluate.test) for r in runs} == {
        (0, ("fold-0.tar",)), (1, ("fold-1.tar",)),
    }  # fmt: skip


def test_the_command_line_overrides_the_ablation(write: Write) -> None:
    config, runs = load_ablation(
        write(seeds=[0, 1]), ["seeds=[4]", "overrides.train.epochs=3", "baseline=short"]
    )
    assert [(r.seed, r.config.train.epochs) for r in runs] == [(4, 3), (4, 5)]
    assert config.baseline_name == "short"


def test_without_an_evaluation_nothing_can_be_compared(write: Write, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({**yaml.safe_load(DEMO.read_text()), "evaluate": None}))
    assert "has no `evaluate` section: name labelled shards" in refused(write(base=str(base)))


def contrasts(*changes: dict) -> dict:
    usual = {"name": "c", "variant": "short", "against": "usual", "metric": {"label": "direction"}}
    return {"questions": [{"title": "t", "contrasts": [{**usual, **more} for more in changes]}]}


WRONG = [
    ({"grid": {"train.lr": [1]}}, "name either `variants` or a `grid`"),
    ({"variants": None}, "name either `variants` or a `grid`"),
    ({"variants": {}}, "name either `variants` or a `grid`"),
    ({"variants": None, "grid": {"train.lr": []}}, "grid.train.lr lists no value"),
    ({"variants": None, "grid": {"train.lr": [1, "1"]}}, "would have the same name"),
    ({"variants": None, "grid": {"data.shards": ["x" * 101]}}, "too long for the name of a folder"),
    ({"variants": {"a/b": {}}}, "variants.a/b"),
    ({"variants": {"../up": {}}}, "variants"),
    ({"variants": {"records": {}}}, "a variant cannot be called `records`"),
    ({"baseline": "shrot"}, "baseline names `shrot`, but the variants are: usual, short"),
    ({"seeds": [0, 0]}, r"seeds repeats one: [0, 0]"),
    ({"seeds": []}, "`seeds`"),
    ({"seeds": [-1]}, "seeds must be 0 or more"),
    ({"base": "nowhere.yaml"}, "no config file at nowhere.yaml"),
    ({"sedes": [1]}, "unknown key `sedes`; did you mean `seeds`?"),
    ({"variants": {"a": {"train.epoch": 3}}}, "variant a: unknown key `train.epoch`; did you mean"),
    ({"variants": {"a": {"train": {"lrs": 3}}}}, "`train.lrs`; did you mean `train.lr`?"),
    ({"variants": {"ok": {}, "b": {"train.epochs": 0}}}, "variant b: `train.epochs`"),
    ({"overrides": {"name.sub": 1}}, "name is a value, not a section"),
    ({"variants": {"a": {"train.seed": 5}}}, "variant a: `train.seed` cannot vary: list `seeds`"),
    ({"overrides": {"evaluate": {"seeds": [1, 2]}}}, "`evaluate.seeds` cannot vary"),
    ({"overrides": {"run_dir": "elsewhere"}}, "`run_dir` cannot vary"),
    ({"metric": {"label": "direction", "method": "linear"}}, "'k-NN', 'linear probe'"),
    ({"questions": [{"title": "t", "contrasts": []}]}, "questions.0.contrasts"),
    (contrasts({"variant": "x"}), "contrast `c` names `x`, but the variants are: usual, short"),
    (contrasts({"against": "x"}), "contrast `c` names `x`, but the variants are: usual, short"),
    (contrasts({"primary": True}, {"primary": True}), "question `t` has more than one primary"),
    (contrasts({"margin": 0}), "contrasts.0.margin"),
    ({"cpus": 0}, "`cpus`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "words"), WRONG, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_ablation_is_one_sentence(write: Write, sections: dict, words: str) -> None:
    assert words in refused(write(**sections))
