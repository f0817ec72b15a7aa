"""Where the words of a figure stand, as they are drawn."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def text_boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """All words with their boxes in pixels; axes that are switched off have none."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible() and (text.axes is None or text.axes.axison)
    ]


def assert_words_are_apart(figure: Figure) -> None:
    """Nothing is cut off at an edge, no two texts overlap."""
    boxes = text_boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for i, (words, box) in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0, words
        assert box.x1 <= width, words
        assert box.y1 <= height, words
        for others, other in boxes[:i]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            up = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or up <= 1, (words, others)
