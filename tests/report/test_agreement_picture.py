import numpy as np
import pytest
from texts import assert_words_are_apart

from kdhiera.report.agreement import AgreementPicture, Fit, show_agreement


def _picture(num_blocks: int, targets: list[str], fits: bool = True) -> AgreementPicture:
    rng = np.random.default_rng(0)
    before, after = rng.random((2, num_blocks, len(targets)))
    before[0, 0] = np.nan
    return AgreementPicture(
        title="$5 run: agreement",
        foot="over 256 clips",
        fits=tuple(
            Fit(
                target=name, explained_variance=rng.uniform(-0.3, 1), cosine=rng.random(),
                constant_cosine=rng.random(),
            )
            for name in targets
        )
        if fits
        else (),
        blocks=tuple(f"block {i + 1} (stage 3)" for i in range(num_blocks)),
        layers=tuple(targets),
        before=before,
        after=after,
        read=tuple(num_blocks - 1 if i else None for i in range(len(targets))),
    )  # fmt: skip


TARGETS = ["image/6", "image/9", "image/12", "video/2", "video/3"]
LONG = [f"a_rather_long_teacher_name/{i}" for i in (3, 6, 9, 12)] * 2


@pytest.mark.parametrize(
    ("num_blocks", "targets", "fits"),
    [(9, TARGETS, True), (24, LONG, True), (48, TARGETS, False), (9, ["image/norm"], True)],
)
def test_words_are_apart_and_every_number_is_there(num_blocks, targets, fits):
    picture = _picture(num_blocks, targets, fits)
    figure = show_agreement(picture)
    assert_words_are_apart(figure)
    *bars, before, after = figure.axes
    assert len(bars) == (2 if fits else 0)
    for axes, cka in ((before, picture.before), (after, picture.after)):
        numbers = [text.get_text() for text in axes.texts]
        assert numbers == ["none" if np.isnan(v) else f"{v:.2f}" for v in cka.flat]
        assert len(axes.patches) == len(targets) - 1
    np.testing.assert_array_equal(before.images[0].get_clim(), after.images[0].get_clim())


def test_bars_show_what_the_heads_reach_and_what_the_mean_does():
    picture = _picture(9, TARGETS)
    explained, cosines, *_ = show_agreement(picture).axes
    for axes, wanted in (
        (explained, [fit.explained_variance for fit in picture.fits]),
        (cosines, [fit.cosine for fit in picture.fits]),
    ):
        assert [bar.get_width() for bar in axes.patches] == wanted
        low, high = axes.get_xlim()
        assert low <= min(wanted)
        assert high > max(wanted)
    np.testing.assert_allclose(
        cosines.lines[0].get_xdata(), [fit.constant_cosine for fit in picture.fits]
    )
