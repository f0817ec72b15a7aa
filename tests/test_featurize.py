"""The one road from clips to what is stored, with a teacher whose features are known."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from kdhiera.errors import UsageError
from kdhiera.featurize import Featurizer
from kdhiera.grid import Grid
from kdhiera.masking import MaskPlan, PlannedMasks, Scope, Strategy
from kdhiera.teachers.base import TeacherOutput

GRID = Grid(num_frames=4, height=64, width=96)
LAYERS = {"plain": ("place", "brightness")}


class PlainTeacher:
    """Says where a token is and how bright it is; may run out of memory."""

    identity: Mapping[str, object] = MappingProxyType({"kind": "test"})
    weights_sha256 = "0" * 64

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.batches: list[int] = []

    def check(self, layers: Sequence[str], score_source: str | None) -> None:
        pass

    def __call__(
        self, clips: Tensor, layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        if len(clips) > self.room:
            raise torch.OutOfMemoryError("no room")
        self.batches.append(len(clips))
        b, (t, h, w) = len(clips), GRID.tokens
        place = torch.arange(t * h * w).float().view(1, t, h, w, 1).repeat(b, 1, 1, 1, 3)
        patches = clips.view(b, t, 2, h, 16, w, 16, 3).float().mean((2, 4, 6))
        features = {"place": place, "brightness": patches}
        scores = patches.mean(-1) + 1e-3
        scores = scores / scores.sum((2, 3), keepdim=True)
        return TeacherOutput(
            features={n: features[n] for n in layers},
            scores=scores if score_source else None,
        )


def featurizer(teacher: PlainTeacher, *, keep_all: bool = False, batch_size: int = 3) -> Featurizer:
    plan = MaskPlan(
        entries=(PlannedMasks(strategy=Strategy.ATTENTION, ratio=0.5, draws=2),),
        scope=Scope.SLOT,
        seed=0,
        keep_all=keep_all,
    )
    return Featurizer(
        grid=GRID,
        plan=plan,
        teachers={"plain": teacher},
        score_teacher="plain",
        score_source="cls_attention",
        device=torch.device("cpu"),
        batch_size=batch_size,
    )


@pytest.fixture
def clips() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 4, 64, 96, 3), np.uint8)


UIDS = [f"s/{i}/k" for i in range(7)]


def test_kept_units_carry_their_own_pixels_and_tokens(clips: np.ndarray) -> None:
    out = featurizer(PlainTeacher())(clips, uids=UIDS, view=0, layers=LAYERS)
    for row in range(7):
        for place, unit in enumerate(out.units[row]):
            if unit < 0:
                assert not out.pixels[row, place].any()
                assert not out.features["plain", "place"][row, place].any()
                continue
            t, y, x = np.unravel_index(unit, GRID.units)
            cube = clips[row, 2 * t : 2 * t + 2, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
            assert np.array_equal(out.pixels[row, place], cube)
            tokens = [(t * 4 + 2 * y + dy) * 6 + 2 * x + dx for dy in (0, 1) for dx in (0, 1)]
            assert out.features["plain", "place"][row, place, :, 0].tolist() == tokens


def test_batching_and_running_out_of_memory_change_nothing(clips: np.ndarray) -> None:
    whole = featurizer(PlainTeacher(), batch_size=100)(clips, uids=UIDS, view=1, layers=LAYERS)
    tight = PlainTeacher(room=2)
    halved = featurizer(tight, batch_size=100)
    for _ in range(2):
        found = halved(clips, uids=UIDS, view=1, layers=LAYERS)
        assert np.array_equal(found.units, whole.units)
        assert np.array_equal(found.scores, whole.scores)
        for key, features in whole.features.items():
            assert torch.equal(found.features[key], features)
    assert max(tight.batches) <= 2
    with pytest.raises(torch.OutOfMemoryError):
        featurizer(PlainTeacher(room=0))(clips, uids=UIDS, view=1, layers=LAYERS)


def test_a_replay_keeps_the_units_it_is_given(clips: np.ndarray) -> None:
    one = featurizer(PlainTeacher())
    drawn = one(clips, uids=UIDS, view=0, layers=LAYERS)
    again = one(
        clips, uids=["other"] * 7, view=5, layers={"plain": ("brightness",)}, units=drawn.units
    )
    assert np.array_equal(again.units, drawn.units)
    assert np.array_equal(again.pixels, drawn.pixels)
    key = ("plain", "brightness")
    assert torch.equal(again.features[key], drawn.features[key])


def test_statistics_are_of_all_tokens_kept_or_not(clips: np.ndarray) -> None:
    out = featurizer(PlainTeacher())(clips, uids=UIDS, view=0, layers=LAYERS)
    tokens = clips.reshape(7, 2, 2, 4, 16, 6, 16, 3).astype(float).mean((2, 4, 6)).reshape(-1, 3)
    found = out.statistics["plain", "brightness"]
    assert found.count == len(tokens)
    np.testing.assert_allclose(found.mean, tokens.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, tokens.std(0), rtol=1e-5)


def test_scores_that_are_not_finite_never_train(clips: np.ndarray) -> None:
    class Sick(PlainTeacher):
        def __call__(
            self, clips: Tensor, layers: Sequence[str], score_source: str | None
        ) -> TeacherOutput:
            good = super().__call__(clips, layers, score_source)
            assert good.scores is not None
            good.scores[0] = float("nan")
            return good

    out = featurizer(Sick(), batch_size=100)(clips, uids=UIDS, view=0, layers=LAYERS)
    assert np.isfinite(out.scores).all()
    for finite in out.finite.values():
        assert finite.tolist() == [False] + [True] * 6


class Scoring(PlainTeacher):
    """Gives the scores it is made with to the last clip of every batch."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def __call__(
        self, clips: Tensor, layers: Sequence[str], score_source: str | None
    ) -> TeacherOutput:
        good = super().__call__(clips, layers, score_source)
        assert good.scores is not None
        good.scores[-1] = self.scores
        return good


