import numpy as np
import pytest
from PIL import Image

from kdhiera.report.plots import save
from kdhiera.report.rates import RatePanel, rate_distortion


def panel(title: str) -> RatePanel:
    return RatePanel(
        title=title,
        curve=((1.0, 0.1), (2.0, 0.02), (4.0, 0.001)),
        bound=((0.5, 0.1), (3.0, 0.001)),
        points={"fp32": (30.0, 0.0), "int8": (6.5, 3e-4), "compact": (2.0, 0.02)},
    )


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_every_layer_has_a_panel_that_holds_its_values(count: int):
    figure = rate_distortion([panel(f"layer $ {i}") for i in range(count)])
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [
        rf"layer \$ {i}" for i in range(count)
    ]
    lines = {line.get_label(): line for line in shown[-1].lines}
    np.testing.assert_array_equal(lines["int8"].get_xydata(), [[6.5, 3e-4]])
    np.testing.assert_array_equal(
        lines["compact at other errors"].get_xydata(), [[1, 0.1], [2, 0.02], [4, 0.001]]
    )
    assert lines["fp32"].get_ydata()[0] > 0  # no error at all has a place on a logarithmic axis
    assert lines["fp32"].get_marker() != lines["int8"].get_marker()


def test_it_draws(tmp_path):
    save(rate_distortion([panel("image 3")]), tmp_path / "rates.png", dpi=60)
    with Image.open(tmp_path / "rates.png") as image:
        assert np.asarray(image.convert("L")).std() > 10
