"""Scores from queries, keys and features, against naive loops."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import TIMM_FAMILIES, timm_teacher
from test_transformers_vit import library_model, save, teacher_of

from kdhiera.config import RunConfig
from kdhiera.errors import UsageError
from kdhiera.teachers import attention
from kdhiera.teachers.build import warn_of_scores
from kdhiera.teachers.scores import (
    ScoreChoice,
    attention_scores,
    feature_norm,
    normalised,
    refuse_scores,
)


def pair(tokens: int, *, seed: int = 0, heads: int = 3):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(2, heads, tokens, 8, generator=generator) for _ in range(2))
    return queries, keys, lambda rows: (queries[:, :, rows], keys)


def naive(queries, keys, source, num_prefix, heads):
    """One probability at a time, in float64."""
    n, _, tokens, _ = queries.shape
    result = torch.zeros(n, tokens - num_prefix, dtype=torch.float64)
    asking = [0] if source == "cls_attention" else range(num_prefix, tokens)
    for i in range(n):
        for head in heads:
            for q in asking:
                row = (keys[i, head].double() @ queries[i, head, q].double()).exp()
                result[i] += (row / row.sum())[num_prefix:]
    return result / (len(heads) * len(asking))


@pytest.mark.parametrize("source", ["cls_attention", "received_attention"])
@pytest.mark.parametrize(("num_prefix", "heads"), [(1, None), (5, (1,)), (2, (0, 2))])
def test_attention_is_the_naive_sum(source, num_prefix, heads, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)  # several chunks, the last one short
    queries, keys, ask = pair(11)
    found = attention_scores(source, ask, num_prefix=num_prefix, heads=heads)
    expected = naive(queries, keys, source, num_prefix, heads or (0, 1, 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


def test_received_attention_never_holds_the_full_map():
    """Rows are asked for once, and summed a chunk at a time."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    _, _, ask = pair(1000)
    with Watch():
        attention_scores("received_attention", ask, num_prefix=0, heads=None)
    assert largest == 2 * 3 * attention.QUERY_CHUNK * 1000 < 2 * 3 * 1000 * 1000 / 7


def test_feature_norm_is_the_length():
    features = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    assert torch.equal(feature_norm(features), torch.tensor([[5.0, 0.0]]))


@given(st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=4, max_size=4), min_size=1))
def test_normalised_rows_sum_to_one(rows):
    scores = torch.tensor(rows, dtype=torch.float32)
    found = normalised(scores)
    torch.testing.assert_close(found.sum(1), torch.ones(len(rows)))
    assert (found >= 0).all()
    order = scores.argsort(dim=1, stable=True)
    assert (found.gather(1, order).diff(dim=1) >= 0).all()


def test_a_row_that_is_not_finite_stays_so():
    assert not normalised(torch.tensor([[1.0, float("nan")]])).isfinite().all()
    assert not normalised(torch.tensor([[1.0, float("inf")]])).isfinite().all()


def test_teachers_without_scores_say_where_to_get_them():
    refuse_scores("this one", None)
    with pytest.raises(
        UsageError, match="this one gives no scores, got score source 'feature_norm'"
    ):
        refuse_scores("this one", "feature_norm")


def test_a_choice_names_what_was_chosen():
    assert ScoreChoice().as_options() == {}
    chosen = ScoreChoice(layer="9", heads=(0, 3)).as_options()
    assert chosen == {"score_layer": "9", "score_heads": [0, 3]}


@pytest.mark.parametrize(
    ("kind", "model", "source", "warned"),
    [
        ("timm", "mae", "cls_attention", True),
        ("timm", "mae", "received_attention", False),
        ("timm", "dino", "cls_attention", False),
        ("transformers", "vit_mae", "cls_attention", True),
        ("transformers", "vit", "cls_attention", False),
    ],
)
def test_maes_class_token_is_warned_of(
    kind: str,
    model: str,
    source: str,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    own = {"kind": "module", "factory": "a:b", "layers": [1]}
    values: dict[str, Any] = {
        "name": "x",
        "run_dir": "x",
        "data": {"shards": "x.tar"},
        "teachers": {"eyes": own, "other": own},
        "scores": {"teacher": "eyes", "source": source},
        "cache": {"dir": "x"},
    }
    mae = timm_teacher(TIMM_FAMILIES["mae"], tmp_path)
    if kind == "timm":
        teacher = timm_teacher(TIMM_FAMILIES[model], tmp_path)
    else:
        teacher = teacher_of(save(library_model(model), tmp_path / model))
    with caplog.at_level(logging.WARNING):
        warn_of_scores(RunConfig.model_validate(values), {"eyes": teacher, "other": mae})
    words = "teacher eyes: .*MAE's class token.*scores.source=received_attention"
    assert [bool(re.search(words, r.getMessage())) for r in caplog.records] == [True] * warned
