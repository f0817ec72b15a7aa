"""Plain videos of a chosen size, rate and length."""

import io
from fractions import Fraction

import av
import numpy as np


def plain_video(*, count: int, size: tuple[int, int], rate: int | Fraction) -> bytes:
    """Grey frames that grow brighter; `size` is (width, height)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            picture = np.full((size[1], size[0], 3), number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
