import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import config

from kdhiera.cache.fingerprint import (
    base_identity,
    canonical_json,
    column_identity,
    declared_base,
    declared_column,
    differences,
    fingerprint,
    grid_of,
    mask_plan_of,
    table,
)
from kdhiera.masking import MaskSpec, Scope, Strategy

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=12,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: reordered(v) for k, v in reversed(value.items())}
    return [reordered(v) for v in value] if isinstance(value, list) else value


@given(JSON)
def test_canonical_json_is_the_value_whatever_the_order_of_keys(value: Any):
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(reordered(value)) == canonical_json(value)


def test_canonical_json_is_what_it_was():
    value = {"b": (1.0, 0.1, -0.0, 1e300), "a": {"é": None, "s": Strategy.TUBE, "t": True}}
    expected = '{"a":{"s":"tube","t":true,"\\u00e9":null},"b":[1,0.1,0,1e+300]}'
    assert canonical_json(value).decode() == expected
    # printf '%s' '{"a":1}' | sha256sum
    assert (
        fingerprint({"a": 1.0})
        == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_lacks_are_refused(value: float):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": [value]})


@pytest.mark.parametrize("value", [{1: 2}, {"a": {3}}, object(), b"bytes"])
def test_values_that_json_lacks_are_refused(value: object):
    with pytest.raises(TypeError):
        canonical_json(value)


def test_differences_name_nested_fields_and_absent_ones():
    want = {"a": {"b": 1, "c": [1, 2]}, "d": "x", "new": 1}
    has = {"a": {"b": 1.0, "c": [2, 1]}, "d": "y", "old": {"e": 0}}
    found = {d.field: (d.want, d.has) for d in differences(want, has)}
    assert found == {
        "a.c": ("[1,2]", "[2,1]"),
        "d": ('"x"', '"y"'),
        "new": ("1", "-"),
        "old.e": ("-", "0"),
    }
    declared = {d.field for d in differences(want, has, declared_only=True)}
    assert declared == {"a.c", "d", "new"}
    assert differences(has, has) == []


def test_table_is_aligned():
    text = table(differences({"views": {"seed": 0}, "x": 1}, {"views": {"seed": 10}, "x": 2}))
    assert text.splitlines() == [
        "  field       want  cache has",
        "  views.seed  0     10",
        "  x           1     2",
    ]


def base(**changes: Any) -> str:
    return fingerprint(base_identity(config(**changes), score_teacher={"weights_sha256": "1"}))


@pytest.mark.parametrize(
    "change",
    [
        {"clip__num_frames": 8},
        {"clip__width": 96},
        {"views__frames": "uniform"},
        {"views__frame_stride": 2},
        {"views__crop": "center"},
        {"views__crop_scale": [0.4, 1.0]},
        {"views__crop_ratio": [0.9, 1.1]},
        {"views__flip": True},
        {"views__allow_short": True},
        {"views__seed": 1},
        {"scores__source": "uniform"},
        {"scores__teacher": "video"},
        {"scores__source": "received_attention"},
        {"scores__layer": "9"},
        {"scores__heads": [0]},
        {"masks__keep": "all"},
        {"masks__strategies": ["attention", "tube"]},
        {"masks__ratio": 0.75},
        {"masks__draws": 2},
        {"masks__scope": "clip"},
        {"masks__seed": 1},
    ],
    ids=str,
)
def test_what_decides_a_row_changes_the_base(change: dict[str, Any]):
    assert base(**change) != base()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"run_dir": "elsewhere"},
        {"data__shards": ["other.tar"]},
        {"views__num": 7},
        {"cache__dir": "elsewhere"},
        {"cache__encoding": "fp32"},
        {"extract__batch_size": 3},
        {"decode__num_children": 3},
        {"train__epochs": 3},
        {"student__size": "tiny"},
        {"teachers__image": {"kind": "timm", "model": "vit", "layers": [1], "compile": True}},
        {"views__crop_scale": [0.5, 1]},
        {"masks__strategies": ["attention", "attention"]},
    ],
    ids=str,
)
def test_what_decides_no_row_leaves_the_base(change: dict[str, Any]):
    assert base(**change) == base()


def test_settings_without_effect_leave_the_base():
    assert base(views__frames="uniform", views__frame_stride=9) == base(views__frames="uniform")
    assert base(views__crop="center", views__crop_scale=[0.1, 1]) == base(views__crop="center")
    assert base(masks__keep="all", masks__seed=9) == base(masks__keep="all")
    assert base(masks__strategies=["tube", "attention"]) == base(
        masks__strategies=["attention", "tube"]
    )