def shares(*first: float) -> Tensor:
    """Scores of a slot of 4 x 6 tokens that sum to 1 and begin with these."""
    rest = (1 - sum(first)) / (24 - len(first))
    return torch.tensor([*first, *[rest] * (24 - len(first))]).view(4, 6)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (shares(-0.5, 0.5), r"teacher plain gives negative scores \(-0.5\): they must be shares"),
        (shares(-0.5, float("nan")), r"teacher plain gives negative scores \(-0.5\)"),
        (2 * shares(), r"teacher plain gives scores that sum to 2 in a slot: .* divide them"),
    ],
)
def test_scores_that_are_no_shares_stop_the_run(
    clips: np.ndarray, scores: Tensor, words: str
) -> None:
    """Floored, negative ones would all be alike: masks would follow nothing."""
    with pytest.raises(UsageError, match=words):
        featurizer(Scoring(scores))(clips, uids=UIDS, view=0, layers=LAYERS)


def test_a_slot_of_zeros_says_nothing_and_stops_nothing(clips: np.ndarray) -> None:
    out = featurizer(Scoring(torch.zeros(4, 6)), batch_size=100)(
        clips, uids=UIDS, view=0, layers=LAYERS
    )
    assert not out.scores[-1].any()
    assert (out.units[-1] >= 0).any()
    assert out.finite["plain", "place"].all()


def test_keep_all_keeps_everything_in_order(clips: np.ndarray) -> None:
    out = featurizer(PlainTeacher(), keep_all=True)(clips, uids=UIDS, view=0, layers=LAYERS)
    assert np.array_equal(out.units, np.tile(np.arange(12, dtype=np.int16), (7, 1)))
    tokens = GRID.units_to_tokens(out.features["plain", "place"])
    assert torch.equal(tokens[0, ..., 0].flatten(), torch.arange(48.0))