def test_weights_of_the_score_teacher_are_in_the_base_unless_scores_need_none():
    def identity(weights: str, **changes: Any) -> dict[str, Any]:
        return base_identity(config(**changes), score_teacher={"weights_sha256": weights})

    assert identity("1") != identity("2")
    uniform = {"scores__source": "uniform"}
    assert identity("1", **uniform) == identity("2", **uniform)
    assert base_identity(config(**uniform), score_teacher=None) == identity("1", **uniform)


def column(weights: str = "1", precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    return column_identity(
        config(**changes),
        "image",
        "1",
        identity={"kind": "timm", "mean": [0.5]},
        weights_sha256=weights,
        precision=precision,
    )


def test_column_identity_holds_what_decides_its_codes():
    variants = [
        column(),
        column(weights="2"),
        column(precision="bf16"),
        column(cache__encoding="fp32"),
        column(teachers__image={"kind": "timm", "model": "other", "layers": [1]}),
        column(teachers__image={"kind": "timm", "model": "vit", "layers": [1], "mean": [0, 0, 0]}),
        column(
            teachers__image={"kind": "timm", "model": "vit", "layers": [1], "options": {"x": 1}}
        ),
    ]
    assert len({fingerprint(v) for v in variants}) == len(variants)


def test_config_alone_agrees_with_what_extraction_recorded():
    recorded = base_identity(config(), score_teacher={"weights_sha256": "1", "mean": [0.5]})
    assert differences(declared_base(config()), recorded, declared_only=True) == []
    changed = declared_base(config(views__seed=3))
    assert [d.field for d in differences(changed, recorded, declared_only=True)] == ["views.seed"]

    def gaps(**changes: Any) -> list[str]:
        want = declared_column(config(**changes), "image", "1")
        return [d.field for d in differences(want, column(), declared_only=True)]

    def image(**changes: Any) -> dict[str, Any]:
        return {"kind": "timm", "model": "vit", "layers": [1], **changes}

    assert gaps() == []
    assert gaps(teachers__image=image(weights="/moved/here.safetensors")) == []
    assert gaps(teachers__image=image(precision="fp32")) == []
    assert gaps(teachers__image=image(precision="bf16")) == ["precision"]
    assert gaps(teachers__image=image(model="other")) == ["teacher.model"]
    assert gaps(teachers__image=image(compile=True, weight=3.0)) == []
    assert gaps(teachers__image=image(options={"depth": 3})) == ["teacher.options.depth"]


def test_defaults_keep_the_identity_that_caches_have():
    """Hashes of the tiny config before teachers had options and scores a layer and heads."""
    assert base() == "b4132ade2ea463d60a1ac39a43cc73e52e5c55002cbcfbf1e4741b6fef73a532"
    assert (
        fingerprint(column()) == "1e874c820e785c70c48f30431e0f027783d7745bd9e42e3649f1b8c3f69211ac"
    )


@pytest.mark.parametrize(
    ("teacher", "declared"),
    [
        ({"kind": "pixels"}, {"kind": "pixels"}),
        ({"kind": "hog"}, {"kind": "hog"}),
        (
            {"kind": "transformers", "weights": "/here/folder", "layers": [1]},
            {"kind": "transformers"},
        ),
        (
            {"kind": "transformers", "model": "some/model", "layers": [1], "std": [1, 1, 1]},
            {"kind": "transformers", "model": "some/model", "std": (1.0, 1.0, 1.0)},
        ),
    ],
)
def test_what_a_config_declares_of_a_teacher(teacher: dict[str, Any], declared: dict[str, Any]):
    layer = "patch" if teacher["kind"] in ("pixels", "hog") else "1"
    assert declared_column(config(teachers__image=teacher), "image", layer)["teacher"] == declared


@pytest.mark.parametrize("keep", ["plan", "all"])
def test_grid_and_plan_come_back_from_an_identity(keep: str):
    run = config(masks__keep=keep, masks__strategies=["attention", "tube"], masks__draws=2)
    stored = json.loads(canonical_json(base_identity(run, score_teacher={})))
    assert grid_of(stored) == run.clip.grid
    plan, wanted = mask_plan_of(stored), run.mask_plan
    assert plan.max_kept(2, 4) == wanted.max_kept(2, 4)
    for strategy in Strategy:
        for ratio in (0.3, 0.5, 0.9):
            spec = MaskSpec(strategy=strategy, scope=Scope.SLOT, ratio=ratio, seed=0)
            assert plan.lacks(spec, draws=2, units_per_slot=4) == wanted.lacks(
                spec, draws=2, units_per_slot=4
            )
